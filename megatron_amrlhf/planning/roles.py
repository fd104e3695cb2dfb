"""Which models a run has, with their sizes, and how long its rows may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.models.shape import ModelShape, read_shape


@dataclass(frozen=True)
class PlannedRole:
    """A model of the run.

    Attributes:
        name: of the role.
        shape: sizes of the model.
        head_outputs: None for a language model, else outputs of its linear head.
        trainable: whether it has an optimizer.
    """

    name: str
    shape: ModelShape
    head_outputs: int | None
    trainable: bool


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the longest row."""

    prompt: int
    response: int


def row_lengths(config: Config) -> RowLengths:
    """The longest prompt and answer that the configuration lets in."""
    data = config.data
    if config.algorithm.trains_reward_model:
        return RowLengths(data.max_row_tokens - 1, 1)
    if config.is_offline:
        prompt = min(data.max_prompt_tokens, data.max_row_tokens - 1)
        return RowLengths(prompt, data.max_row_tokens - prompt)
    room = data.max_row_tokens - data.max_prompt_tokens
    return RowLengths(data.max_prompt_tokens, min(config.rollout.max_new_tokens, room))


def planned_roles(
    config: Config, policy: Mapping[str, Any], rewards: Mapping[str, tuple[Mapping[str, Any], int]]
) -> list[PlannedRole]:
    """The models in the order in which a run makes them.

    Args:
        config: the run.
        policy: the parsed config.json of ``model.path``.
        rewards: by role (prm, orm) the reward model's parsed config.json and its head's outputs.

    Raises:
        UserError: a model is not supported.
    """
    shape = read_shape(policy)
    roles = [
        PlannedRole(role.name, shape, role.head_outputs, role.trainable)
        for role in config.algorithm.roles(config)
    ]
    for name in config.reward_folders:
        hf_config, outputs = rewards[name]
        roles.append(PlannedRole(name, read_shape(hf_config), outputs, False))
    return roles
