"""One optimizer step of one role from a TrainBatch: the same for every loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megatron_amrlhf.engine.balance import balance
from megatron_amrlhf.engine.microbatch import MicroBatch, OutputPlaces, response_outputs
from megatron_amrlhf.engine.zero3 import StepResult
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.scoring import Reader
from megatron_amrlhf.losses.reduce import (
    LossOutput,
    Metrics,
    divisor,
    global_sum,
    merge_metrics,
    scale_for_engine,
)
from megatron_amrlhf.losses.targets import AnswerTargets
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.types import T, TrainBatch

A = TypeVar("A", bound=AnswerTargets)
# ([b, R, ...] values of the model being trained, targets of the same rows) -> terms and metrics
LossFunction = Callable[[Tensor, T], LossOutput]


def optimizer_step(
    context: Context,
    role: str,
    batch: TrainBatch[T],
    at: OutputPlaces,
    read: Reader,
    *,
    loss: LossFunction[T],
    name: str,
    together: int = 1,
) -> tuple[StepResult, Metrics]:
    """Trains ``role`` on ``batch``. Entered by every rank.

    Args:
        context: the run.
        role: actor, critic, prm or orm.
        batch: this replica's rows of the optimizer step; replicas even them out by tokens.
        at: where outputs are computed; ``at.width`` is R.
        read: makes values of the last stage's outputs, differentiable.
        loss: its terms are summed and divided by the global count of ``targets.denominator``.
        name: the loss is logged as ``loss/NAME``, over what it was divided by.
        together: this many consecutive rows stay in one micro-batch (2 for pairs).

    Returns:
        What the engine did, and the merged (sum, count) metrics (empty but on last stages).
    """
    # After the cut to kept tokens, so replicas are evened out by what is left.
    batch, at = balance(batch, at, together, context.mesh)
    count, uncounted = None, {}
    if batch.targets is not None:
        counted = global_sum(batch.targets.denominator, context.mesh.dp_group)
        count = divisor(counted)
        # The divisor is at least 1: where nothing is counted, the logged mean has the 1 from here,
        # once over all replicas.
        missing = (count - counted) * (context.mesh.dp_rank == 0)
        uncounted = {f"loss/{name}": count_metric(0.0, missing)}

    def scaled_loss(outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
        read_out = read.outputs(outputs[: micro_batch.num_outputs], micro_batch)
        # As wide as the targets, which are of the whole rollout.
        values = micro_batch.rectangle(read_out, at.width)
        assert count is not None and batch.targets is not None, "this is a last stage"
        targets = batch.targets.select(micro_batch.row_index)
        out = loss(values, targets)
        total = out.terms.sum()
        scaled = scale_for_engine(total, count, context.mesh.dp_size)
        # Not divided: finish_metrics divides the global sum by the global count.
        logged = count_metric(total.detach(), targets.denominator.sum())
        return scaled, {**out.metrics, f"loss/{name}": logged}

    result = context.engine.train_step(
        role, batch.rows, batch.ids, at, read.logits, loss=scaled_loss, together=together
    )
    return result, merge_metrics([*result.extras, uncounted])


def response_places(part: TrainBatch[A]) -> OutputPlaces:
    """Outputs before every response token, as wide as the targets (of the whole rollout)."""
    lengths = torch.tensor([row.numel() for row in part.rows], dtype=torch.int64)
    at = response_outputs(lengths, part.prompt_lengths, "before")
    return at.widened(part.targets.valid.shape[1]) if part.targets else at


Batch = TypeVar("Batch", bound=TrainBatch)
# rows of an optimizer step -> what optimizer_step() returns
UpdateFunction = Callable[[Batch], tuple[StepResult, Metrics]]


def run_updates(
    context: Context,
    parts: Sequence[Batch],
    roles: Mapping[str, UpdateFunction[Batch]],
    passes: int = 1,
) -> tuple[Metrics, dict[str, float]]:
    """One optimizer step of each role on each part, in order. Entered by every rank.

    Args:
        context: the run.
        parts: rows of each optimizer step.
        roles: the optimizer step of each trained role, in order.
        passes: how often such a step goes over its rows, for the progress that is shown.

    Returns:
        Merged metrics of the last stage, and ``engine/*`` and ``optimizer/*`` numbers of the last
        optimizer steps (``engine/grad_norm`` and ``optimizer/lr`` are the first role's).
    """
    rows = len(roles) * sum(len(part.rows) for part in parts)
    prefixes = {role: f"{role}_" if place else "" for place, role in enumerate(roles)}
    collected, engine = [], {}
    for role, prefix in prefixes.items():  # so that it is there too where nothing is learned
        engine[f"optimizer/{prefix}lr"] = context.engine.roles[role].weights.schedule.rate
    with context.console.track("update", rows * passes):
        for part in parts:
            for role, run in roles.items():
                result, metrics = run(part)
                if result.skipped:
                    context.console.line(f"optimizer step skipped: {result.skipped}")
                collected.append(metrics)
                engine[f"engine/{prefixes[role]}grad_norm"] = result.grad_norm
                engine[f"optimizer/{prefixes[role]}lr"] = result.rate
    engine["engine/skipped_steps"] = context.engine.skipped_steps
    return merge_metrics(collected), engine


def split_units(count: int, parts: int, seed: int | None, mesh: Mesh) -> list[Tensor]:
    """This replica's share of ``parts`` nearly equal parts of the units of all replicas.

    Which units are in a part depends on their order over the replicas alone, not on how many
    replicas there are. Entered by every rank.

    Args:
        count: units (rows, or pairs of rows) that this replica has.
        parts: how many; those in which no replica has a unit are left out.
        seed: shuffles the units; None: the parts take turns.
        mesh: the mesh.

    Returns:
        Indices in [0, count) of each part; may be none of this replica's.
    """
    counts = gather_objects(count, mesh.dp_group)
    start, total = sum(counts[: mesh.dp_rank]), sum(counts)
    if seed is None:
        split = [torch.arange(part, total, parts) for part in range(min(parts, total))]
    else:
        generator = torch.Generator().manual_seed(seed % 2**63)  # what it takes
        shuffled = torch.randperm(total, generator=generator)
        split = list(shuffled.tensor_split(min(parts, total))) if total else []
    return [part[(part >= start) & (part < start + count)] - start for part in split]


def epoch_parts(
    train: TrainBatch, *, epochs: int, minibatches: int, seed: int, step: int, mesh: Mesh
) -> list[TrainBatch]:
    """The rows of each optimizer step on one rollout: ``minibatches`` parts in each epoch.

    Rows are shuffled by (seed, step, epoch) where there are several minibatches. Entered by every
    rank.
    """
    parts = []
    for epoch in range(epochs):
        shuffle = (seed * 1_000_003 + step) * 1_009 + epoch if minibatches > 1 else None
        split = split_units(len(train.rows), minibatches, shuffle, mesh)
        parts += [train.select(rows) for rows in split]
    return parts
