"""The run configuration: one frozen pydantic model a YAML section, one default in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_amrlhf.config.algorithms import Algorithm
from megatron_amrlhf.config.layout import EngineSection, ParallelSection
from megatron_amrlhf.config.section import (
    AnyFloat,
    Fraction,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rows,
    Section,
    Seed,
    Tokens,
)
from megatron_amrlhf.files import expanded

Dtype = Literal["auto", "float32", "bfloat16"]
REWARD_ROLES = ("prm", "orm")


class RunSection(Section):
    name: Name = Field(description="name of the run; its folder is runs/NAME")
    folder: Name = Field("runs", description="folder that holds the run folders")
    seed: Seed = Field(0, description="seed of data order, sampling and head initialisation")
    steps: Positive | None = Field(
        None,
        description="optimizer (prm, orm) or rollout (others) steps; null: all of the data, by prm "
        "and orm algorithm.epochs times",
    )
    max_minutes: PositiveFloat | None = Field(
        None,
        description="an attempt saves and leaves with exit code 75 before it has run for so long, "
        "from the start of its processes; it leaves room for another step and for saving, as "
        "measured; null: no limit",
    )
    log_samples: NonNegative = Field(
        8,
        description="answers a step written to samples.jsonl, the first ones of the first replica, "
        "whether they are learned from or not",
    )

    @property
    def path(self) -> Path:
        """The run's folder."""
        return expanded(self.folder) / self.name


class ModelSection(Section):
    path: Name = Field(
        description="Hugging Face folder, hub id, .gguf file, or pip:PACKAGE that ships a .gguf"
    )
    dtype: Dtype = Field(
        "auto",
        description="dtype of weights and activations; masters and moments are float32; auto: "
        "bfloat16 on GPUs that have it and on CPUs with AVX512-BF16 or AMX, else float32; a "
        "resumed run keeps what it began with",
    )
    cache_folder: Name = Field(
        "~/.cache/megatron_amrlhf", description="where converted GGUF models are kept"
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


class OptimizerSection(Section):
    lr: PositiveFloat = Field(1e-6, description="peak learning rate of AdamW")
    critic_lr: PositiveFloat | None = Field(None, description="the critic's; null: as lr")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False, description="AdamW betas")
    eps: Annotated[float, Field(ge=1e-30, le=1, strict=False)] = Field(
        1e-8, description="AdamW epsilon"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW weight decay")
    max_grad_norm: NonNegativeFloat = Field(
        1.0, description="global norm to clip at; 0: no clipping"
    )
    warmup_steps: NonNegative = Field(0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="decay after warm-up, to 0 over the run's optimizer steps; a resumed run with "
        "another number of them spreads what is left of the decay over those that are left",
    )


class DataSection(Section):
    train: Name = Field(
        description="JSONL file: step-labelled problems (prm), pairs (orm, offline dpo and "
        "rejection_sampling) or prompts (others)"
    )
    heldout: Name | None = Field(None, description="JSONL file of the same kind for evaluation")
    format: Literal[
        "auto",
        "steps",
        "prm800k",
        "math_shepherd",
        "helpsteer",
        "helpsteer_sentences",
        "pairs",
        "prompts",
    ] = Field(
        "prompts",
        description="steps: {prompt, steps, labels}; prm800k, math_shepherd, helpsteer (whole "
        "answers) and helpsteer_sentences: as published; pairs: {prompt, chosen, rejected}; "
        "prompts: {prompt}; auto: by the first line, for prm",
    )
    on_wrong_row: Literal["stop", "skip"] = Field(
        "stop",
        description="a row that is wrong or too long: stop with its file and line, or leave it "
        "out, counted and logged; a line that is no JSON object stops the start anyway",
    )
    ignored_keys: tuple[Name, ...] = Field(
        (),
        strict=False,
        description="keys of rows that are not to be read, such as system or history, or that "
        "could change what a row means (tools, images, context, weight) and are refused unless "
        "they stand here",
    )
    screening_rows: Literal["drop", "keep"] = Field(
        "drop", description="quality-control and initial-screening rows of prm800k; counted"
    )
    alternatives: bool = Field(
        True, description="prm800k: also learn from completions that were not chosen"
    )
    input_mark: str = Field(
        "\u043a\u0438",
        description="math_shepherd: what follows each step in the file",
        min_length=1,
    )
    step_separator: str = Field(
        "\n", description="text that a PRM is trained with between steps; empty: nothing"
    )
    step_marker: str | None = Field(
        None,
        description="token that a PRM is trained with after each step, at which it is judged, such "
        "as <extra_0>; null: a step is judged at its own last token",
    )
    system_prompt: str | None = Field(None, description="system message put before each prompt")
    max_prompt_tokens: Tokens = Field(512, description="longer prompts are refused")
    max_row_tokens: Tokens = Field(4096, description="longer prompt + response rows are refused")

    @property
    def skips_wrong_rows(self) -> bool:
        """Whether a wrong row is left out, counted, instead of stopping the start."""
        return self.on_wrong_row == "skip"


class EvaluationSection(Section):
    prompts: NonNegative = Field(
        32,
        description="held-out prompts answered before and after the run (0: none); prm and orm are "
        "evaluated on all held-out rows, after the run",
    )
    every: NonNegative = Field(0, description="also evaluate each N steps (0: start and end only)")


class RolloutSection(Section):
    """Sampling, defaults of the paper's appendix B."""

    prompts_per_step: Rows = Field(
        8, description="prompts (offline: pairs) a step, over all DP ranks"
    )
    samples_per_prompt: Rows = Field(8, description="answers a prompt, of policy and reference")
    reference_samples_per_prompt: NonNegative = Field(
        0, description="how many of the answers the reference samples (the rest: the policy)"
    )
    max_new_tokens: Tokens = Field(1024, description="longest answer, tokens")
    temperature: NonNegativeFloat = Field(0.95, description="softmax temperature; 0: greedy")
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] = Field(
        0.99, description="nucleus probability mass"
    )
    top_k: NonNegative = Field(100, description="keep the k likeliest tokens (0: all)")
    micro_batch_size: Positive = Field(16, description="rows a decoding micro-batch")
    truncated: Literal["keep", "mask", "penalise"] = Field(
        "keep",
        description="answers cut off at the length limit: learned from as others; mask: in no "
        "mask, loss, mean, deviation or threshold, neither chosen nor picked; penalise: as others "
        "with truncated_penalty less reward",
    )
    truncated_penalty: PositiveFloat = Field(
        1.0,
        description="what truncated: penalise takes off an answer's reward, at all its tokens "
        "alike, raw reward units; evaluation does not read it",
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


class MaskSection(Section):
    kind: Literal["adaptive", "none"] = Field(
        "adaptive", description="adaptive: eq. 13; none: the plain algorithm"
    )
    signal: Literal["reward", "td_error", "advantage", "implicit"] = Field(
        "reward", description="the dense signal R(x, y_t) that is cut"
    )
    threshold: Literal["fixed", "offline", "running", "batch", "sequence", "group"] = Field(
        "batch", description="where the baseline b comes from; statistics are global over DP"
    )
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


class LossSection(Section):
    denominator: Literal["response", "kept"] = Field(
        "response",
        description="divide by all response tokens or kept ones, counted globally; a KL in the "
        "loss is always a mean over response tokens",
    )


class CheckpointSection(Section):
    every: NonNegative = Field(0, description="also save each N steps (0: only at the end)")
    keep: Positive = Field(2, description="complete checkpoints kept")
    keep_gib: PositiveFloat | None = Field(
        None, description="GiB that they may take together; the newest always stays"
    )
    asynchronous: bool = Field(
        False,
        description="write while training goes on, from a copy in host memory (12 bytes for each "
        "parameter of a trained role over the ranks)",
    )
    accept_changed_data: bool = Field(
        False,
        description="resume although data.train, run.seed or the scores of mask.offline_file are "
        "not the checkpoint's",
    )
    resume: bool = Field(
        True,
        description="go on from the newest checkpoint of the run; false: from the start, "
        "earlier checkpoints, metrics and samples are set aside, in *-before-attempt-N (a job that "
        "Slurm has requeued goes on from its own all the same); the export is replaced",
    )
    export: bool = Field(
        True, description="write the trained model as a Hugging Face folder at the end"
    )


class Config(Section):
    """A whole run. See configs/ for examples and ``amrlhf train --help`` for each key."""

    run: RunSection
    model: ModelSection
    algorithm: Algorithm
    data: DataSection
    reward_model: RewardModelSection = RewardModelSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    optimizer: OptimizerSection = OptimizerSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    mask: MaskSection = MaskSection()
    loss: LossSection = LossSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @property
    def is_offline(self) -> bool:
        """Whether it learns from the answers of a file and samples none."""
        return self.data.format == "pairs" and not self.algorithm.trains_reward_model

    @property
    def reward_folders(self) -> dict[str, str]:
        """Folders of the reward models that a run on answers loads, by role."""
        if self.algorithm.trains_reward_model:
            return {}
        section, weights = self.reward_model, self.reward
        found = {
            "prm": section.path if weights.prm_weight else None,
            "orm": section.orm_path if weights.orm_weight else None,
        }
        return {role: path for role, path in found.items() if path}

    def dtype_of(self, role: str) -> str:
        """The dtype of a role's weights, ``auto`` where it is not decided yet."""
        is_frozen_reward = role in REWARD_ROLES and not self.algorithm.trains_reward_model
        return (is_frozen_reward and self.reward_model.dtype) or self.model.dtype

    def with_dtypes(self, model: str, reward_model: str | None) -> Config:
        """A copy with these dtypes of the policy's roles and of the reward models."""
        return self.model_copy(
            update={
                "model": self.model.model_copy(update={"dtype": model}),
                "reward_model": self.reward_model.model_copy(update={"dtype": reward_model}),
            }
        )
