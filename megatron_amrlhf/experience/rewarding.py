"""Rewards of answers: PRM, ORM and verified answers, weighted; failures never become numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.data.token_text import answer_text
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.reward_models import RewardModel
from megatron_amrlhf.experience.rewards import (
    JUDGED,
    Rewards,
    Verdicts,
    not_finite,
    without_failures,
)
from megatron_amrlhf.experience.scoring import read_reward, score_tokens
from megatron_amrlhf.experience.sequence_rewards import sequence_rewards
from megatron_amrlhf.experience.translation import read_back, translate
from megatron_amrlhf.rewards.judge.outcomes import REASONS
from megatron_amrlhf.rewards.marking import AnswerSteps
from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.rewards.verifiable import Verdict, Verifier
from megatron_amrlhf.types import PromptBatch, RolloutBatch

NO_REFERENCE = Verdict(None, "no_reference", "no reference answer")


class Rewarder:
    """Scores answers by every reward that has a weight.

    Args:
        context: the run; its engine has a role for each of ``models``.
        models: from `load_reward_models`.
    """

    def __init__(self, context: Context, models: tuple[RewardModel, ...]):
        self.context, self.models = context, models
        reward, self.cut_steps = context.config.reward, None
        if reward.granularity == "step" or reward.outcome != "tokens":
            self.cut_steps = StepCutter(context.tokenizer, reward.step_boundary)
        self.verifier = Verifier(reward.verify_seconds)

    @property
    def roles(self) -> frozenset[str]:
        """Of its reward models, ``prm`` or ``orm``."""
        return frozenset(model.role for model in self.models)

    def score(
        self,
        rollout: RolloutBatch,
        prompts: PromptBatch,
        given: Tensor | None = None,
    ) -> Rewards | None:
        """Rewards on last stages, None elsewhere. Entered by every rank.

        Args:
            rollout: the answers.
            prompts: their prompts.
            given: ``[B, R]`` raw rewards that stand for a PRM's; read on last stages.
        """
        of_models = {
            model.role: model_rewards(self.context, model, rollout, prompts)
            for model in self.models
        }
        if not self.context.mesh.is_last_stage:
            return None
        found = {role: x for role, x in of_models.items() if x is not None}
        weights, device = self.context.config.reward, self.context.mesh.device
        if given is not None:
            found["prm"] = given.to(device)
        valid = rollout.response_mask.to(device)
        tokens = torch.zeros(valid.shape, device=device)
        sequences, problem = torch.zeros(valid.shape[0], device=device), ""
        wrong = {role: _num_not_finite(x, valid) for role, x in found.items()}
        broken = next((role for role, count in wrong.items() if count), "")
        not_judged = torch.full((valid.shape[0],), JUDGED, device=device)
        if "prm" in found:
            tokens += weights.prm_weight * found["prm"]
            sequences += weights.prm_weight * sequence_rewards(
                self.context, rollout, found["prm"], valid, self.cut_steps
            )
        if "orm" in found:
            # read_reward gives an outcome model's one reward to all tokens: any would do.
            last = (valid.sum(dim=1) - 1).clamp(min=0)[:, None]
            sequences += (whole := weights.orm_weight * found["orm"].gather(1, last)[:, 0])
            tokens += whole[:, None]
        if weights.verifiable_weight:
            # NaN where an answer is not judged: without_failures then takes all of it out.
            verdicts = self.verdicts(rollout, prompts)
            sequences += (whole := weights.verifiable_weight * verdicts.rewards)
            tokens += whole[:, None]
            not_judged, problem = verdicts.not_judged, verdicts.problem
        problem = not_finite(broken) or problem
        rewards = without_failures(tokens, sequences, valid, not_judged, problem)
        return replace(rewards, broken=broken, num_broken=wrong.get(broken, 0))

    def verdicts(self, rollout: RolloutBatch, prompts: PromptBatch) -> Verdicts:
        """Whether answers meet their prompts' reference answers, the same on all tensor ranks.

        Entered by a last stage's ranks.
        """
        mesh, found, problem = self.context.mesh, [], ""
        first = int(prompts.group_ids[0]) if len(prompts.texts) else 0
        for row, length, group, ended in zip(
            rollout.rows,
            rollout.prompt_lengths.tolist(),
            rollout.group_ids.tolist(),
            rollout.ended.tolist(),
            strict=True,
        ):
            # Judging has a time limit, so two ranks could differ: one judges, the others make room.
            if mesh.tp_rank != 0:
                found.append((0.0, JUDGED))
                continue
            text = answer_text(self.context.tokenizer, row[length:].tolist(), ended)
            # The ids of a replica's prompts are consecutive.
            gold = prompts.answers[group - first]
            verdict = NO_REFERENCE if gold is None else self.verifier.judge(gold, text)
            if verdict.reward is None:
                found.append((torch.nan, REASONS.index(verdict.reason)))
            else:
                found.append((verdict.reward, JUDGED))
            problem = problem or verdict.problem
        verdicts = torch.tensor(found, dtype=torch.float32, device=mesh.device)
        verdicts = verdicts.reshape(len(found), 2)
        if mesh.tp_size > 1:
            source = dist.get_process_group_ranks(mesh.tp_group)[0]
            dist.broadcast(verdicts, source, group=mesh.tp_group)
        return Verdicts(verdicts[:, 0], verdicts[:, 1].long(), problem)


def model_rewards(
    context: Context,
    model: RewardModel,
    rollout: RolloutBatch,
    prompts: PromptBatch,
    steps: Sequence[AnswerSteps | None] | None = None,
) -> Tensor | None:
    """``[B, R]`` a reward model's raw reward at the policy's tokens (last stages; else None).

    A model with another tokenizer reads the same text in its own tokens, one with a step marker
    each step with the marker after it. Entered by every rank.

    Args:
        context: the run.
        model: which one; its role is in the engine.
        rollout: the answers.
        prompts: their prompts.
        steps: of each answer, where they are known; else newlines end them. Read with a marker.
    """
    read = read_reward(context, model.role)
    if model.tokenizer is None and model.marker is None:
        scores = score_tokens(context, model.role, rollout, "at", read)
    else:
        system = context.config.data.system_prompt
        mine, own = context.tokenizer, model.tokenizer or context.tokenizer
        texts = translate(
            rollout, prompts, mine, own, system_prompt=system, marker=model.marker, steps=steps
        )
        scores = score_tokens(context, model.role, texts.rollout, "at", read)
        scores = None if scores is None else read_back(scores, texts, rollout)
    if scores is None or model.role != "prm":
        return scores
    return end_as_before(scores, rollout)


def end_as_before(scores: Tensor, rollout: RolloutBatch) -> Tensor:
    """``[B, R]`` scores whose end tokens have the score of the token before them.

    A PRM judges steps, and an end token belongs to none: it has learned nothing there. An answer
    that is nothing but its end token keeps its score.
    """
    last = (rollout.response_lengths - 1)[:, None].to(scores.device)
    before = torch.where(rollout.ended.to(scores.device)[:, None], last - 1, last).clamp(min=0)
    return scores.scatter(1, last, scores.gather(1, before))


def _num_not_finite(rewards: Tensor, valid: Tensor) -> int:
    """Answers that have a reward ``[B, R]`` that is not finite."""
    return int((valid & ~rewards.isfinite()).any(dim=1).sum())
