"""Rules between the keys that say where rewards and their statistics come from."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_amrlhf.config.schema import Config


def reward_problems(config: Config) -> Iterator[str]:
    """Every broken rule of a run on answers, with its fix."""
    weights, paths = config.reward, config.reward_model
    if not any(weights.weights.values()):
        yield "reward.prm_weight: one of the reward's weights must be above 0"
    is_given = config.is_offline  # whose scores may stand for a PRM
    if weights.prm_weight and paths.path is None and not is_given:
        yield (
            "reward_model.path: is required, train one with algorithm.kind prm and give its "
            "runs/NAME/export folder (or set reward.prm_weight to 0)"
        )
    if weights.orm_weight and paths.orm_path is None:
        yield "reward_model.orm_path: is required by reward.orm_weight"
    if weights.verifiable_weight and is_given:
        yield (
            "reward.verifiable_weight: the answers of data.format: pairs are not compared with "
            "anything, leave it out"
        )
    by_file = is_given and paths.path is None
    if by_file and weights.prm_weight and weights.outcome != "tokens":
        yield (
            f"reward.outcome: {weights.outcome} reads a PRM's steps, which the file's scores of "
            "sentences are not: use tokens, or give a PRM in reward_model.path"
        )
    yield from _offline_problems(config)
    mask = config.mask
    if (mask.threshold, mask.signal, weights.normalise) == ("running", "reward", "batch"):
        yield (
            "mask.threshold: running follows nothing where each batch of rewards is whitened to "
            "mean 0: use reward.normalise: none or offline"
        )
    is_flat = weights.granularity == "sequence" or not weights.prm_weight
    if (mask.kind, mask.threshold, mask.signal) == ("adaptive", "sequence", "reward") and is_flat:
        yield (
            "mask.threshold: sequence cuts nothing where all tokens of an answer have the same "
            "reward (reward.granularity: sequence, or no PRM): use batch, group, running or fixed"
        )


def _offline_problems(config: Config) -> Iterator[str]:
    """A data set's statistics are of one PRM's raw scores, so they fit nothing else."""
    mask, weights = config.mask, config.reward
    by_file = mask.threshold == "offline"
    if not by_file and weights.normalise != "offline":
        if mask.offline_file is not None:
            yield (
                "mask.offline_file: is read by mask.threshold: offline and reward.normalise: "
                "offline only, set one of them or leave it out"
            )
        return
    key = "mask.threshold" if by_file else "reward.normalise"
    if mask.offline_file is None:
        yield f"{key}: offline needs mask.offline_file, made by tools/score_tokens.py"
    if (
        config.reward_model.path is None
        or {key for key, weight in weights.weights.items() if weight} != {"prm_weight"}
        or weights.prm_weight != 1
        or config.rollout.truncated == "penalise"
    ):
        yield (
            f"{key}: offline is about the PRM's scores alone: use reward.prm_weight 1, no other "
            "reward and no rollout.truncated: penalise"
        )
    if by_file and mask.signal != "reward":
        yield f"{key}: offline is about rewards, use mask.signal: reward (got {mask.signal})"
    if by_file and weights.normalise == "batch":
        yield (
            f"{key}: offline does not fit rewards that are whitened by batch: use "
            "reward.normalise: offline or none"
        )
