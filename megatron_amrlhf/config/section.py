"""What every section of the configuration is made of: its base and its types of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def one_of(words: Sequence[str]) -> str:
    """Choices as a person names them: ``a``, ``a or b``, ``a, b or c``."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# Beyond these a number is a slip of the keyboard, and what computes with it fails far from here:
# a list of so many places, a time that no clock takes, a sum over int64.
LARGEST_COUNT = 10**9
LARGEST_ROWS = 10**6  # of a step
LARGEST_TOKENS = 10**7  # of a row
LARGEST_SEED = 2**63 - 1
LARGEST_NUMBER = 1e9

Dtype = Literal["auto", "float32", "bfloat16"]
Name = Annotated[str, Field(min_length=1)]  # of a file, a folder or a model
Positive = Annotated[int, Field(gt=0, le=LARGEST_COUNT)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Rows = Annotated[int, Field(gt=0, le=LARGEST_ROWS)]
Tokens = Annotated[int, Field(gt=0, le=LARGEST_TOKENS)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST_NUMBER, strict=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST_NUMBER, strict=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=False)]
AnyFloat = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER, strict=False)]
