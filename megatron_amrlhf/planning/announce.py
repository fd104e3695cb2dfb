"""What a run's choices of ``engine.gather`` and ``engine.reduce`` cost, in words, at its start."""

from __future__ import annotations

from dataclasses import replace

from megatron_amrlhf.planning.bytes_moved import gather_bytes, reduce_bytes
from megatron_amrlhf.planning.weights import StageSpec, held_bytes
from megatron_amrlhf.sizes import in_units

CHOICES = ("step", "microbatch")
UNIT = {"step": "a step", "microbatch": "a micro-batch"}


def describe_choices(specs: list[StageSpec]) -> list[str]:
    """One line for the weights and one for the gradients of the roles that a rank trains.

    Where there is one replica, one line for both.

    Bytes moved are what the rank sends in one optimizer step of each role; bytes held are the
    largest role's, as roles train one after the other.
    """
    if not specs:
        return []
    if specs[0].data == 1:
        held = max(held_bytes(spec).gradients for spec in specs)
        return [f"one replica: nothing to gather or reduce; gradients hold {in_units(held)}"]
    engine = specs[0].engine
    lines = []
    if any(spec.role.zero_stage == 3 for spec in specs):
        lines.append(f"weights:   {_both('gather', engine.gather, specs)}")
    return [*lines, f"gradients: {_both('reduce', engine.reduce, specs)}"]


def _both(key: str, chosen: str, specs: list[StageSpec]) -> str:
    other = next(choice for choice in CHOICES if choice != chosen)
    return f"engine.{key}: {_cost(key, chosen, specs)}; {_cost(key, other, specs)}"


def _cost(key: str, choice: str, specs: list[StageSpec]) -> str:
    moved = held = 0.0
    for spec in specs:
        if key == "gather" and spec.role.stage < 3:
            continue
        asked = replace(spec, engine=spec.engine.model_copy(update={key: choice}))
        moves = gather_bytes if key == "gather" else reduce_bytes
        moved += sum(moves(asked, num_blocks=1).values())
        holds = held_bytes(asked)
        held = max(held, holds.gathered if key == "gather" else holds.gradients)
    return f"{choice} moves {in_units(moved)} {UNIT[choice]} and holds {in_units(held)}"
