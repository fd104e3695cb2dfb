"""What becomes of a run some of whose answers have no reward."""

from __future__ import annotations

from megatron_amrlhf.engine.integrity import NotFinite, not_finite_weights
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.rewards import Rewards, not_finite
from megatron_amrlhf.parallel.collectives import broadcast_object_from_last_stage, gather_objects


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
        line = f"step {step}: {not_finite(name)} for {answers}, though its weights are"
    if step == 1 or not role.spec.trainable:
        raise UserError(f"{line}; look at {role.spec.folder}")
    raise NotFinite(f"{line}; go on from an earlier checkpoint with a lower optimizer.lr")
