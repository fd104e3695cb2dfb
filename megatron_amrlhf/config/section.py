"""What every section of the configuration is made of: its base and its types of numbers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Name = Annotated[str, Field(min_length=1)]  # of a file, a folder or a model
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, strict=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=False)]
AnyFloat = Annotated[float, Field(strict=False)]
