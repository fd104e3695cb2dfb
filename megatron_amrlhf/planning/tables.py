"""A plan as tables: where the layers are, what each phase holds and moves, layouts that fit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial

from rich.table import Table

from megatron_amrlhf.planning.advice import Suggestion
from megatron_amrlhf.planning.plan import Plan, StagePlan
from megatron_amrlhf.sizes import GIB, in_units

PARTS = {  # of PhaseMemory -> heading
    "weights": "weights",
    "optimizer": "Adam",
    "gathered": "gathered",
    "gradients": "grads",
    "cache": "KV",
    "activations": "activ.",
    "logits": "logits",
}
MOST_STAGES = 8  # of many stages, those at the ends


def plan_tables(plan: Plan) -> Iterator[Table]:
    """Layout, memory and bytes moved."""
    yield _layout(plan)
    yield _memory(plan)
    if any(stage.sent for stage in plan.stages):
        yield _moved(plan)


def suggestion_table(suggestions: Sequence[Suggestion], memory: int, most: int) -> Table:
    """The first ``most`` layouts that fit, and what to set for them."""
    table = Table(
        title=f"layouts that fit {in_units(memory)} a GPU, the quickest first (estimated)"
    )
    table.add_column("TP x PP x DP")
    for heading in ("peak", "bubble", "time a step"):
        table.add_column(heading, justify="right")
    table.add_column("--set", overflow="fold")
    best = suggestions[0].seconds
    for suggestion in suggestions[:most]:
        plan = suggestion.plan
        keys = (f"{key}={_yaml(value)}" for key, value in suggestion.changes.items())
        table.add_row(
            sizes_of(plan),
            in_units(plan.worst.peak),
            f"{max(plan.bubbles.values(), default=0):.0%}",
            f"{suggestion.seconds / best:.2f} x",
            " ".join(keys) or "as it is",
        )
    return table


def sizes_of(plan: Plan) -> str:
    """Such as ``4 x 2 x 1``."""
    parallel = plan.config.parallel
    return f"{parallel.tensor} x {parallel.pipeline} x {plan.data}"


def _yaml(value: object) -> str:
    return json.dumps(value).strip('"')


def _shown(plan: Plan) -> list[StagePlan]:
    """All stages, or the first, the last and the worst of many."""
    if len(plan.stages) <= MOST_STAGES:
        return plan.stages
    places = {0, 1, plan.worst.stage, len(plan.stages) - 2, len(plan.stages) - 1}
    return [plan.stages[place] for place in sorted(places)]


def _layout(plan: Plan) -> Table:
    table = Table(title="layout: parameters of each role on a rank, before replicas share them")
    for heading in ("stage", "ranks", "layers"):
        table.add_column(heading)
    for role in plan.roles:
        table.add_column(role.name, justify="right")
    for stage in _shown(plan):
        spec, ranks = stage.specs[0], plan.ranks(stage.stage)
        chunks = spec.cut.chunks(spec.shape.num_layers, stage.stage)
        layers = ", ".join(f"{chunk.layers[0]}-{chunk.layers[-1]}" for chunk in chunks)
        layers = f"embedding, {layers}" if spec.has_embedding else layers
        layers = f"{layers}, head" if spec.has_head else layers
        counts = [f"{spec.num_parameters / 1e6:,.4g} M" for spec in stage.specs]
        table.add_row(str(stage.stage), f"{ranks[0]}-{ranks[-1]}", layers, *counts)
    return table


def _total(phase: str, stage: StagePlan) -> int:
    return stage.memory[phase].total


def _memory(plan: Plan) -> Table:
    table = Table(title="memory: GiB of a rank at the fullest moment of each phase")
    for heading in ("phase", "stage"):
        table.add_column(heading, no_wrap=True)
    everywhere = [memory for stage in plan.stages for memory in stage.memory.values()]
    offloaded = [place for place in ("host", "disk") if any(getattr(x, place) for x in everywhere)]
    for heading in (*PARTS.values(), "total", *offloaded):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase in plan.stages[0].memory:
        stage = max(plan.stages, key=partial(_total, phase))
        memory = stage.memory[phase]
        values = [getattr(memory, part) for part in (*PARTS, "total", *offloaded)]
        is_peak = (phase, stage) == (plan.worst.fullest[0], plan.worst)
        cells = (f"{value / GIB:.3g}" if value else "" for value in values)
        table.add_row(phase, str(stage.stage), *cells, style="bold" if is_peak else "")
    return table


def _moved(plan: Plan) -> Table:
    stage = max(plan.stages, key=lambda stage: sum(stage.sent.values()))
    axes = [axis for axis in ("tensor", "pipeline", "data") if axis in stage.sent]
    table = Table(title=f"bytes that a rank of stage {stage.stage} sends a step, by axis")
    table.add_column("phase")
    for axis in axes:
        table.add_column(axis, justify="right")
    table.add_column("bubble", justify="right")
    for phase, volumes in stage.moved.items():
        sums = [
            sum(x for (kind, of), x in volumes.items() if of == axis and kind != "receive")
            for axis in axes
        ]
        bubble = f"{plan.bubbles[phase]:.0%}" if phase in plan.bubbles else ""
        table.add_row(phase, *(in_units(x) if x else "" for x in sums), bubble)
    return table
