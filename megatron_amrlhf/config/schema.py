"""The run configuration: one frozen pydantic model a YAML section, one default in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_amrlhf.config.algorithms import Algorithm
from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.config.judging import MaskSection, RewardModelSection, RewardSection
from megatron_amrlhf.config.layout import EngineSection, ParallelSection
from megatron_amrlhf.config.section import (
    Dtype,
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
    policy_metrics: Fraction = Field(
        0.25,
        description="share of the answers whose kl/ref_nats and policy/entropy_nats are measured "
        "where no loss or mask reads the policy's log-probs, which takes a forward pass; 0: none",
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
