"""What judges answers and how they are cut: ``reward_model``, ``reward`` and ``mask``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_amrlhf.config.section import (
    AnyFloat,
    Dtype,
    Fraction,
    Name,
    NonNegativeFloat,
    Section,
)


class RewardModelSection(Section):
    path: Name | None = Field(
        None,
        description="folder that a prm or orm run exported (runs/NAME/export); read by "
        "reward.prm_weight; null with data.format pairs: the scores in the file, if any",
    )
    orm_path: Name | None = Field(
        None, description="folder that an orm run exported; read by reward.orm_weight"
    )
    dtype: Dtype | None = Field(
        None, description="dtype of the PRM and the ORM; null: as model.dtype"
    )
    output: Literal["logit", "score"] = Field(
        "logit",
        description="what the PRM's head gives: a logit (loss: bce), whose sigmoid is a step's "
        "probability, or a score in [0, 1] (loss: mse); read by reward.outcome; must be what the "
        "PRM's folder says",
    )
    step_marker: str | None = Field(
        None,
        description="token after each step at which the PRM judges it, such as <extra_0>; null: "
        "what its folder says (data.step_marker of its training; a public PRM's says nothing)",
    )
    step_separator: str | None = Field(
        None,
        description="text that a PRM with a marker sees between steps; null: what its folder says, "
        "or else a newline",
    )
    attribute_weights: tuple[AnyFloat, ...] | None = Field(
        None,
        strict=False,
        description="weight of each attribute in the scalar reward; null: the mean of them",
    )


class RewardSection(Section):
    prm_weight: NonNegativeFloat = Field(
        1.0, description="weight of reward_model.path's reward in the sum; 0: not used"
    )
    orm_weight: NonNegativeFloat = Field(
        0.0, description="weight of reward_model.orm_path's reward, the same at all tokens"
    )
    verifiable_weight: NonNegativeFloat = Field(
        0.0,
        description="weight of 1 for a right answer, 0 for a wrong one (prompts with 'answer'; "
        "what is not sure is not judged), the same at all tokens",
    )
    verify_seconds: Annotated[float, Field(gt=0, le=86400, strict=False)] = Field(
        5.0, description="longest comparison of an answer, seconds; then it counts as failed"
    )
    max_failed_fraction: Fraction = Field(
        0.1,
        description="stop when a step has a larger share of answers whose reward failed (doubts "
        "about an answer apart); those answers are never learned from",
    )
    normalise: Literal["none", "batch", "offline"] = Field(
        "batch",
        description="whiten token rewards (eq. 11) over the global batch or by the mean and "
        "deviation in mask.offline_file, or leave them",
    )
    granularity: Literal["sequence", "step", "token", "message"] = Field(
        "message",
        description="unit whose tokens share one reward (figure 1): sequence and step are cut and "
        "kept as wholes; token and message are cut by token and differ in ppo's rewards only",
    )
    step_boundary: Literal["newline", "sentence"] = Field(
        "newline",
        description="what ends a step for granularity: step and for outcome; sentence: newlines "
        "and the punctuation that ends English and Chinese sentences",
    )
    outcome: Literal["tokens", "last", "min", "mean", "product", "prefix"] = Field(
        "tokens",
        description="reward of a whole answer: mean or last of its tokens' (message_reward); of "
        "its steps' probabilities the last, min, mean or product (PRM_O); prefix: share of steps "
        "before the first below 0.5 (PRM_P)",
    )
    placement: Literal["last", "spread"] = Field(
        "last",
        description="a unit's reward stands on its last token or on each of its tokens (ppo)",
    )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward in the sum, by its key."""
        keys = (x for x in type(self).model_fields if x.endswith("_weight"))
        return {key: getattr(self, key) for key in keys}


class MaskSection(Section):
    kind: Literal["adaptive", "none"] = Field(
        "adaptive", description="adaptive: eq. 13; none: the plain algorithm"
    )
    signal: Literal["reward", "td_error", "advantage", "implicit"] = Field(
        "reward", description="the dense signal R(x, y_t) that is cut"
    )
    threshold: Literal[
        "fixed",
        "offline",
        "running",
        "batch",
        "sequence",
        "group",
    ] = Field("batch", description="where the baseline b comes from; statistics are global over DP")
    offline_file: Name | None = Field(
        None,
        description="statistics.json that tools/score_tokens.py wrote, for threshold: offline and "
        "reward.normalise: offline",
    )
    offline_statistic: Literal["mean", "median", "quantile"] = Field(
        "mean", description="which statistic of the file b is"
    )
    offline_quantile: Fraction = Field(
        0.5, description="share of scored tokens at or below b, for offline_statistic: quantile"
    )
    fixed_value: AnyFloat = Field(0.0, description="b for threshold: fixed, signal units")
    running_decay: Fraction = Field(0.9, description="EMA decay of b for threshold: running")
    delta: NonNegativeFloat = Field(0.0, description="Schmitt offset delta of eq. 17")
    delta_unit: Literal["signal", "deviations"] = Field(
        "deviations", description="delta in signal units or in its global standard deviations"
    )
    neutral: Literal["drop", "hold"] = Field(
        "hold", description="neutral tokens: M = 0 (eq. 18) or the last sign (hysteresis)"
    )
    label: Literal["batch", "group", "value"] = Field(
        "group", description="baseline that makes an answer chosen: batch or group mean, or value"
    )
    message_reward: Literal["mean", "last"] = Field(
        "mean", description="reward of a message: mean of its tokens or its last token's (eq. 12)"
    )
