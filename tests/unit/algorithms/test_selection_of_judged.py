"""Answers whose reward failed are never selected, nor the other answer of their pair."""

import torch

from megatron_amrlhf.algorithms.selection import without_failed

JUDGED = torch.tensor([1, 0, 1, 1, 0]).bool()
ROWS = torch.tensor([0, 2, 1, 3, 3, 4, 2, 3])


def test_a_pair_goes_with_either_of_its_answers():
    labels = torch.tensor([True, False] * 4)
    rows, kept = without_failed(ROWS, labels, JUDGED, 2)
    assert rows.tolist() == [0, 2, 2, 3] and kept.tolist() == [True, False] * 2


def test_single_answers_go_alone():
    labels = torch.arange(8) % 3 == 0
    rows, kept = without_failed(ROWS, labels, JUDGED, 1)
    assert rows.tolist() == [0, 2, 3, 3, 2, 3]
    assert kept.tolist() == [bool(labels[place]) for place in (0, 1, 3, 4, 6, 7)]


def test_nothing_may_be_left():
    rows, labels = without_failed(ROWS[2:4], torch.tensor([True, False]), JUDGED, 2)
    assert rows.numel() == labels.numel() == 0
