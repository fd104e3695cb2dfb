"""What PPO, DPO and rejection sampling have in common around their own ``learn``."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.algorithms.experience import ExperienceMaker, Judged
from megatron_amrlhf.algorithms.heldout import evaluate_policy
from megatron_amrlhf.algorithms.masking import share_index, share_mask
from megatron_amrlhf.algorithms.sample_log import log_samples
from megatron_amrlhf.data.chat import load_tokenizer
from megatron_amrlhf.data.prompts import load_prompts
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.models.source import ShardedWeights
from megatron_amrlhf.types import MaskedBatch


class PolicyAlgorithm(ABC):
    """An algorithm that improves the actor by its own answers.

    Subclasses choose answers and labels, and learn from the masked answers.
    """

    trained_role = "actor"
    has_critic = False

    def __init__(self, context: Context):
        config, self.context = context.config, context
        self.train_prompts = load_prompts(config.data.train, context.tokenizer, config.data)
        self.heldout_prompts = []
        if config.data.heldout is not None:
            self.heldout_prompts = load_prompts(config.data.heldout, context.tokenizer, config.data)
        self.prm_folder = Path(config.reward_model.path).expanduser()
        self.num_attributes = self._check_prm()
        per_step = config.rollout.prompts_per_step
        self.total_steps = config.run.steps or -(-len(self.train_prompts) // per_step)

    def _check_prm(self) -> int:
        """Attributes of the PRM; its tokens must be the policy's."""
        weights = ShardedWeights(self.prm_folder)
        if "head.weight" not in weights:
            raise UserError(
                f"reward_model.path: {self.prm_folder} has no reward head (head.weight): give the "
                "export folder of a run with algorithm.kind prm"
            )
        theirs = load_tokenizer(self.prm_folder).get_vocab()
        if theirs != self.context.tokenizer.get_vocab():
            raise UserError(
                f"reward_model.path: the tokenizer of {self.prm_folder} is not that of "
                f"{self.context.config.model.path}: train the PRM on the same model family"
            )
        attributes = weights.get("head.weight").shape[0]
        given = self.context.config.reward_model.attribute_weights
        if given is not None and len(given) != attributes:
            raise UserError(
                f"reward_model.attribute_weights: {len(given)} weights, but the PRM has "
                f"{attributes} attributes"
            )
        return attributes

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a role in one step."""
        return self.context.config.algorithm.minibatches

    def build(self) -> None:
        """Adds the roles. Entered by every rank."""
        context, optim = self.context, self.context.config.optimizer
        updates = self.total_steps * self.updates_per_step
        folder = context.model_folder
        context.role("actor", folder, learning_rate=optim.lr, total_steps=updates)
        if self.has_critic:
            rate = optim.critic_lr or optim.lr
            context.role("critic", folder, 1, learning_rate=rate, total_steps=updates)
        context.role("reference", folder)
        context.role("prm", self.prm_folder, self.num_attributes)
        self.maker = ExperienceMaker(context, self.train_prompts, self.logprob_temperature())

    def logprob_temperature(self) -> float:
        """Softmax temperature of the log-probs that the loss reads."""
        return 1.0

    @abstractmethod
    def choose(self, judged: Judged) -> tuple[Tensor, Tensor]:
        """Indices of the answers to learn from and their labels ``[B]`` bool, on a last stage."""

    @abstractmethod
    def num_chosen(self, judged: Judged) -> int:
        """How many answers ``choose`` gives; known on every rank."""

    @abstractmethod
    def learn(
        self, batch: MaskedBatch, rows: Tensor, judged: Judged, step: int
    ) -> tuple[Metrics, dict]:
        """Advantages or pairs, loss and update. Entered by every rank.

        Returns (sum, count) metrics of the last stage, and plain engine metrics of every rank.
        """

    def step(self, step: int) -> dict[str, float]:
        """One step: rollout, score, mask, learn. Entered by every rank; same result on all."""
        maker = self.maker
        prompts = maker.prompts_of(step)
        judged, metrics = maker.judge(prompts, step)
        start = time.perf_counter()
        index = mask = labels = None
        if self.context.mesh.is_last_stage:
            index, labels = self.choose(judged)
            mask, mask_metrics = maker.mask(judged, index, labels)
            metrics |= mask_metrics
        rows = share_index(self.context, index, (self.num_chosen(judged),))
        batch = share_mask(self.context, judged.rollout.select(rows), mask, labels)
        maker.seconds["mask"] += time.perf_counter() - start
        log_samples(self.context, step, prompts, judged, rows, batch)
        start = time.perf_counter()
        loss_metrics, engine_metrics = self.learn(batch, rows, judged, step)
        seconds = time.perf_counter() - start
        tokens = sum(row.numel() for row in batch.rollout.rows)
        timings = maker.timings(judged.rollout, seconds, tokens)
        return self.context.publish(metrics | loss_metrics) | engine_metrics | timings

    def evaluate(self) -> dict[str, float]:
        """Mean reward and accuracy of answers to held-out prompts. Entered by every rank."""
        return evaluate_policy(self.maker, self.heldout_prompts)

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the roles; equal on all last-stage ranks."""
        return {"running_baseline": self.maker.running.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.maker.running.load_state_dict(state["running_baseline"])


def all_rows(judged: Judged) -> Tensor:
    """Indices of all answers."""
    return torch.arange(len(judged.rollout.rows))
