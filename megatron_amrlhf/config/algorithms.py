"""The ``algorithm`` section: one model a kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field

from megatron_amrlhf.config.algorithm_section import (
    AlgorithmSection,
    Pass,
    PolicySection,
    RewardModelSection,
    unread,
)
from megatron_amrlhf.config.data_section import STEP_FORMATS
from megatron_amrlhf.config.section import (
    AnyFloat,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rows,
    one_of,
)

if TYPE_CHECKING:
    from megatron_amrlhf.config.schema import Config


class PrmAlgorithm(RewardModelSection):
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

    @property
    def num_outputs(self) -> int:
        return self.num_attributes


class OrmAlgorithm(RewardModelSection):
    data_formats = ("pairs",)
    rows_together = 2
    kind: Literal["orm"] = "orm"
    batch_size: Rows = Field(16, description="pairs an optimizer step, over all DP ranks")


class SurrogateSection(PolicySection):
    """A kind whose clipped surrogate allows several passes over a rollout."""

    minibatches: Positive = Field(1, description="optimizer steps a pass")
    epochs: Positive = Field(1, description="passes over a rollout")

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.minibatches

    def reads_policy(self, config: Config) -> bool:
        """The ratio does, but where the policy that sampled every answer is the one that learns."""
        is_on_policy = (
            self.updates_per_step == 1 and not config.rollout.reference_samples_per_prompt
        )
        return not is_on_policy or super().reads_policy(config)


class CriticSection(SurrogateSection):
    """A kind with a critic, whose values are discounted sums of rewards."""

    has_critic = True
    gamma: Fraction = Field(1.0, description="discount")
    gae_lambda: Fraction = Field(0.95, description="lambda of GAE")
    bootstrap_truncated: bool = Field(
        False,
        description="an answer cut off at the length limit goes on with the critic's value of its "
        "last state; false: it ends there with value 0",
    )


class PpoAlgorithm(CriticSection):
    labels_answers = counts_tokens = True
    kind: Literal["ppo"] = "ppo"
    clip_eps: PositiveFloat = Field(0.2, description="epsilon of eq. 14")
    value_clip_eps: PositiveFloat = Field(0.2, description="clip range of the value loss")
    kl_coef: NonNegativeFloat = Field(0.05, description="weight of KL(pi, pi_ref)")
    kl_in: Literal["reward", "loss"] = Field(
        "reward", description="the KL is a penalty in the token reward or a term of the loss"
    )
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        "k1", description="KL estimator: k1 or abs in the reward, k2 or k3 in the loss"
    )
    whiten_advantages: bool = Field(True, description="zero mean, unit variance, global over DP")

    def reads_policy(self, config: Config) -> bool:
        return (self.kl_in == "reward" and self.kl_coef > 0) or super().reads_policy(config)

    def problems(self, config: Config) -> Iterator[str]:
        place, estimator = self.kl_in, self.kl_estimator
        meant = {"reward": ("k1", "abs"), "loss": ("k2", "k3")}[place]
        if estimator not in meant:
            yield (
                f"algorithm.kl_estimator: {estimator} in the {place} does not pull towards the "
                f"reference: use {' or '.join(meant)} with algorithm.kl_in: {place}"
            )
        if self.bootstrap_truncated and config.rollout.truncated == "mask":
            reader = "rollout.truncated: keep or penalise"
            yield unread("algorithm.bootstrap_truncated", reader, config.rollout.truncated)


class GrpoAlgorithm(SurrogateSection):
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

    def label_problems(self, config: Config) -> Iterator[str]:
        if config.mask.label != "group":
            yield (
                f"mask.label: {config.mask.label} is not for grpo, where the group-relative "
                "advantage decides: use group"
            )
        else:
            yield from super().label_problems(config)


class DpoAlgorithm(PolicySection):
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

    @property
    def implicit_beta(self) -> float:
        return self.beta

    def most_rows(self, samples: int) -> int:
        return 2 if self.pairs == "best_worst" else samples * (samples - 1)

    def problems(self, config: Config) -> Iterator[str]:
        if config.is_offline and self.pairs != "best_worst":
            yield _not_offline("algorithm.pairs", self.pairs)
        if self.pair_margin and self.pairs != "margin":
            yield unread("algorithm.pair_margin", "algorithm.pairs: margin", self.pairs)


class KtoAlgorithm(PolicySection):
    labels_answers = loss_reads_label = True
    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = Field(0.1, description="how fast the value saturates, 1 / nats")
    desirable_weight: NonNegativeFloat = Field(1.0, description="lambda_D, of chosen answers")
    undesirable_weight: NonNegativeFloat = Field(1.0, description="lambda_U, of rejected answers")

    @property
    def implicit_beta(self) -> float:
        return self.beta

    def problems(self, config: Config) -> Iterator[str]:
        if not (self.desirable_weight or self.undesirable_weight):
            yield (
                "algorithm.desirable_weight, algorithm.undesirable_weight: nothing is learned with "
                "both 0, set one above 0"
            )
        if config.rollout.prompts_per_step < 2:
            yield (
                "rollout.prompts_per_step: kto's reference point pairs a prompt with an answer to "
                f"another one, use at least 2 (got {config.rollout.prompts_per_step})"
            )

    def more_passes(self, answers: int) -> Iterator[Pass]:
        """The mismatched pairs of the reference point."""
        for role in ("reference", "actor"):
            yield Pass("score", role, answers)


class RejectionSamplingAlgorithm(PolicySection):
    compares_answers = counts_tokens = True
    rejects_answers = False
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

    def fewest_units(self, samples: int) -> int:
        return self.k

    def most_rows(self, samples: int) -> int:
        return samples if self.select == "threshold" else self.k

    def problems(self, config: Config) -> Iterator[str]:
        select, samples = self.select, config.rollout.samples_per_prompt
        if config.is_offline:
            if select != "best":
                yield _not_offline("algorithm.select", select)
            if self.control != "none":
                yield _not_offline("algorithm.control", self.control)
        if self.k != 1 and select != "top_k":
            yield unread("algorithm.k", "algorithm.select: top_k", select)
        if self.threshold and select != "threshold":
            yield unread("algorithm.threshold", "algorithm.select: threshold", select)
        if self.k > samples:
            yield (
                f"algorithm.k = {self.k} is more than the answers to a prompt: use at most "
                f"rollout.samples_per_prompt = {samples}"
            )


def _not_offline(key: str, found: str) -> str:
    return f"{key}: the pairs of data.format: pairs are given (got {found}), leave it out"


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


def algorithm_models() -> dict[str, type[AlgorithmSection]]:
    """Maps each allowed ``algorithm.kind`` to its section's model."""
    union = get_args(get_args(Algorithm)[0])
    return {get_args(model.model_fields["kind"].annotation)[0]: model for model in union}


def kinds_that(flag: str) -> str:
    """The kinds whose section has ``flag`` set, such as ``ppo, grpo or kto``."""
    return one_of([kind for kind, model in algorithm_models().items() if getattr(model, flag)])
