"""Keys that are set and that nothing in the run would read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_amrlhf.config.schema import Config


def unread_problems(config: Config) -> Iterator[str]:
    """Every key of a run on answers that differs from its default and has no reader.

    To compare ``mask.kind: none`` with ``adaptive`` one changes that key alone, so with ``none``
    the other keys of ``mask`` may stay as they are.
    """
    for key, reader, is_read in _readers(config):
        section, name = key.split(".")
        if section == "mask" and config.mask.kind == "none":
            continue
        part = getattr(config, section)
        found = getattr(part, name)
        if not is_read and found != type(part).model_fields[name].default:
            yield unread(key, reader, found)


def unread(key: str, reader: str, found: Any) -> str:
    """That only ``reader`` would read a key; ``found`` is what the run has, here or there."""
    return f"{key}: is read by {reader} only (got {found}), set that or leave it out"


def _readers(config: Config) -> Iterator[tuple[str, str, bool]]:
    """(key, what reads it, whether this run does)."""
    algorithm, mask, reward = config.algorithm, config.mask, config.reward
    threshold, statistic = mask.threshold, mask.offline_statistic
    samples, has_steps = config.data.format == "prompts", reward.granularity == "step"
    yield "mask.fixed_value", "mask.threshold: fixed", threshold == "fixed"
    yield "mask.running_decay", "mask.threshold: running", threshold == "running"
    yield "mask.offline_statistic", "mask.threshold: offline", threshold == "offline"
    yield (
        "mask.offline_quantile",
        "mask.threshold: offline with offline_statistic: quantile",
        (threshold, statistic) == ("offline", "quantile"),
    )
    yield "mask.label", "algorithm.kind ppo, grpo or kto", algorithm.labels_answers
    yield (
        "loss.denominator",
        "algorithm.kind ppo, grpo or rejection_sampling",
        algorithm.counts_tokens,
    )
    yield "reward.placement", "algorithm.kind: ppo", algorithm.has_critic
    # As with the keys of mask, reward.* may stay where only mask.kind is changed.
    is_cut = mask.kind == "none" or mask.signal != "implicit" or algorithm.has_critic
    for key in ("reward.granularity", "reward.normalise"):
        yield key, "algorithm.kind ppo and a mask.signal other than implicit", is_cut
    yield (
        "reward.step_boundary",
        "reward.granularity: step and reward.outcome",
        has_steps or reward.outcome != "tokens",
    )
    yield "reward_model.path", "reward.prm_weight", reward.prm_weight > 0
    yield "reward_model.orm_path", "reward.orm_weight", reward.orm_weight > 0
    yield "reward.outcome", "a reward.prm_weight above 0", reward.prm_weight > 0
    yield "reward_model.attribute_weights", "a reward.prm_weight above 0", reward.prm_weight > 0
    yield "optimizer.critic_lr", "algorithm.kind: ppo", algorithm.has_critic
    yield "rollout.reference_samples_per_prompt", "data.format: prompts", samples
    yield "rollout.truncated", "data.format: prompts", samples
    penalises = samples and config.rollout.truncated == "penalise"
    yield "rollout.truncated_penalty", "rollout.truncated: penalise", penalises
