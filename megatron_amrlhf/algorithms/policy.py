"""What all algorithms on answers have in common around their own ``choose`` and ``learn``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.update import A, LossFunction, optimizer_step, response_places
from megatron_amrlhf.config.algorithm_section import PolicySection
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.lazy_rows import Rows, highest_rows
from megatron_amrlhf.data.order import DataPosition
from megatron_amrlhf.data.prompts import EncodedPrompt, load_prompts
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.data.scored_pairs import ScoredPair, load_scored_pairs
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.heldout import evaluate_policy
from megatron_amrlhf.experience.maker import Experience, ExperienceMaker
from megatron_amrlhf.experience.masking import broadcast_mask, broadcast_rows
from megatron_amrlhf.experience.pairs import PairSource, evaluate_pairs
from megatron_amrlhf.experience.reward_models import (
    answer_check,
    lack_ids,
    load_offline_scores,
    load_reward_models,
)
from megatron_amrlhf.experience.rewarding import Rewarder
from megatron_amrlhf.experience.sample_log import log_samples
from megatron_amrlhf.experience.scoring import read_logprobs
from megatron_amrlhf.experience.sources import AnswerSource, RolloutSource, make_generator
from megatron_amrlhf.losses.reduce import Metrics, kl_scale
from megatron_amrlhf.losses.targets import AnswerTargets, KlTargets
from megatron_amrlhf.types import MaskedBatch, TrainBatch

S = TypeVar("S", bound=PolicySection)
K = TypeVar("K", bound=KlTargets)


class PolicyAlgorithm(ABC, Generic[S]):
    """An algorithm that improves the actor by its own answers, or offline by those of a file.

    Subclasses choose answers and labels, and say what is learned from them.

    Attributes:
        section: the algorithm's own keys of the configuration.
    """

    evaluates_at_start = True

    context: Context  # set by build()

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, readers: Readers = ALONE
    ):
        """Checks the PRM's folder and the data. Entered by all ``readers``.

        Raises:
            UserError: the data or the PRM are wrong.
        """
        self.section, self.is_offline = cast(S, config.algorithm), config.is_offline
        self.reward_models = load_reward_models(config, tokenizer)
        self.offline = load_offline_scores(config, self.reward_models)
        readers = replace(readers, exact=readers.exact or lack_ids(self.reward_models, tokenizer))
        self.train_data, selection = self.load(config.data.train, config, tokenizer, readers)
        self.selections = [selection]
        self.heldout_data: Rows[EncodedPrompt] | Rows[ScoredPair] | tuple[()] = ()
        if config.data.heldout is not None:
            self.heldout_data, selection = self.load(
                config.data.heldout, config, tokenizer, readers, reads_scores=False
            )
            self.selections.append(selection)
        per_step = config.rollout.prompts_per_step
        self.total_steps = config.run.steps or -(-len(self.train_data) // per_step)
        self.position = DataPosition(
            config.data.train, len(self.train_data), config.run.seed, per_step
        )

    def load(
        self,
        path: str,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        readers: Readers,
        reads_scores: bool = True,
    ) -> tuple[Rows[EncodedPrompt] | Rows[ScoredPair], Selection]:
        """Prompts, or the pairs that are learned from offline, and what became of the rows.

        Entered by all ``readers``. Held-out pairs may do without scores, which are for the mask.

        Raises:
            UserError: the data are wrong.
        """
        if not self.is_offline:
            return load_prompts(path, tokenizer, config.data, readers, answer_check(config))
        reads_rewards = config.mask.kind == "adaptive" and config.mask.signal == "reward"
        has_prm = config.reward_model.path is not None
        needs_scores = (
            reads_scores and reads_rewards and config.reward.prm_weight > 0 and not has_prm
        )
        weights = config.reward_model.attribute_weights
        return load_scored_pairs(
            path,
            tokenizer,
            config.data,
            attribute_weights=weights,
            needs_scores=needs_scores,
            readers=readers,
        )

    def highest_rows(self) -> list[Tensor]:
        """Rows of prompts or pairs with the largest ids, see `highest_rows`."""
        return highest_rows(self.train_data, self.heldout_data)

    def build(self, context: Context) -> None:
        """Adds the roles. Entered by every rank."""
        self.context, optim = context, context.config.optimizer
        context.log_selections(self.selections)
        algorithm, folder = self.section, context.model_folder
        at_once = algorithm.updates_per_step
        length = {"total_steps": self.total_steps * at_once, "steps_at_once": at_once}
        for role in algorithm.roles(context.config):
            rate = (optim.critic_lr if role.name == "critic" else None) or optim.lr
            training = {"learning_rate": rate, **length} if role.trainable else {}
            context.role(role.name, folder, role.head_outputs, **training)
        for model in self.reward_models:
            context.role(model.role, model.folder, model.num_attributes)
        rewarder = Rewarder(context, self.reward_models)
        self.maker = ExperienceMaker(
            context,
            temperature=self.logprob_temperature(),
            rewarder=rewarder,
            offline=self.offline,
        )
        self.source: AnswerSource
        if self.is_offline:
            pairs, roles = cast(Rows[ScoredPair], self.train_data), rewarder.roles
            self.source = PairSource(context, pairs, self.position, roles)
        else:
            prompts = cast(Rows[EncodedPrompt], self.train_data)
            self.source = RolloutSource(context, prompts, self.position, make_generator(context))

    def logprob_temperature(self) -> float:
        """Softmax temperature of the log-probs that the loss reads."""
        return 1.0

    @abstractmethod
    def choose(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        """Indices of the answers to learn from and their labels ``[S]`` bool, on a last stage.

        Replicas may choose different numbers of answers, none too.
        """

    @abstractmethod
    def targets(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience
    ) -> tuple[AnswerTargets, Metrics]:
        """What the losses read of the answers at ``rows``, and metrics, on a last stage.

        Args:
            batch: these answers with their mask and labels.
            rows: ``[S]`` int64, where they are among all answers.
            experience: of all answers.
        """

    @abstractmethod
    def update(self, train: TrainBatch, step: int) -> tuple[Metrics, dict[str, float]]:
        """All optimizer steps on one rollout. Entered by every rank.

        Returns (sum, count) metrics of the last stage, and plain engine metrics of every rank.
        """

    def step(self, step: int) -> dict[str, float]:
        """Rollout, score, cut, choose, mask, advantage, update. Entered by every rank.

        Returns the metrics of the step, the same on every rank.
        """
        context, source, maker = self.context, self.source, self.maker
        context.seconds.clear()
        prompts = source.prompts(step)
        answers = source.answers(prompts, step)
        scored, metrics = maker.score(answers, prompts, step, source.rewards(answers))
        experience = picked = None
        with context.phase("mask"):
            if scored is not None:  # on a last stage, which broadcasts what it has picked
                experience = maker.cut(answers, scored)
                picked, mask_metrics = maker.mask(experience, *self.choose(experience, step))
                metrics |= mask_metrics
            # Rows first: from them the other stages know the shape of the mask.
            rows = broadcast_rows(context, picked)
            batch = broadcast_mask(context, answers.select(rows), picked)
        log_samples(context, step, prompts=prompts, experience=experience, rows=rows, batch=batch)
        with context.phase("update"):
            train, advantage_metrics = self.train_batch(batch, rows, experience)
            learned, engine_metrics = self.update(train, step)
        known = {x: y for x, y in metrics.items() if not x.startswith(source.unknown_metrics)}
        published = context.publish(known | advantage_metrics | learned)
        updated = sum(row.numel() for row in batch.rollout.rows)
        timings = context.timings(updated, int(answers.response_lengths.sum()))
        return published | engine_metrics | timings

    def train_batch(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience | None
    ) -> tuple[TrainBatch, Metrics]:
        """The rows of the updates with their targets, these on last stages. Entered by every rank.

        Args:
            batch: the answers to learn from.
            rows: ``[S]`` int64, where they are among all answers.
            experience: of all answers; None but on last stages.
        """
        if experience is None:
            return TrainBatch.of(batch, None), {}
        targets, metrics = self.targets(batch, rows, experience)
        return TrainBatch.of(batch, targets), metrics

    @property
    @abstractmethod
    def reads_kept_alone(self) -> bool:
        """Whether the policy's loss reads nothing but kept tokens, so that others may be cut."""

    def policy_step(self, part: TrainBatch[A], loss: LossFunction[A]):
        """One optimizer step of the policy on a loss of its log-probs. Entered by every rank."""
        read = read_logprobs(self.context, self.logprob_temperature())
        cut = part.trim_to_kept() if self.reads_kept_alone else part
        at = response_places(cut)
        together = self.section.rows_together
        result, metrics = optimizer_step(
            self.context,
            "actor",
            cut,
            at,
            read,
            loss=loss,
            name="policy",
            together=together,
        )
        tokens, all_tokens = (sum(row.numel() for row in x.rows) for x in (cut, part))
        return result, metrics | {"mask/updated_fraction": count_metric(tokens, all_tokens)}

    def with_kl_scale(self, part: TrainBatch[K], by_row: bool = False) -> TrainBatch[K]:
        """An optimizer step's rows with the ``kl_scale`` of a KL in the loss.

        Entered by every last-stage rank; elsewhere nothing changes.
        """
        if part.targets is None:
            return part
        valid, mask = part.targets.valid, part.targets.mask
        if self.context.config.loss.denominator == "response":  # nothing to make up for
            scale = torch.ones(len(valid), 1, device=valid.device)
        else:
            scale = kl_scale(mask, valid, by_row, self.context.mesh.dp_group)
        return replace(part, targets=replace(part.targets, kl_scale=scale))

    def evaluate(self) -> dict[str, float]:
        """How good the policy is on held-out prompts or pairs. Entered by every rank."""
        if isinstance(self.source, RolloutSource):
            prompts = cast(Rows[EncodedPrompt], self.heldout_data)
            return evaluate_policy(
                self.context, self.source.generator, self.maker.rewarder, prompts
            )
        pairs = cast(Rows[ScoredPair], self.heldout_data)
        return evaluate_pairs(self.context, pairs, self.logprob_temperature())

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the roles; equal on all last-stage ranks."""
        return {
            "running_baseline": self.maker.running.state_dict(),
            "offline": self.offline and self.offline.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what ``state_dict`` gave.

        Raises:
            UserError: the scored data set is another one and may not be.
        """
        self.maker.running.load_state_dict(state["running_baseline"])
        config = self.context.config
        if self.offline and not config.checkpoint.accept_changed_data:
            assert config.mask.offline_file is not None, "it was read"
            self.offline.check_same(state.get("offline"), config.mask.offline_file)


def all_rows(experience: Experience) -> Tensor:
    """Indices of all answers."""
    return torch.arange(len(experience.rollout.rows))
