"""A reward that failed is no number: its answer is taken out and moves no statistic."""

import math

import torch

from megatron_amrlhf.algorithms.rewarding import JUDGED, end_as_before, without_failures
from megatron_amrlhf.rewards.judge.outcomes import DOUBTS, FAILURES, REASONS
from megatron_amrlhf.types import RolloutBatch

NAN, INF = math.nan, math.inf
VALID = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def rewards(tokens, sequences, problem="", reasons=()):
    not_judged = torch.tensor([JUDGED] * 6)
    for row, reason in reasons:
        not_judged[row] = REASONS.index(reason)
    return without_failures(
        torch.tensor(tokens), torch.tensor(sequences), VALID, not_judged, problem
    )


TOKENS = [[1.0, 2, 3], [1, NAN, 0], [5, 0, 0], [1, 1, 0], [INF, 1, 1], [2, 0, 0]]
SEQUENCES = [2.0, NAN, 6.0, 1.0, 7.0, NAN]


def test_failed_answers_leave_the_valid_tokens():
    found = rewards(TOKENS, SEQUENCES)
    assert found.failed.tolist() == [False, True, False, False, True, True]
    assert torch.equal(found.valid, VALID & ~found.failed[:, None])
    assert found.sequences.isnan().equal(found.failed)
    assert found.sequences[~found.failed].tolist() == [2.0, 6.0, 1.0]
    assert found.tokens[found.failed].eq(0).all() and found.tokens[0].tolist() == [1.0, 2.0, 3.0]
    assert "not finite" in found.problem
    assert rewards(TOKENS, SEQUENCES, "no verdict").problem == "no verdict"


def test_every_reason_has_its_metric_and_doubts_are_no_faults():
    found = rewards(TOKENS, SEQUENCES, "", [(1, "form"), (5, "timeout"), (4, "form")])
    shares = {key: float(total / count) for key, (total, count) in found.reasons().items()}
    assert shares.keys() == {f"not_judged/{reason}" for reason in (*DOUBTS, *FAILURES)}
    assert shares.pop("not_judged/form") == 2 / 6 and shares.pop("not_judged/timeout") == 1 / 6
    assert set(shares.values()) == {0.0}
    assert found.doubted.tolist() == [False, True, False, False, True, False]
    assert torch.equal(found.where_finite().not_judged, found.not_judged)


def test_what_stands_outside_an_answer_is_not_read():
    tokens = [[1.0, 2, 3], [1, 2, NAN], [5, NAN, INF], [1, 1, 0], [1, 1, 1], [2, 0, 0]]
    found = rewards(tokens, [1.0] * 6)
    assert not found.failed.any() and found.problem == ""
    assert found.tokens.isfinite().all()


def test_an_end_token_has_the_score_of_the_token_before_it():
    rows = tuple(torch.arange(2 + length) for length in (3, 2, 1, 3))
    rollout = RolloutBatch(
        rows=rows,
        prompt_lengths=torch.full((4,), 2),
        group_ids=torch.arange(4),
        sample_ids=torch.arange(4),
        from_reference=torch.zeros(4, dtype=torch.bool),
        ended=torch.tensor([True, True, True, False]),
    )
    scores = torch.tensor([[1.0, 2, 3], [4, 5, 0], [6, 0, 0], [7, 8, 9]])
    expected = [[1.0, 2, 2], [4, 4, 0], [6, 0, 0], [7, 8, 9]]
    assert end_as_before(scores, rollout).tolist() == expected


def test_an_answer_whose_logprobs_are_not_finite_has_no_reward():
    found = rewards(TOKENS, SEQUENCES)
    logprobs, values = torch.zeros(6, 3, 2), torch.zeros(6, 4)
    logprobs[0, 1, 0], values[2, 3] = NAN, INF
    left = found.where_finite(logprobs, None, values)
    assert left.failed.tolist() == [True, True, True, False, True, True]
    assert not left.valid[0].any() and left.sequences[3] == 1.0
    whole = rewards([[1.0, 2, 3]] * 6, [1.0] * 6)
    assert "log-prob" in whole.where_finite(logprobs).problem
    assert whole.where_finite(values[:2].new_zeros(6, 3)).problem == ""
