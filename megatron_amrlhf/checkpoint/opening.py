"""A role's weights out of a training checkpoint, one Hugging Face tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_amrlhf.checkpoint.folders import (
    MANIFEST_FILE,
    STATE_FILE,
    file_problem,
    read_manifest,
)
from megatron_amrlhf.checkpoint.header import Header, check_layout, read_header
from megatron_amrlhf.checkpoint.parts import RoleParts, other_sizes
from megatron_amrlhf.config.problems import describe_problems
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.weights import MASTER
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.shards import MergedShards


def roles_in(folder: Path) -> dict[str, str]:
    """The dtype of each role that a checkpoint holds, by the role's name.

    Raises:
        UserError: it is no checkpoint of ours, or ``state.json`` is damaged.
    """
    return {name: role.dtype for name, role in _header(folder).roles.items()}


def saved_config(folder: Path) -> Config | None:
    """The configuration of the run that saved a checkpoint; None where it did not say.

    Raises:
        UserError: it is no checkpoint of ours, or ``state.json`` is damaged or has other keys.
    """
    config = _header(folder).state.get("config")
    try:
        return None if config is None else Config.model_validate(config)
    except ValidationError as error:
        given = config if isinstance(config, dict) else {}
        problems = "; ".join(describe_problems(error, given, set()))
        raise UserError(
            f"{folder / STATE_FILE}: this version does not know its configuration ({problems}): "
            "use the version that saved it"
        ) from None


def open_role(folder: Path, role: str, hf_config: Mapping[str, Any]) -> MergedShards:
    """The float32 master weights of a role under Hugging Face names.

    Args:
        folder: ``checkpoints/step-N``.
        role: actor, critic, prm or orm.
        hf_config: the parsed config.json of the model that the run started from.

    Raises:
        UserError: a file is missing or damaged, there is no such role, or the model is another.
    """
    header, shape = _header(folder), read_shape(hf_config)
    if role not in header.roles:
        raise UserError(f"{folder} has no role {role!r}: it holds {', '.join(header.roles)}")
    layout, then = header.saved_layout, header.roles[role]
    if other := other_sizes(then.model, vars(shape)):
        raise UserError(f"{folder} is of another model than its config.json: {other}")
    check_layout(folder, header, shape.num_layers, set(read_manifest(folder) or ()))
    _check_files(folder, [STATE_FILE, *layout.parts_of(role)])
    outputs = then.head_outputs
    parts = RoleParts(folder, role, layout, shape, outputs)
    read = partial(parts.shard, kind=MASTER)
    return MergedShards(
        folder, shape, layout.cut, tensor=layout.tensor, head_outputs=outputs, shard=read
    )


def _header(folder: Path) -> Header:
    if read_manifest(folder) is None:
        raise UserError(f"{folder} is no complete checkpoint: its {MANIFEST_FILE} is missing")
    return read_header(folder)


def _check_files(folder: Path, names: list[str]) -> None:
    manifest = read_manifest(folder) or {}
    for name in names:
        if problem := file_problem(folder, name, manifest):
            raise UserError(f"{folder / name} {problem}")
