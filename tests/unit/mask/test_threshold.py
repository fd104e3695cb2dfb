"""Baselines and whitening by hand, and their independence of padding and of layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_amrlhf.losses.reduce import finish_metrics, global_count, merge_metrics
from megatron_amrlhf.mask.adaptive import chosen_labels
from megatron_amrlhf.mask.schmitt import signs
from megatron_amrlhf.mask.statistics import masked_moments, whiten
from megatron_amrlhf.mask.threshold import (
    RunningBaseline,
    baseline_and_std,
    delta_in_signal_units,
)

NAN = math.nan
SIGNAL = torch.tensor([[1.0, 3.0, NAN], [2.0, NAN, NAN], [6.0, 0.0, 3.0], [NAN, NAN, NAN]])
VALID = ~SIGNAL.isnan()
GROUP_IDS = torch.tensor([5, 5, 9, 4])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fixed", [0.75, 0.75, 0.75, 0.75]),
        ("batch", [2.5, 2.5, 2.5, 2.5]),
        ("running", [2.5, 2.5, 2.5, 2.5]),
        ("sequence", [2.0, 2.0, 3.0, 0.0]),
        ("group", [2.0, 2.0, 3.0, 0.0]),
    ],
)
def test_baseline_of_each_kind_and_global_std(kind, expected):
    baseline, std = baseline_and_std(
        SIGNAL, VALID, kind, fixed_value=0.75, running=RunningBaseline(0.9), group_ids=GROUP_IDS
    )
    assert baseline.shape == (4, 1) and baseline.dtype == std.dtype == torch.float32
    assert baseline[:, 0].tolist() == expected
    # 1 3 2 6 0 3: mean 2.5, squares 59
    torch.testing.assert_close(std, torch.tensor(math.sqrt(59 / 6 - 2.5**2)))


def test_group_baseline_weighs_tokens_not_rows():
    signal = torch.tensor([[1.0, 3.0], [8.0, NAN]])
    ids = torch.tensor([1, 1])
    baseline, _ = baseline_and_std(signal, ~signal.isnan(), "group", group_ids=ids)
    assert baseline[:, 0].tolist() == [4.0, 4.0]


def test_running_baseline_follows_its_recursion_and_survives_a_checkpoint():
    def step(state, value):
        signal = torch.full((1, 2), value)
        return baseline_and_std(signal, ~signal.isnan(), "running", running=state)[0].item()

    state = RunningBaseline(decay=0.75)
    assert step(state, NAN) == 0.0  # nothing measured yet
    assert step(state, 4.0) == 4.0  # the first mean is taken as it is
    assert step(state, 8.0) == 5.0
    assert step(state, NAN) == 5.0  # a step without tokens changes nothing
    restored = RunningBaseline(decay=0.75)
    restored.load_state_dict(state.state_dict())
    assert step(restored, 1.0) == step(state, 1.0) == 4.0
    with pytest.raises(KeyError):
        restored.load_state_dict({})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no_such_kind"):
        baseline_and_std(SIGNAL, VALID, "no_such_kind")
    with pytest.raises(ValueError, match="percent"):
        delta_in_signal_units(0.5, "percent", torch.tensor(2.0))


def test_delta_units():
    std = torch.tensor(3.0)
    assert delta_in_signal_units(0.5, "signal", std) == 0.5
    assert delta_in_signal_units(0.5, "deviations", std) == 1.5
    assert delta_in_signal_units(0.0, "deviations", std) == 0.0


def test_equal_signals_are_neutral_where_there_is_a_band():
    flat, every = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    none = torch.tensor(0.0)
    for delta, sign in ((0.3, 0), (0.0, -1)):
        offset = delta_in_signal_units(delta, "deviations", none)
        assert signs(flat, every, flat[:, :1], offset, "drop").tolist() == [[sign] * 3]


def test_the_mean_of_equal_numbers_is_that_number():
    signal = torch.full((7, 13), 0.1)
    valid = torch.ones_like(signal, dtype=torch.bool)
    baseline, std = baseline_and_std(signal, valid, "batch")
    assert (baseline == signal[0, 0]).all() and std == 0


def test_empty_batches_have_a_baseline_of_every_kind():
    empty, valid = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)
    for kind in ("fixed", "running", "batch", "sequence", "group"):
        baseline, std = baseline_and_std(
            empty, valid, kind, running=RunningBaseline(0.9), group_ids=torch.zeros(0).long()
        )
        assert baseline.shape == (0, 1) and std == 0


def test_whitened_tokens_have_zero_mean_and_unit_variance():
    white = whiten(SIGNAL, VALID)
    entries = white[VALID].double()
    assert entries.mean().abs() < 1e-7 and (entries.square().mean() - 1).abs() < 1e-6
    assert (white[~VALID] == 0).all() and white.dtype == torch.float32
    kept_mean = whiten(SIGNAL, VALID, shift_mean=False)
    torch.testing.assert_close(kept_mean[VALID], white[VALID] + 2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, -7.3, 1e6, 0.0])
def test_constant_data_whiten_to_zeros(value, dtype):
    # enough tokens for the variance to be rounding noise above 0 rather than 0
    x = torch.full((2, 12345), value, dtype=dtype)
    valid = torch.arange(12345)[None, :] < torch.tensor([12345, 0])[:, None]
    assert (whiten(x, valid) == 0).all()
    torch.testing.assert_close(whiten(x, valid, shift_mean=False), torch.where(valid, x, 0.0))


def test_small_variance_beside_a_large_mean_is_not_taken_for_constant():
    x = 1000 + torch.tensor([[-0.01, 0.01]])
    assert (whiten(x, torch.ones(1, 2, dtype=torch.bool)).abs() > 0.99).all()


def test_nan_among_valid_tokens_stays_visible():
    assert whiten(SIGNAL, torch.ones_like(VALID)).isnan().any()
    assert masked_moments(SIGNAL, torch.ones_like(VALID)).std.isnan()


def _rank(rank: int, folder: str) -> None:
    """Rank 0 has all rows, rank 1 none: what both say goes into files."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    rows = slice(0, 4) if rank == 0 else slice(4, 4)
    signal, valid = SIGNAL[rows], VALID[rows]
    metrics = [{"b": (torch.tensor(6.0), torch.tensor(4.0)), "a": (signal.new_ones(()),) * 2}]
    running = RunningBaseline(0.9)
    kinds = ("batch", "running", "group", "sequence", "fixed")
    for kind in kinds:
        baseline, std = baseline_and_std(
            signal, valid, kind, running=running, group_ids=GROUP_IDS[rows], group=group
        )
        assert baseline.shape == (signal.shape[0], 1)
    said = {
        "white": whiten(signal, valid, group),
        "count": global_count(valid, group),
        "no_count": global_count(valid & False, group),
        "std": std,
        "running": running.mean,
        "chosen": chosen_labels(torch.tensor([1.0, 2.0, 4.5] if rank == 0 else [0.5]), "batch",
                                group=group),
        "metrics": finish_metrics(merge_metrics(metrics[rank:]), group, keys=["a", "b"]),
    }  # fmt: skip
    torch.save(said, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_an_empty_rank_enters_every_collective_and_changes_nothing(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    full, empty = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(full["white"], whiten(SIGNAL, VALID), rtol=0, atol=0)
    assert empty["white"].shape == (0, 3)
    _, std = baseline_and_std(SIGNAL, VALID, "batch")
    for said in (full, empty):
        assert said["count"] == 6 and said["count"].dtype == torch.float32
        assert said["no_count"] == 1
        assert said["std"] == std and said["running"] == 2.5
        assert said["metrics"] == {"a": 1.0, "b": 1.5}
    # The mean over both ranks is exactly 2, so the tie is rejected.
    assert full["chosen"].tolist() == [False, False, True] and empty["chosen"].tolist() == [False]
