"""The ``algorithm`` section: one model a kind."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megatron_amrlhf.config.section import (
    AnyFloat,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rows,
    Section,
)

STEP_FORMATS = ("steps", "auto", "prm800k", "math_shepherd", "helpsteer", "helpsteer_sentences")


class AlgorithmSection(Section):
    """What every kind says of itself to the rest of the configuration, beside its keys.

    Attributes:
        trains_reward_model: it learns from labels; else it learns from answers, by their reward.
        data_formats: values of ``data.format`` that it can read.
        rows_together: rows that its loss reads at once.
        has_critic: it trains a critic.
        compares_answers: it needs several answers to a prompt.
        labels_answers: it learns from every answer, as a chosen or a rejected one.
        loss_reads_label: also without a mask.
        counts_tokens: its loss is a mean over tokens, as ``loss.denominator`` counts them.
    """

    trains_reward_model: ClassVar[bool] = False
    data_formats: ClassVar[tuple[str, ...]] = ("prompts",)
    rows_together: ClassVar[int] = 1
    has_critic: ClassVar[bool] = False
    compares_answers: ClassVar[bool] = False
    labels_answers: ClassVar[bool] = False
    loss_reads_label: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = False


class PrmAlgorithm(AlgorithmSection):
    trains_reward_model = True
    data_formats = STEP_FORMATS
    kind: Literal["prm"] = "prm"
    epochs: Positive = Field(2, description="passes over the data (paper, app. A.1)")
    batch_size: Rows = Field(16, description="solutions an optimizer step, over all DP ranks")
    num_attributes: Literal[1, 5] = Field(
        1, description="outputs of the head: 1 (step correctness) or HelpSteer's 5"
    )
    loss: Literal["bce", "mse"] = Field(
        "bce", description="bce on labels in [0, 1] or squared error, both at step ends"
    )


class OrmAlgorithm(AlgorithmSection):
    trains_reward_model = True
    data_formats = ("pairs",)
    rows_together = 2
    kind: Literal["orm"] = "orm"
    epochs: Positive = Field(1, description="passes over the data")
    batch_size: Rows = Field(16, description="pairs an optimizer step, over all DP ranks")


class PpoAlgorithm(AlgorithmSection):
    has_critic = labels_answers = counts_tokens = True
    kind: Literal["ppo"] = "ppo"
    clip_eps: PositiveFloat = Field(0.2, description="epsilon of eq. 14")
    value_clip_eps: PositiveFloat = Field(0.2, description="clip range of the value loss")
    gamma: Fraction = Field(1.0, description="discount")
    gae_lambda: Fraction = Field(0.95, description="lambda of GAE")
    bootstrap_truncated: bool = Field(
        False,
        description="an answer cut off at the length limit goes on with the critic's value of its "
        "last state; false: it ends there with value 0",
    )
    kl_coef: NonNegativeFloat = Field(0.05, description="weight of KL(pi, pi_ref)")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="the KL is a penalty in the token reward or a term of the loss"
    )
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        "k1", description="KL estimator: k1 or abs in the reward, k2 or k3 in the loss"
    )
    epochs: Positive = Field(1, description="passes over a rollout")
    minibatches: Positive = Field(1, description="optimizer steps a pass")
    whiten_advantages: bool = Field(True, description="zero mean, unit variance, global over DP")


class GrpoAlgorithm(AlgorithmSection):
    compares_answers = labels_answers = loss_reads_label = counts_tokens = True
    kind: Literal["grpo"] = "grpo"
    clip_eps: PositiveFloat = Field(0.2, description="the ratio's clip range below 1")
    clip_eps_high: PositiveFloat | None = Field(
        None, description="clip range above 1; null: as clip_eps"
    )
    kl_coef: NonNegativeFloat = Field(0.04, description="weight of KL(pi, pi_ref) in the loss")
    kl_estimator: Literal["k2", "k3"] = Field("k3", description="KL estimator in the loss")
    scale_rewards: bool = Field(
        True, description="divide advantages by the group's standard deviation"
    )
    length_normalise: Literal["token", "sequence"] = Field(
        "token", description="mean over all tokens, or over answers of their tokens' means"
    )
    epochs: Positive = Field(1, description="passes over a rollout")
    minibatches: Positive = Field(1, description="optimizer steps a pass")


class DpoAlgorithm(AlgorithmSection):
    compares_answers = True
    data_formats = ("prompts", "pairs")
    rows_together = 2
    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(0.1, description="temperature of eq. 6 and 15")
    form: Literal["inside", "pair"] = Field(
        "inside", description="mask inside the log-ratio sums, or eq. 15 as printed"
    )
    pairs: Literal["best_worst", "all_pairs", "margin"] = Field(
        "best_worst",
        description="a prompt's pairs: its best and worst answer; all that are not tied; those "
        "whose rewards differ by more than pair_margin",
    )
    pair_margin: NonNegativeFloat = Field(
        0.0, description="least difference for pairs: margin, raw reward units"
    )
    minibatches: Positive = Field(1, description="optimizer steps a rollout")


class KtoAlgorithm(AlgorithmSection):
    labels_answers = loss_reads_label = True
    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = Field(0.1, description="how fast the value saturates, 1 / nats")
    desirable_weight: NonNegativeFloat = Field(1.0, description="lambda_D, of chosen answers")
    undesirable_weight: NonNegativeFloat = Field(1.0, description="lambda_U, of rejected answers")
    minibatches: Positive = Field(1, description="optimizer steps a rollout")


class RejectionSamplingAlgorithm(AlgorithmSection):
    compares_answers = counts_tokens = True
    data_formats = ("prompts", "pairs")
    kind: Literal["rejection_sampling"] = "rejection_sampling"
    kl_coef: NonNegativeFloat = Field(0.05, description="weight of KL(pi || pi_ref), eq. 16")
    kl_estimator: Literal["k2", "k3"] = Field("k2", description="KL estimator in the loss")
    select: Literal["best", "top_k", "threshold"] = Field(
        "best",
        description="answers to learn from: each prompt's best, its k best, or those with a "
        "reward of at least threshold",
    )
    k: Positive = Field(1, description="answers a prompt for select: top_k")
    threshold: AnyFloat = Field(
        0.0, description="least reward of an answer for select: threshold, raw reward units"
    )
    control: Literal["none", "random"] = Field(
        "none",
        description="random: as many answers of each prompt as select picks, but by chance",
    )
    minibatches: Positive = Field(1, description="optimizer steps a rollout")


Algorithm = Annotated[
    PrmAlgorithm
    | OrmAlgorithm
    | PpoAlgorithm
    | GrpoAlgorithm
    | DpoAlgorithm
    | KtoAlgorithm
    | RejectionSamplingAlgorithm,
    Field(discriminator="kind"),
]
