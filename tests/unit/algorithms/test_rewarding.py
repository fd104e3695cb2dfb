"""A reward that failed is no number: its answer is taken out and moves no statistic."""

import math

import torch

from megatron_amrlhf.algorithms.rewarding import without_failures
from megatron_amrlhf.mask.statistics import group_means

NAN, INF = math.nan, math.inf
VALID = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
GROUPS = torch.tensor([3, 3, 3, 8, 8, 9])


def rewards(tokens, sequences, problem=""):
    return without_failures(torch.tensor(tokens), torch.tensor(sequences), VALID, GROUPS, problem)


TOKENS = [[1.0, 2, 3], [1, NAN, 0], [5, 0, 0], [1, 1, 0], [INF, 1, 1], [2, 0, 0]]
SEQUENCES = [2.0, NAN, 6.0, 1.0, 7.0, NAN]


def test_failed_answers_leave_the_valid_tokens_and_get_their_groups_mean():
    found = rewards(TOKENS, SEQUENCES)
    assert found.failed.tolist() == [False, True, False, False, True, True]
    assert torch.equal(found.valid, VALID & ~found.failed[:, None])
    assert found.sequences.tolist() == [2.0, 4.0, 6.0, 1.0, 1.0, 0.0]
    assert found.tokens[found.failed].eq(0).all() and found.tokens[0].tolist() == [1.0, 2.0, 3.0]
    assert "not finite" in found.problem
    assert rewards(TOKENS, SEQUENCES, "no verdict").problem == "no verdict"


def test_a_groups_mean_is_that_of_the_answers_that_did_not_fail():
    found = rewards(TOKENS, SEQUENCES)
    everyone = torch.ones(6, 1, dtype=torch.bool)
    with_all = group_means(found.sequences[:, None], everyone, GROUPS)
    without = group_means(found.sequences[:, None], ~found.failed[:, None], GROUPS)
    assert torch.equal(with_all, without)


def test_what_stands_outside_an_answer_is_not_read():
    tokens = [[1.0, 2, 3], [1, 2, NAN], [5, NAN, INF], [1, 1, 0], [1, 1, 1], [2, 0, 0]]
    found = rewards(tokens, [1.0] * 6)
    assert not found.failed.any() and found.problem == ""
    assert found.tokens.isfinite().all()
