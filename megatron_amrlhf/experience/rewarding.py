"""Rewards of answers: PRM, ORM and verified answers, weighted; failures never become numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.data.token_text import answer_text
from megatron_amrlhf.engine.integrity import NotFinite, not_finite_weights
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.reward_models import RewardModel
from megatron_amrlhf.experience.scoring import read_reward, score_tokens
from megatron_amrlhf.experience.sequence_rewards import sequence_rewards
from megatron_amrlhf.experience.translation import read_back, translate
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.parallel.collectives import broadcast_object_from_last_stage, gather_objects
from megatron_amrlhf.rewards.judge.outcomes import DOUBTS, REASONS
from megatron_amrlhf.rewards.marking import AnswerSteps
from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.rewards.verifiable import Verdict, Verifier
from megatron_amrlhf.types import PromptBatch, RolloutBatch

NO_REFERENCE = Verdict(None, "no_reference", "no reference answer")
JUDGED = -1  # in the place of a reason's number


@dataclass(frozen=True)
class Verdicts:
    """Whether answers meet their reference answers.

    Attributes:
        rewards: ``[B]`` 1, 0, or NaN where an answer is not judged.
        not_judged: ``[B]`` int64 place in ``REASONS`` of why it is not, ``JUDGED`` where it is.
        problem: the first one in words, or an empty text.
    """

    rewards: Tensor
    not_judged: Tensor
    problem: str


@dataclass(frozen=True)
class Rewards:
    """What the reward says about a batch of answers. On last stages only.

    Attributes:
        tokens: ``[B, R]`` weighted sum at each token, raw units; 0 outside ``valid``.
        sequences: ``[B]`` weighted sum of each answer; NaN if it failed.
        valid: ``[B, R]`` bool, response tokens of the answers whose reward did not fail.
        not_judged: ``[B]`` int64, of `Verdicts`; all judged where nothing is verified.
        problem: why the first failed answer failed, or an empty text.
        broken: role whose numbers are not finite, or an empty text.
        num_broken: answers for which they are not.
    """

    tokens: Tensor
    sequences: Tensor
    valid: Tensor
    not_judged: Tensor
    problem: str
    broken: str = ""
    num_broken: int = 0

    @property
    def failed(self) -> Tensor:
        """``[B]`` bool."""
        return ~self.valid.any(dim=1)

    @property
    def doubted(self) -> Tensor:
        """``[B]`` bool, where the reward failed for a doubt about the answer, not by a fault."""
        return (self.not_judged >= 0) & (self.not_judged < len(DOUBTS))

    def reasons(self) -> Metrics:
        """``not_judged/REASON``, the share of answers of each reason."""
        count = self.not_judged.numel()
        return {
            f"not_judged/{reason}": count_metric((self.not_judged == place).sum(), count)
            for place, reason in enumerate(REASONS)
        }

    def where_finite(self, **numbers: Tensor | None) -> Rewards:
        """These rewards where the roles' ``[B, R, ...]`` log-probs and values are finite too.

        Advantages and signals are made of them, and one NaN there would reach every baseline.
        """
        finite, broken, count = torch.ones_like(self.failed), self.broken, self.num_broken
        for role, found in numbers.items():
            if found is not None:
                is_finite = found.flatten(1).isfinite().all(dim=1)
                if not broken and not is_finite.all():
                    broken, count = role, int((~is_finite).sum())
                finite &= is_finite
        left = without_failures(
            self.tokens,
            torch.where(finite, self.sequences, torch.nan),
            self.valid,
            self.not_judged,
            self.problem or _not_finite(broken),
        )
        return replace(left, broken=broken, num_broken=count)

    def without(self, rows: Tensor) -> Rewards:
        """These rewards with the answers at ``rows`` (``[B]`` bool) as if they were not there."""
        return replace(
            self,
            tokens=self.tokens.masked_fill(rows[:, None], 0.0),
            sequences=self.sequences.masked_fill(rows, torch.nan),
            valid=self.valid & ~rows[:, None],
        )

    def less(self, amount: float, rows: Tensor) -> Rewards:
        """These rewards with ``amount`` taken off at all tokens of the answers at ``rows``."""
        is_there = rows[:, None] & self.valid
        return replace(
            self,
            tokens=torch.where(is_there, self.tokens - amount, self.tokens),
            sequences=torch.where(rows, self.sequences - amount, self.sequences),
        )


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
            last = (valid.sum(dim=1) - 1).clamp(min=0)[:, None]
            sequences += (whole := weights.orm_weight * found["orm"].gather(1, last)[:, 0])
            tokens += whole[:, None]
        if weights.verifiable_weight:
            verdicts = self.verdicts(rollout, prompts)
            sequences += (whole := weights.verifiable_weight * verdicts.rewards)
            tokens += whole[:, None]
            not_judged, problem = verdicts.not_judged, verdicts.problem
        problem = _not_finite(broken) or problem
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
            if mesh.tp_rank != 0:
                found.append((0.0, JUDGED))
                continue
            text = answer_text(self.context.tokenizer, row[length:].tolist(), ended)
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


def without_failures(
    tokens: Tensor, sequences: Tensor, valid: Tensor, not_judged: Tensor, problem: str
) -> Rewards:
    """Takes answers with a reward that is not finite out of the valid ones.

    Args:
        tokens: ``[B, R]`` rewards, NaN or infinite where one failed.
        sequences: ``[B]`` as this.
        valid: ``[B, R]`` bool, response tokens.
        not_judged: ``[B]`` int64, of `Verdicts`.
        problem: why the first one failed, if that is known.
    """
    finite = torch.where(valid, tokens, 0.0).isfinite().all(dim=1) & sequences.isfinite()
    if not problem and not finite.all():
        problem = "a reward model gave a number that is not finite"
    valid = valid & finite[:, None]
    return Rewards(
        tokens=torch.where(valid, tokens, 0.0),
        sequences=torch.where(finite, sequences, torch.nan),
        valid=valid,
        not_judged=not_judged,
        problem=problem,
    )


def stop_on_failures(context: Context, rewards: Rewards | None, step: int) -> None:
    """Tells of failed rewards of a step, and ends the run where they are too many.

    Answers that are in doubt (``not_judged/*``) do not end it: small steps have one now and then.
    They are told where they are as many. Entered by every rank.

    Raises:
        UserError: on every rank, more than ``reward.max_failed_fraction`` of all replicas' answers.
        NotFinite: as this, because of a model that has been trained.
    """
    found = None
    if rewards is not None:
        failed, doubted = rewards.failed.sum(), (rewards.failed & rewards.doubted).sum()
        mine = (int(failed - doubted), int(doubted), rewards.failed.numel(), rewards.problem)
        everyone = gather_objects(
            (*mine, rewards.broken, rewards.num_broken), context.mesh.dp_group
        )
        *counts, problems, roles, broken_rows = zip(*everyone, strict=True)
        problem, broken = (next(filter(None, x), "") for x in (problems, roles))
        count = sum(n for role, n in zip(roles, broken_rows, strict=True) if role == broken)
        found = (*map(sum, counts), problem, broken, count)
    failed, doubted, total, problem, broken, count = broadcast_object_from_last_stage(
        found, context.mesh
    )
    limit = context.config.reward.max_failed_fraction
    if broken and count > limit * total:
        _stop_on_a_broken_model(context, broken, step, f"{count} of {total} answers")
    what = f"step {step}: the reward of {failed} of {total} answers failed"
    if failed > limit * total:
        raise UserError(
            f"{what}, more than reward.max_failed_fraction = {limit:g} of them; "
            f"the first: {problem}"
        )
    if failed:
        context.console.line(f"{what}; the first: {problem}")
    elif doubted > limit * total:
        context.console.line(
            f"step {step}: {doubted} of {total} answers are not judged (not_judged/* says why); "
            f"the first: {problem}"
        )


def _stop_on_a_broken_model(context: Context, name: str, step: int, answers: str) -> None:
    """Ends the run because of a role's weights, or of what it makes of them. Entered by every rank.

    Raises:
        UserError: nothing was learned yet, or the role is not trained: it came like that.
        NotFinite: it has been trained to that.
    """
    role = context.engine.roles[name]
    if names := not_finite_weights(role):
        line = f"step {step}: the weights of the {name} are not finite: {names}"
    else:
        line = f"step {step}: {_not_finite(name)} for {answers}, though its weights are"
    if step == 1 or not role.spec.trainable:
        raise UserError(f"{line}; look at {role.spec.folder}")
    raise NotFinite(f"{line}; go on from an earlier checkpoint with a lower optimizer.lr")


def _num_not_finite(rewards: Tensor, valid: Tensor) -> int:
    """Answers that have a reward ``[B, R]`` that is not finite."""
    return int((valid & ~rewards.isfinite()).any(dim=1).sum())


def _not_finite(role: str) -> str:
    """What there is to say of a role's numbers; nothing of no role."""
    kind = {"": "", "actor": "log-probs", "reference": "log-probs", "critic": "values"}
    what = kind.get(role, "rewards")
    return f"the {what} of the {role} are not finite" if what else ""
