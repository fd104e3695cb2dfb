"""Which models a run has, and which passes of which rows a step makes, at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.models.shape import ModelShape, read_shape

LOGPROB, LOGPROB_AND_ENTROPY = 1, 2  # what is read of a language model's outputs


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
class Pass:
    """Passes of one kind in a step; the rows are a replica's, as long as they may be.

    Attributes:
        phase: rollout, score or update.
        role: which model.
        rows: of one pass, each a prompt and a response.
        times: passes a step.
        reads: per output of a language model, see ``costs.score_bytes``.
        together: this many consecutive rows stay in one micro-batch.
    """

    phase: str
    role: str
    rows: int
    times: int = 1
    reads: int = LOGPROB
    together: int = 1


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
    if data.format == "pairs":
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
    shape, kind = read_shape(policy), config.algorithm.kind
    if config.algorithm.trains_reward_model:
        outputs = config.algorithm.num_attributes if kind == "prm" else 1
        return [PlannedRole(kind, shape, outputs, True)]
    roles = [PlannedRole("actor", shape, None, True)]
    if config.algorithm.has_critic:
        roles.append(PlannedRole("critic", shape, 1, True))
    roles.append(PlannedRole("reference", shape, None, False))
    for name in reward_roles(config):
        hf_config, outputs = rewards[name]
        roles.append(PlannedRole(name, read_shape(hf_config), outputs, False))
    return roles


def reward_roles(config: Config) -> dict[str, str]:
    """Folders of the reward models that a run on answers loads, by role."""
    if config.algorithm.trains_reward_model:
        return {}
    section, weights = config.reward_model, config.reward
    found = {
        "prm": section.path if weights.prm_weight else None,
        "orm": section.orm_path if weights.orm_weight else None,
    }
    return {role: path for role, path in found.items() if path}


def planned_passes(config: Config, roles: list[PlannedRole], data_size: int) -> list[Pass]:
    """What a step does on each replica, with the most rows that an algorithm may choose."""
    algorithm, rollout = config.algorithm, config.rollout
    kind = algorithm.kind
    if algorithm.trains_reward_model:
        together = algorithm.rows_together
        rows = max(algorithm.batch_size // data_size, 1) * together
        return [Pass("update", kind, rows, together=together)]
    prompts = max(rollout.prompts_per_step // data_size, 1)
    offline = config.data.format == "pairs"
    samples = 2 if offline else rollout.samples_per_prompt
    answers = prompts * samples
    passes = []
    if not offline:
        by_reference = prompts * rollout.reference_samples_per_prompt
        passes.append(Pass("rollout", "actor", answers - by_reference))
        if by_reference:
            passes.append(Pass("rollout", "reference", by_reference))
    for role in roles:
        reads = LOGPROB_AND_ENTROPY if role.name == "actor" else LOGPROB
        passes.append(Pass("score", role.name, answers, reads=reads))
    together, times, chosen = algorithm.rows_together, algorithm.minibatches, answers
    if kind in ("ppo", "grpo"):
        times *= algorithm.epochs
    elif kind == "kto":
        passes += [Pass("score", "reference", answers), Pass("score", "actor", answers)]
    elif kind == "dpo":
        of_a_prompt = 2 if algorithm.pairs == "best_worst" else samples * (samples - 1)
        chosen = prompts * of_a_prompt
    elif algorithm.select != "threshold":
        chosen = prompts * algorithm.k
    units = -(-chosen // together // algorithm.minibatches)
    for role in roles:
        if role.trainable:
            rows = max(units, 1) * together
            passes.append(Pass("update", role.name, rows, times, together=together))
    return passes
