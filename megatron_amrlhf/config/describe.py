"""The schema as text: every key with its type, default and description, for help and errors."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_amrlhf.config.algorithms import algorithm_models
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.config.section import LARGEST_ROWS

RANGE_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: dotted name, such as ``rollout.top_p``.
        kind: the ``algorithm.kind`` that has this key; empty for keys outside ``algorithm``.
        type: readable type with its range, such as ``float > 0, <= 1``.
        default: readable default, or ``required``.
        description: the schema's description.
    """

    name: str
    kind: str
    type: str
    default: str
    description: str


def list_keys() -> tuple[Key, ...]:
    """Lists every key of the schema, in the schema's order."""
    keys: list[Key] = []
    for section, field in Config.model_fields.items():
        if section == "algorithm":
            for kind, model in algorithm_models().items():
                keys += _section_keys(section, kind, model)
        else:
            assert _is_section(field.annotation)
            keys += _section_keys(section, "", field.annotation)
    return tuple(keys)


def section_fields(section: str, kind: str | None) -> tuple[str, ...]:
    """Names of the keys allowed in a section.

    Args:
        section: name of the section; empty for the top level.
        kind: the ``algorithm.kind`` of the run, if it is a valid one.
    """
    if not section:
        return tuple(Config.model_fields)
    if section == "algorithm":
        chosen = algorithm_models().get(kind or "")
        return tuple(chosen.model_fields) if chosen else ()
    model: type[BaseModel] = Config
    for name in section.split("."):
        field = model.model_fields.get(name)
        if field is None or not _is_section(field.annotation):
            return ()
        model = field.annotation
    return tuple(model.model_fields)


def format_value(value: Any) -> str:
    """Writes a value as YAML would, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    return repr(value)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_keys(section: str, kind: str, model: type[BaseModel]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from _section_keys(f"{section}.{name}", kind, field.annotation)
            continue
        if section == "algorithm" and name == "kind":
            shown_type, default, description = repr(kind), "required", "picks the algorithm"
        else:
            shown_type = _field_type(field)
            default = "required" if field.is_required() else format_value(field.default)
            description = field.description or ""
        yield Key(f"{section}.{name}", kind, shown_type, default, description)


def _field_type(field: FieldInfo) -> str:
    return _with_range(_type_text(field.annotation), field.metadata)


def _type_text(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [item for extra in args[1:] for item in getattr(extra, "metadata", [extra])]
        return _with_range(_type_text(args[0]), metadata)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(member) for member in args)
    if origin is Literal:
        return " | ".join(str(member) for member in args)
    if origin is tuple:
        return "list of " + _type_text(args[0]) + ("" if args[-1] is ... else f" ({len(args)})")
    if annotation is type(None):
        return "null"
    return {str: "text"}.get(annotation, annotation.__name__)


def _with_range(text: str, metadata: list[Any]) -> str:
    limits = [
        f"{sign} {getattr(item, name):g}"
        for item in metadata
        for name, sign in RANGE_SIGNS
        if abs(getattr(item, name, LARGEST_ROWS)) < LARGEST_ROWS  # the largest are for slips
    ]
    return f"{text} {', '.join(limits)}" if limits else text
