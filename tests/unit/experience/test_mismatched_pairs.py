"""KTO's mismatched pairs: another prompt's answer, with its mask, the same on every layout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.algorithms import kto
from megatron_amrlhf.algorithms.kto import KtoBatch, mismatched_pairs
from megatron_amrlhf.losses.kto import KtoTargets
from megatron_amrlhf.types import MaskedBatch, RolloutBatch, TrainBatch

NUM_PROMPTS, SAMPLES = 4, 3
FAILED = 5  # every fifth answer


def answer(prompt: int, sample: int) -> list[int]:
    """1 to 5 tokens that tell whose they are."""
    length = 1 + (2 * prompt + sample) % 5
    return [1000 + 100 * prompt + 10 * sample + j for j in range(length)]


def whole_batch() -> MaskedBatch:
    """All answers of a step; a token is kept where its id is even, every fifth one has failed."""
    cells = [(p, s) for p in range(NUM_PROMPTS) for s in range(SAMPLES)]
    rows = tuple(torch.tensor([p] * (p + 2) + answer(p, s)) for p, s in cells)
    flags = torch.zeros(len(rows), dtype=torch.bool)
    rollout = RolloutBatch(
        rows=rows,
        prompt_lengths=torch.tensor([p + 2 for p, _ in cells]),
        group_ids=torch.tensor([p for p, _ in cells]),
        sample_ids=torch.arange(len(rows)),
        from_reference=flags,
        ended=flags,
    )
    mask = torch.zeros_like(rollout.response_mask)
    for i, (p, s) in enumerate(cells):
        for j, token in enumerate(answer(p, s)):
            mask[i, j] = token % 2 == 0
    return MaskedBatch(rollout, mask, flags, has_reward=rollout.sample_ids % FAILED != 0)


def pairs_on(dp_size: int, monkeypatch) -> list[tuple[list[int], list[int], bool]]:
    """(row, kept columns, has a reward) of each pair, put together from all replicas."""
    whole = whole_batch()
    shares = torch.arange(NUM_PROMPTS * SAMPLES).chunk(dp_size)
    batches = []
    for index in shares:
        rollout = whole.rollout.select(index)
        width = rollout.response_mask.shape[1]
        parts = (whole.mask[index][:, :width], whole.chosen[index], whole.has_reward[index])
        batches.append(MaskedBatch(rollout, *parts))
    sent: list = []

    def record(value, group):
        sent.append(value)
        return [value] * dp_size

    monkeypatch.setattr(kto, "gather_objects", record)
    meshes = [SimpleNamespace(dp_rank=r, dp_size=dp_size, dp_group=None) for r in range(dp_size)]
    for batch, mesh in zip(batches, meshes, strict=True):
        mismatched_pairs(batch, SAMPLES, mesh)
    firsts = list(sent)
    monkeypatch.setattr(kto, "gather_objects", lambda value, group: firsts)
    found = []
    for batch, mesh in zip(batches, meshes, strict=True):
        rollout, kept, counted = mismatched_pairs(batch, SAMPLES, mesh)
        assert kept.shape == rollout.response_mask.shape
        columns = [row.nonzero().flatten().tolist() for row in kept]
        rows = [row.tolist() for row in rollout.rows]
        found += zip(rows, columns, counted.tolist(), strict=True)
    return found


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_each_prompt_gets_the_next_ones_answer_of_the_same_number(dp_size, monkeypatch):
    expected = []
    for prompt in range(NUM_PROMPTS):
        for sample in range(SAMPLES):
            other = (prompt + 1) % NUM_PROMPTS
            tokens, counts = answer(other, sample), (other * SAMPLES + sample) % FAILED != 0
            kept = [j for j, token in enumerate(tokens) if token % 2 == 0]
            expected.append(([prompt] * (prompt + 2) + tokens, kept, counts))
    assert pairs_on(dp_size, monkeypatch) == expected


def kto_targets(batch, kept):
    """Only what is kept of the mismatched pairs says something here."""
    flags, numbers = torch.ones(len(kept), dtype=torch.bool), torch.zeros(kept.shape)
    mask = batch.mask
    return KtoTargets(flags[:, None], mask, mask, numbers, flags, kept, numbers, flags)


def test_minibatches_take_their_pairs_along(monkeypatch):
    batch = whole_batch()
    monkeypatch.setattr(kto, "gather_objects", lambda value, group: [value])
    mesh = SimpleNamespace(dp_rank=0, dp_size=1, dp_group=None)
    mismatched, kept, _ = mismatched_pairs(batch, SAMPLES, mesh)
    rollout = batch.rollout
    of_rows = TrainBatch.of(batch, kto_targets(batch, kept))
    train = KtoBatch(**vars(of_rows), mismatched=mismatched)
    part = train.select(torch.tensor([4, 1]))
    assert isinstance(part, KtoBatch)
    for place, index in enumerate((4, 1)):
        assert torch.equal(part.rows[place], rollout.rows[index])
        assert torch.equal(part.mismatched.rows[place], mismatched.rows[index])
        assert torch.equal(part.targets.mismatched_mask[place], kept[index])


def test_nothing_of_a_failed_answer_is_computed_in_an_update():
    batch = whole_batch()
    train = TrainBatch.of(batch, {})
    failed = (batch.rollout.sample_ids % FAILED == 0).tolist()
    assert any(failed) and not all(failed)
    for row, whole, length, has_failed in zip(
        train.rows, batch.rollout.rows, train.prompt_lengths.tolist(), failed, strict=True
    ):
        assert (row.numel(), length) == (0, 0) if has_failed else torch.equal(row, whole)
