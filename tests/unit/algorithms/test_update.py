"""What an optimizer step logs: the loss that it was taken on, also where nothing is counted."""

from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.algorithms import update as module
from megatron_amrlhf.algorithms.update import optimizer_step, run_updates
from megatron_amrlhf.engine.microbatch import response_outputs
from megatron_amrlhf.engine.zero3 import StepResult
from megatron_amrlhf.experience.scoring import Reader
from megatron_amrlhf.losses.reduce import LossOutput, finish_metrics, merge_metrics
from megatron_amrlhf.losses.targets import Targets
from megatron_amrlhf.types import TrainBatch

TERMS = torch.tensor([[1.0, 2.0], [4.0, 8.0]])


class Engine:
    """Runs the loss on each row for itself; keeps the sum that is called backward on."""

    skipped_steps = 0

    def train_step(self, role, rows, ids, plan, function, loss, together):
        self.sum, extras = 0.0, []
        for row in range(len(rows)):
            block = SimpleNamespace(
                num_outputs=2,
                row_index=torch.tensor([row]),
                rectangle=lambda outputs, width, row=row: TERMS[row : row + 1],
            )
            value, extra = loss(TERMS[row], block)
            self.sum += float(value)
            extras.append(extra)
        return StepResult(extras, 0.5, 1e-3, None)


def step(monkeypatch, counted, dp_rank=0):
    """(loss that is trained on, (sum, count) metrics) with the ``counted`` tokens in the mean."""
    monkeypatch.setattr(module, "balance", lambda batch, plan, together, mesh: (batch, plan))
    mesh = SimpleNamespace(is_last_stage=True, dp_group=None, dp_size=1, dp_rank=dp_rank)
    context = SimpleNamespace(mesh=mesh, engine=Engine())
    rows = (torch.arange(4), torch.arange(4))
    prompts = torch.tensor([2, 2])
    batch = TrainBatch.whole(rows, prompts, Targets(torch.tensor(counted)))
    plan = response_outputs(torch.tensor([4, 4]), prompts, "before")

    def terms(values, targets):
        return LossOutput(values, {})

    _, metrics = optimizer_step(context, "actor", batch, plan, Reader(), loss=terms, name="policy")
    return context.engine.sum, metrics


SOME, NONE = [[True, False], [True, True]], [[False, False]] * 2


@pytest.mark.parametrize("counted", [SOME, NONE])
def test_the_logged_loss_is_the_one_that_was_trained_on(monkeypatch, counted):
    """With nothing counted it was null; what stands there is divided by 1 (a KL, else 0)."""
    loss, metrics = step(monkeypatch, counted)
    assert finish_metrics(metrics) == {"loss/policy": pytest.approx(loss)}
    assert loss == pytest.approx(15 / 3 if counted is SOME else 15)


def test_what_nobody_counts_is_added_by_one_replica_alone(monkeypatch):
    both = [step(monkeypatch, NONE, dp_rank)[1] for dp_rank in (0, 1)]
    total, count = merge_metrics(both)["loss/policy"]
    assert (total, count) == (30, 1)


def test_the_rates_and_norms_of_each_role_are_logged():
    line = SimpleNamespace(advance=lambda rows: None)

    class Track:
        def __enter__(self):
            return line

        def __exit__(self, *found):
            return None

    console = SimpleNamespace(track=lambda *args: Track(), line=print)
    engine, rates = Engine(), {"actor": 5e-3, "critic": 5e-2}
    engine.roles = {
        role: SimpleNamespace(weights=SimpleNamespace(schedule=SimpleNamespace(rate=rate)))
        for role, rate in rates.items()
    }
    context = SimpleNamespace(console=console, engine=engine)
    roles = {
        "actor": lambda part: (StepResult([], 1.0, 1e-3 * part.rows[0], None), {}),
        "critic": lambda part: (StepResult([], 2.0, 1e-2 * part.rows[0], None), {}),
    }
    parts = [SimpleNamespace(rows=[n]) for n in (1, 2)]
    assert run_updates(context, parts, roles)[1] == {
        "engine/grad_norm": 1.0,
        "engine/critic_grad_norm": 2.0,
        "engine/skipped_steps": 0,
        "optimizer/lr": 2e-3,
        "optimizer/critic_lr": 2e-2,
    }
    nothing = {"engine/skipped_steps": 0, "optimizer/lr": 5e-3, "optimizer/critic_lr": 5e-2}
    assert run_updates(context, [], roles)[1] == nothing
