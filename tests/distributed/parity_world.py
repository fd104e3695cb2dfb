"""Trained cases compared with plain torch on Hugging Face's model in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tests import reference
from tests.distributed.parity import LOSSES, Case, RankResult, merge, train_cases
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model
from tests.reference import Hyper, Row

# float32 against float64, relative to the largest entry of a tensor. A loss is a mean of N terms:
# if each is rounded by at most a share e of itself, the mean is by at most e times the mean of
# their sizes, whatever N; a surrogate's terms have both signs, and what is left of them may be far
# smaller. A weight also relative to how far it moved in the three steps, but for the rounding of a
# stored float32 at each step.
TOLERANCES = {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-5, "weight": 1e-5, "change": 1e-4}
ROUNDING = 2.0**-24

VOCAB_SIZE, HIDDEN = 131, 48


class World:
    """Models, batches, reference results and launches, each made once.

    Args:
        folder: where the models go.
        models: arguments of ``make_tiny_model`` by name.
        sizes: rows of each step.
        first_masked: from this row on the second step's rows have no kept token.
        layouts: (TP, PP, DP) by name.
        cases: gives a layout's cases; all of them run in one launch.
    """

    def __init__(
        self,
        folder: Path,
        models: dict[str, dict],
        sizes: list[int],
        first_masked: int,
        layouts: dict[str, tuple[int, int, int]],
        cases: Callable[[str], list[Case]],
    ):
        self.layouts, self.cases = layouts, cases
        self.folders: dict[tuple[str, int | None], str] = {}
        self.batches: dict[tuple[str, bool], list[list[Row]]] = {}
        self._references: dict[tuple, tuple] = {}
        self._launches: dict[str, list | AssertionError] = {}
        for model, kind in models.items():
            for head in (None, 1, 5):
                path = folder / f"{model}-{head}"
                make_tiny_model(path, **kind, vocab_size=VOCAB_SIZE, hidden=HIDDEN, weight_std=0.1)
                if head:
                    reference.add_head(path, HIDDEN, head, seed=head)
                self.folders[model, head] = str(path)
            policy, critic = (Path(self.folders[model, head]) for head in (None, 1))
            drawn = reference.random_rows(policy, critic, sizes, VOCAB_SIZE, Hyper())
            self.batches[model, False] = [reference.unmask(rows) for rows in drawn]
            drawn[1] = reference.mask_all_but(drawn[1], first_masked)
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
            tensor, pipeline, data = self.layouts[layout]
            job = (self.cases(layout), self.folders, self.batches, tensor, pipeline)
            try:
                self._launches[layout] = run_on(tensor * pipeline * data, train_cases, *job)
            except AssertionError as failure:
                self._launches[layout] = failure
        launch = self._launches[layout]
        if isinstance(launch, AssertionError):
            raise launch
        return [rank[case.name] for rank in launch if rank is not None]

    def differences(self, layout: str, case: Case) -> list[tuple[str, str, float]]:
        """(kind, what, error) of everything that a case's ranks gave, against the reference."""
        found, folder = self.found(layout, case), self.folders[case.model, LOSSES[case.loss][2]]
        records, final, initial = self.expected(case)
        checks: list[tuple[str, str, float]] = []  # (kind, what, error)
        for step, record in enumerate(records):
            assert record.grad_norm > case.hyper.max_grad_norm, "clipping is to be tested"
            for rank in found:
                off = abs(rank.losses[step] - record.loss) / record.size
                checks.append(("loss", f"step {step}", off))
                off = abs(rank.norms[step] - record.grad_norm) / record.grad_norm
                checks.append(("norm", f"step {step}", off))
            merged = merge(found, folder, case, lambda rank, step=step: rank.gradients[step])
            assert {name for name, _ in merged} == set(record.gradients)
            for name, gradient in merged:
                wanted = record.gradients[name]
                off = error(gradient, wanted, scale=wanted)
                checks.append(("gradient", f"step {step}, {name}", off))
        for name, weight in merge(found, folder, case, lambda rank: rank.weights):
            wanted, change = final[name], final[name] - initial[name]
            checks.append(("weight", name, error(weight, wanted, scale=wanted)))
            rounding = 2 * len(records) * ROUNDING  # by weight decay, then by the update
            checks.append(("change", name, error(weight, wanted, change, rounding)))
        return checks


def error(found: Tensor, expected: Tensor, scale: Tensor, rounding: float = 0.0) -> float:
    """Largest difference beyond rounding, relative to the largest entry of ``scale``."""
    difference = (found.double() - expected).abs() - rounding * expected.abs()
    largest = difference.max().clamp(min=0.0)
    return 0.0 if largest == 0 else float(largest / scale.abs().max())  # a NaN stays one


def assert_close(checks: list[tuple[str, str, float]]) -> None:
    """Every error is within its kind's tolerance."""
    # nan is wrong too
    wrong = [check for check in checks if not check[2] <= TOLERANCES[check[0]]]
    assert not wrong, "\n".join(f"{kind}, {what}: off by {off:.1e}" for kind, what, off in wrong)
