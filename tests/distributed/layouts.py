"""Every allowed way to lay out one training, and a small set that covers all pairs of choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from allpairspy import AllPairs

from tests.distributed.parity import Case

MODELS = {  # four layers, so that PP 4 and PP 2 with two chunks a rank divide them
    "qwen2-bias-untied": {"family": "qwen2", "tied": False, "layers": 4},
    "llama-tied": {"family": "llama", "tied": True, "layers": 4},
    "qwen3-tied": {"family": "qwen3", "tied": True, "layers": 4, "head_dim": 10},
}
ROWS_A_STEP = [20, 20, 20]
FIRST_MASKED = 10  # at DP 2 these are all rows of rank 1


@dataclass(frozen=True)
class Choice:
    """One value of each factor, as strings and numbers that name a test."""

    tensor: str
    pipeline: str
    data: int
    weights: str
    reduce: str
    recompute: str
    model: str
    num_blocks: int
    loss: str

    @property
    def layout(self) -> tuple[int, int, int]:
        """(TP, PP, DP)."""
        return int(self.tensor[2]), int(self.pipeline[2]), self.data

    @property
    def layout_name(self) -> str:
        return "tp{}-pp{}-dp{}".format(*self.layout)

    @property
    def case(self) -> Case:
        rows = ROWS_A_STEP[0] // self.data
        size = -(-rows // self.num_blocks)
        stage, _, gather = self.weights.partition("-")
        engine = {
            "zero_stage": int(stage[-1]),
            "gather": gather or "step",
            "recompute": self.recompute,
            "micro_batch_size": size + size % 2,  # pairs stay together
        }
        return Case(
            self.model,
            self.reduce,
            self.loss,
            masked=True,
            denominator="kept" if self.recompute == "full" else "response",
            virtual=2 if self.pipeline.endswith("v2") else 1,
            uneven={"pp2u": (1, None), "pp4": (None, None)}.get(self.pipeline, (None, None)),
            sequence=self.tensor.endswith("sp"),
            engine=tuple(engine.items()),
        )


FACTORS = {
    "tensor": ("tp1", "tp2", "tp2sp"),
    "pipeline": ("pp1", "pp2", "pp2v2", "pp4", "pp2u"),
    "data": (1, 2),
    "weights": ("zero0", "zero1", "zero3-step", "zero3-microbatch"),
    "reduce": ("step", "microbatch"),
    "recompute": ("none", "full", "selective"),
    "model": tuple(MODELS),
    "num_blocks": (1, 2, 5),
    "loss": ("ppo_actor", "ppo_critic", "dpo_inside"),
}


def covering() -> list[Choice]:
    """A set in which every pair of choices of two factors occurs, on one and on two replicas."""
    factors = [FACTORS | {"data": (data,)} for data in FACTORS["data"]]
    return [Choice(*row) for each in factors for row in AllPairs(list(each.values()))]


def everything() -> Iterator[Choice]:
    """All combinations of all factors but the loss, which takes turns, and selective recompute."""
    factors = FACTORS | {"recompute": ("none", "full")}
    factors["pipeline"] = tuple(name for name in factors["pipeline"] if name != "pp2u")
    losses = itertools.cycle(factors.pop("loss"))
    for row in itertools.product(*factors.values()):
        yield Choice(*row, next(losses))
