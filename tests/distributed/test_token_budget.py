"""Loss and gradients do not depend on how rows are packed, spread over replicas, or kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_amrlhf.algorithms.ppo import Ppo
from megatron_amrlhf.algorithms.update import response_places
from megatron_amrlhf.engine.balance import balance
from megatron_amrlhf.parallel.mesh import build_mesh
from tests import reference
from tests.distributed.contexts import make_context
from tests.distributed.parity import Case, config_of, train_batch
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model
from tests.reference import Hyper

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6  # relative, float32
VOCAB_SIZE = 131
CASE = Case("tiny", "step", "ppo_actor", True)
ENGINES = {  # 18 rows of up to 14 tokens
    "one row": (("micro_batch_size", 1),),
    "five rows": (("micro_batch_size", 5),),
    "30 tokens": (("micro_batch_tokens", 30),),
    "100 tokens": (("micro_batch_tokens", 100),),
    "all": (("micro_batch_tokens", 10_000),),
}
# rows of each replica; the engine evens them out by tokens unless told not to
SHARES = {"even": None, "one replica without rows": (18, 0), "uneven": (13, 5)}


def numbers(folder: str, critic: str, masked_out: int) -> dict[str, tuple[float, float]]:
    """(loss, gradient norm) of one actor step by engine and share, without any balancing too."""
    mesh, found = build_mesh(1, 1), {}
    folders = (Path(folder), Path(critic))
    rows = reference.random_rows(*folders, [18], VOCAB_SIZE, Hyper())[0]
    rows = reference.mask_all_but(rows, masked_out) if masked_out else rows
    width = max(row.num_response for row in rows)

    for name, engine in ENGINES.items():
        for share, counts in SHARES.items():
            if mesh.dp_size == 1 and counts:
                continue
            counts = counts or [18 // mesh.dp_size] * mesh.dp_size
            first = sum(counts[: mesh.dp_rank])
            mine = rows[first : first + counts[mesh.dp_rank]]
            case = replace(CASE, engine=engine)
            context = make_context(config_of(case, folder, mesh), mesh)
            context.role("actor", Path(folder), learning_rate=1e-3, total_steps=1)
            algorithm = object.__new__(Ppo)
            algorithm.context, algorithm.section = context, context.config.algorithm
            part = train_batch(mine, width, case, mesh)
            result, metrics = algorithm.actor_step(part)
            loss = context.publish(metrics)["loss/policy"]
            found[f"{name}, {share}"] = (loss, result.grad_norm)
            context.engine.roles["actor"].weights.close()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny", "critic"):
        make_tiny_model(
            folder / name, "llama", tied=True, vocab_size=VOCAB_SIZE, hidden=48, weight_std=0.1
        )
    reference.add_head(folder / "critic", 48, 1, seed=1)
    return str(folder / "tiny"), str(folder / "critic")


@pytest.mark.parametrize("masked_out", [0, 9], ids=["all rows kept", "second half masked out"])
def test_loss_and_norm_do_not_depend_on_packing_or_replicas(folders, masked_out):
    """With the second half masked out, the second replica has no kept token (but for balancing)."""
    single = run_on(1, numbers, *folders, masked_out)[0]
    double = run_on(2, numbers, *folders, masked_out)[0]
    loss, norm = single["one row, even"]
    assert len(double) == 15 and len(single) == 5 and norm > 0
    for name, pair in (single | double).items():
        assert pair == pytest.approx((loss, norm), rel=TOLERANCE), name


def rows_after_balancing(folder: str, critic: str) -> tuple[list, list[int]]:
    """What this replica has, and its number of tokens."""
    mesh = build_mesh(1, 1)
    rows = reference.random_rows(Path(folder), Path(critic), [12], VOCAB_SIZE, Hyper())[0]
    mine = rows[:10] if mesh.dp_rank == 0 else rows[10:]
    part = train_batch(mine, max(row.num_response for row in rows), CASE, mesh)
    part = replace(part, ids=part.ids + 10 * mesh.dp_rank)

    batch, plan = balance(part, response_places(part), 2, mesh)
    for place, number in enumerate(batch.ids.tolist()):
        row = rows[number]
        assert torch.equal(batch.rows[place], row.tokens)
        advantages = batch.targets.advantages[place, : row.num_response]
        assert torch.equal(advantages, row.advantages)
        positions = plan.positions[plan.rows == place]
        start = row.prompt_length - 1
        assert positions.tolist() == list(range(start, start + row.num_response))
    loads = torch.tensor([sum(row.numel() for row in batch.rows)])
    both = [torch.zeros_like(loads) for _ in range(2)]
    dist.all_gather(both, loads)
    return batch.ids.tolist(), [int(load) for load in both]


def test_balancing_moves_whole_pairs_with_all_that_belongs_to_them(folders):
    (first, loads), (second, _) = run_on(2, rows_after_balancing, *folders)
    assert sorted(first + second) == list(range(12))
    for ids in (first, second):
        assert all(b == a + 1 and a % 2 == 0 for a, b in zip(ids[0::2], ids[1::2], strict=True))
    assert max(loads) <= 1.15 * sum(loads) / 2
