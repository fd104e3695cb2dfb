"""What DeepSpeed's own models say of the sections of a user's JSON, before a process group is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megatron_amrlhf.config.problems import did_you_mean, wrong_value


@contextmanager
def named_accelerator() -> Iterator[None]:
    """For the import of DeepSpeed, which says at length where it finds no GPU by itself."""
    import torch  # noqa: PLC0415 - heavy

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    yield


def section_problems(template: dict[str, Any]) -> list[str]:
    """Unknown keys and wrong values of ``zero_optimization`` and ``bf16``.

    "auto" is for others to judge. Imports DeepSpeed, which takes seconds.

    Args:
        template: a DeepSpeed configuration; sections that are no objects are passed over.
    """
    with named_accelerator():
        from deepspeed.runtime import precision_config  # noqa: PLC0415 - heavy
        from deepspeed.runtime.zero import config  # noqa: PLC0415 - heavy

    sections: dict[str, type[BaseModel]] = {
        "zero_optimization": config.DeepSpeedZeroConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
    }
    return [
        problem
        for name, model in sections.items()
        if isinstance(section := template.get(name), dict)
        for problem in _problems(name, section, model)
    ]


def _problems(name: str, section: dict[str, Any], model: type[BaseModel]) -> Iterator[str]:
    if deprecated := sorted(section.keys() & _deprecated(model).keys()):
        # DeepSpeed 0.19.8 fails on reading them, by another error than a wrong value's.
        for key in deprecated:
            yield f"{name}.{key}: is deprecated, use {_deprecated(model)[key]}"
        return
    try:
        model(**section)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path = ".".join([name, *map(str, item["loc"])])
            if item["type"] == "extra_forbidden":
                *parents, key = map(str, item["loc"])
                yield f"{path}: unknown key{did_you_mean(key, _keys(model, parents))}"
            else:
                yield wrong_value(item, path)


def _deprecated(model: type[BaseModel]) -> dict[str, object]:
    """Names of deprecated keys and of what came in their place."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {
        name: extra["new_param"]
        for name, extra in extras.items()
        if isinstance(extra, dict) and extra.get("deprecated")
    }


def _keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """The keys of a section inside ``model``, as a JSON spells them."""
    for parent in parents:
        kinds = get_args(model.model_fields[parent].annotation) or (
            model.model_fields[parent].annotation,
        )
        model = next(kind for kind in kinds if issubclass(kind, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]
