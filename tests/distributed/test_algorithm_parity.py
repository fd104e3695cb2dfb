"""Every algorithm at every layout against plain torch on Hugging Face's model in float64.

Loss, gradient norm and every gradient at each of three optimizer steps with clipping on, and the
weights after them. All cases of a layout run in one launch; a test names layout, model, reduce
mode, loss and masking.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from torch import Tensor

from tests import reference
from tests.distributed.parity import LOSSES, Case, RankResult, merge, train_cases
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model
from tests.reference import Hyper, Row

pytestmark = pytest.mark.distributed

# float32 against float64, relative to the largest entry of a tensor. A weight also relative to how
# far it moved in the three steps, but for the rounding of a stored float32 at each step.
TOLERANCES = {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-5, "weight": 1e-5, "change": 1e-4}
ROUNDING = 2.0**-24

VOCAB_SIZE, HIDDEN = 131, 48
# At DP 2 three pairs give one rank two full micro-batches, the other a full and an empty one.
ROWS_A_STEP = [12, 6, 6]
FIRST_ROW_OF_RANK_1 = 4  # in the second step at DP 2

MODELS = {
    "qwen2-bias-untied": {"family": "qwen2", "tied": False, "layers": 2},
    "llama-tied": {"family": "llama", "tied": True, "layers": 4},
}
VARIANTS = ("prm_mse", "rejection_sampling_k3")  # at TP 2 only, for time
LAYOUTS = {  # (TP, PP, DP)
    "tp2-pp2-dp2": (2, 2, 2),
    "tp2": (2, 1, 1),
    "pp2": (1, 2, 1),
    "dp2": (1, 1, 2),
    "single": (1, 1, 1),
}


def cases(layout: str) -> list[Case]:
    """All losses, masked and unmasked, on both models.

    Every layout of several processes runs each of them by both reduce modes; a single process,
    where nothing is reduced, by one: the mode alternates.
    """
    found = []
    for model, loss, masked in itertools.product(MODELS, LOSSES, (True, False)):
        alternating = ("step", "microbatch")[masked ^ (model == "llama-tied")]
        modes = (alternating,) if layout == "single" else ("step", "microbatch")
        if layout != "tp2" and loss in VARIANTS:
            continue
        for reduce in modes:
            kept = masked and model == "llama-tied"
            found.append(Case(model, reduce, loss, masked, "kept" if kept else "response"))
    return found


class World:
    """Models, batches, reference results and launches, each made once."""

    def __init__(self, folder: Path):
        self.folders: dict[tuple[str, int | None], str] = {}
        self.batches: dict[tuple[str, bool], list[list[Row]]] = {}
        self._references: dict[tuple, tuple] = {}
        self._launches: dict[str, list | AssertionError] = {}
        for model, kind in MODELS.items():
            for head in (None, 1, 5):
                path = folder / f"{model}-{head}"
                make_tiny_model(path, **kind, vocab_size=VOCAB_SIZE, hidden=HIDDEN, weight_std=0.1)
                if head:
                    reference.add_head(path, HIDDEN, head, seed=head)
                self.folders[model, head] = str(path)
            policy, critic = (Path(self.folders[model, head]) for head in (None, 1))
            drawn = reference.random_rows(policy, critic, ROWS_A_STEP, VOCAB_SIZE, Hyper())
            self.batches[model, False] = [reference.unmask(rows) for rows in drawn]
            drawn[1] = reference.mask_all_but(drawn[1], FIRST_ROW_OF_RANK_1)
            self.batches[model, True] = drawn

    def expected(self, case: Case):
        """(records of the steps, final weights, initial weights) of the reference."""
        key = (case.model, case.loss, case.masked, case.denominator)
        if key not in self._references:
            head = LOSSES[case.loss][2]
            folder = Path(self.folders[case.model, head])
            initial = reference.ReferenceModel(folder, head is not None, case.hyper).weights()
            steps = self.batches[case.model, case.masked]
            trained = reference.train(folder, case.loss, steps, case.hyper)
            self._references[key] = (*trained, initial)
        return self._references[key]

    def found(self, layout: str, case: Case) -> list[RankResult]:
        """Each (TP, PP) rank's result; a launch that failed fails all tests of its layout."""
        if layout not in self._launches:
            tensor, pipeline, data = LAYOUTS[layout]
            job = (cases(layout), self.folders, self.batches, tensor, pipeline)
            try:
                self._launches[layout] = run_on(tensor * pipeline * data, train_cases, *job)
            except AssertionError as failure:
                self._launches[layout] = failure
        launch = self._launches[layout]
        if isinstance(launch, AssertionError):
            raise launch
        return [rank[case.name] for rank in launch if rank is not None]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("parity"))


def error(found: Tensor, expected: Tensor, scale: Tensor, rounding: float = 0.0) -> float:
    """Largest difference beyond rounding, relative to the largest entry of ``scale``."""
    difference = (found.double() - expected).abs() - rounding * expected.abs()
    return float(difference.max().clamp(min=0.0) / scale.abs().max())


ALL = [
    pytest.param(layout, case, id=f"{layout}/{case.name}")
    for layout in LAYOUTS
    for case in cases(layout)
]


@pytest.mark.parametrize(("layout", "case"), ALL)
def test_loss_norm_gradients_and_weights_equal_the_reference(world, layout, case, record_property):
    found = world.found(layout, case)
    records, final, initial = world.expected(case)
    head = LOSSES[case.loss][2]
    folder = world.folders[case.model, head]
    checks: list[tuple[str, str, float]] = []  # (kind, what, error)
    for step, record in enumerate(records):
        assert record.grad_norm > case.hyper.max_grad_norm, "clipping is to be tested"
        for rank in found:
            off = abs(rank.losses[step] - record.loss) / abs(record.loss)
            checks.append(("loss", f"step {step}", off))
            off = abs(rank.norms[step] - record.grad_norm) / record.grad_norm
            checks.append(("norm", f"step {step}", off))
        merged = merge(found, folder, head, lambda rank, step=step: rank.gradients[step])
        assert {name for name, _ in merged} == set(record.gradients)
        for name, gradient in merged:
            wanted = record.gradients[name]
            off = error(gradient, wanted, scale=wanted)
            checks.append(("gradient", f"step {step}, {name}", off))
    for name, weight in merge(found, folder, head, lambda rank: rank.weights):
        wanted, change = final[name], final[name] - initial[name]
        checks.append(("weight", name, error(weight, wanted, scale=wanted)))
        rounding = 2 * len(records) * ROUNDING  # by weight decay, then by the update
        checks.append(("change", name, error(weight, wanted, change, rounding)))
    for kind in TOLERANCES:
        record_property(kind, max(off for its, _, off in checks if its == kind))
    # nan is wrong too
    wrong = [check for check in checks if not check[2] <= TOLERANCES[check[0]]]
    assert not wrong, "\n".join(f"{kind}, {what}: off by {off:.1e}" for kind, what, off in wrong)
