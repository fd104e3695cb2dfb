"""Keys that are set and that nothing in the run would read."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_amrlhf.config.algorithm_section import unread
from megatron_amrlhf.config.algorithms import kinds_that
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
    labels, critics = kinds_that("labels_answers"), kinds_that("has_critic")
    yield "mask.label", f"algorithm.kind {labels}", algorithm.labels_answers
    means = f"algorithm.kind {kinds_that('counts_tokens')}"
    yield "loss.denominator", means, algorithm.counts_tokens
    yield "reward.placement", f"algorithm.kind: {critics}", algorithm.has_critic
    # As with the keys of mask, reward.* may stay where only mask.kind is changed.
    is_cut = mask.kind == "none" or mask.signal != "implicit" or algorithm.has_critic
    for key in ("reward.granularity", "reward.normalise"):
        yield key, f"algorithm.kind {critics} and a mask.signal other than implicit", is_cut
    yield (
        "reward.step_boundary",
        "reward.granularity: step and reward.outcome",
        has_steps or reward.outcome != "tokens",
    )
    yield "reward_model.path", "reward.prm_weight", reward.prm_weight > 0
    yield "reward_model.orm_path", "reward.orm_weight", reward.orm_weight > 0
    yield "reward.outcome", "a reward.prm_weight above 0", reward.prm_weight > 0
    yield "reward_model.attribute_weights", "a reward.prm_weight above 0", reward.prm_weight > 0
    yield "optimizer.critic_lr", f"algorithm.kind: {critics}", algorithm.has_critic
    yield "rollout.reference_samples_per_prompt", "data.format: prompts", samples
    yield "rollout.truncated", "data.format: prompts", samples
    penalises = samples and config.rollout.truncated == "penalise"
    yield "rollout.truncated_penalty", "rollout.truncated: penalise", penalises
