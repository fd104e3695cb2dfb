"""Rules between the keys of one algorithm, and keys that nothing would read."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_amrlhf.config.algorithms import (
    DpoAlgorithm,
    KtoAlgorithm,
    PpoAlgorithm,
    RejectionSamplingAlgorithm,
)
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.config.unread_rules import unread


def algorithm_problems(config: Config) -> Iterator[str]:
    """Every broken rule of an algorithm on answers, with its fix."""
    algorithm = config.algorithm
    yield from _group_problems(config)
    if isinstance(algorithm, PpoAlgorithm):
        yield from _ppo_problems(config, algorithm)
    if isinstance(algorithm, DpoAlgorithm):
        yield from _dpo_problems(config, algorithm)
    if isinstance(algorithm, KtoAlgorithm):
        yield from _kto_problems(algorithm)
    if isinstance(algorithm, RejectionSamplingAlgorithm):
        yield from _rejection_sampling_problems(config, algorithm)


def _group_problems(config: Config) -> Iterator[str]:
    mask, samples = config.mask, config.rollout.samples_per_prompt
    reads_group = mask.kind == "adaptive" and mask.threshold == "group"
    if reads_group and config.data.format == "prompts" and samples < 2:
        yield (
            "mask.threshold: group is the mean over the answers to a prompt, of which there is one "
            "only: use rollout.samples_per_prompt of at least 2, or threshold sequence"
        )


def _ppo_problems(config: Config, algorithm: PpoAlgorithm) -> Iterator[str]:
    place, estimator = algorithm.kl_in, algorithm.kl_estimator
    meant = {"reward": ("k1", "abs"), "loss": ("k2", "k3")}[place]
    if estimator not in meant:
        yield (
            f"algorithm.kl_estimator: {estimator} in the {place} does not pull towards the "
            f"reference: use {' or '.join(meant)} with algorithm.kl_in: {place}"
        )
    if algorithm.bootstrap_truncated and config.rollout.truncated == "mask":
        reader = "rollout.truncated: keep or penalise"
        yield unread("algorithm.bootstrap_truncated", reader, config.rollout.truncated)


def _dpo_problems(config: Config, algorithm: DpoAlgorithm) -> Iterator[str]:
    if config.data.format == "pairs" and algorithm.pairs != "best_worst":
        yield _not_offline("algorithm.pairs", algorithm.pairs)
    if algorithm.pair_margin and algorithm.pairs != "margin":
        yield unread("algorithm.pair_margin", "algorithm.pairs: margin", algorithm.pairs)


def _kto_problems(algorithm: KtoAlgorithm) -> Iterator[str]:
    if not (algorithm.desirable_weight or algorithm.undesirable_weight):
        yield (
            "algorithm.desirable_weight, algorithm.undesirable_weight: nothing is learned with "
            "both 0, set one above 0"
        )


def _rejection_sampling_problems(
    config: Config, algorithm: RejectionSamplingAlgorithm
) -> Iterator[str]:
    select, samples = algorithm.select, config.rollout.samples_per_prompt
    if config.data.format == "pairs":
        if select != "best":
            yield _not_offline("algorithm.select", select)
        if algorithm.control != "none":
            yield _not_offline("algorithm.control", algorithm.control)
    if algorithm.k != 1 and select != "top_k":
        yield unread("algorithm.k", "algorithm.select: top_k", select)
    if algorithm.threshold and select != "threshold":
        yield unread("algorithm.threshold", "algorithm.select: threshold", select)
    if algorithm.k > samples:
        yield (
            f"algorithm.k = {algorithm.k} is more than the answers to a prompt: use at most "
            f"rollout.samples_per_prompt = {samples}"
        )


def _not_offline(key: str, found: str) -> str:
    return f"{key}: the pairs of data.format: pairs are given (got {found}), leave it out"
