"""PRM_O and PRM_P against plain Python, and where a PRM judges the steps of sampled answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.lines import line_numbers
from megatron_amrlhf.experience.sequence_rewards import sequence_rewards
from megatron_amrlhf.rewards.outcome import (
    OUTCOMES,
    aggregate_steps,
    step_ends,
    step_probabilities,
)
from megatron_amrlhf.types import RolloutBatch
from tests.unit.config.samples import make_config

NEWLINE, DOT, BLANK, END = 7, 8, 9, 2
PERMUTED = ((0.13, 0.85, 0.76, 0.26), (0.13, 0.76, 0.26, 0.85))  # products differ by rounding


def prefix(steps):
    right = 0
    for step in steps:
        if step < 0.5:
            break
        right += 1
    return right / len(steps)


BY_HAND = {
    "last": lambda steps: steps[-1],
    "min": min,
    "mean": lambda steps: math.fsum(steps) / len(steps),
    "product": math.prod,
    "prefix": prefix,
}
answers = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=4)


@given(answers, st.data())
def test_aggregates_equal_plain_python_wherever_the_steps_stand(steps, data):
    width = 9
    scores, present = torch.full((len(steps), width), math.nan), torch.zeros(len(steps), width)
    for row, values in enumerate(steps):
        places = data.draw(st.sets(st.integers(0, width - 1), min_size=len(values)))
        for place, value in zip(sorted(places), values, strict=False):
            scores[row, place], present[row, place] = value, 1
    for kind in OUTCOMES:
        found = aggregate_steps(scores, present.bool(), kind)
        for row, values in enumerate(steps):
            expected = BY_HAND[kind]([float(torch.tensor(value)) for value in values])
            assert float(found[row]) == pytest.approx(expected, rel=1e-12, abs=1e-12), kind


def test_an_answer_without_steps_is_0_and_equal_steps_in_another_order_tie():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert all(float(aggregate_steps(torch.ones(1, 3), nothing, kind)) == 0 for kind in OUTCOMES)
    scores = torch.tensor(PERMUTED, dtype=torch.float64)
    for kind in ("mean", "product"):
        first, second = aggregate_steps(scores, torch.ones(2, 4, dtype=torch.bool), kind)
        assert first == second
    with pytest.raises(ValueError, match="median"):
        aggregate_steps(scores, torch.ones(2, 4, dtype=torch.bool), "median")


ROWS = (
    ([5, DOT, NEWLINE, 6, END], True, [2, 3]),  # the end token belongs to no step
    ([5, NEWLINE, NEWLINE, 6, 6], False, [2, 4]),  # empty lines are no steps
    ([5, 6, NEWLINE, END], True, [2]),
    # Nor are lines of blanks, where there are others.
    ([NEWLINE, 5, NEWLINE, BLANK, NEWLINE, 6, NEWLINE, BLANK], False, [2, 6]),
    ([BLANK, NEWLINE, BLANK, END], True, [1, 2]),
    ([END], True, [0]),
    ([5, 6], True, [0]),  # the last token is an end token, whatever its id
)


def test_steps_end_where_the_prm_has_learned_to_judge():
    width = max(len(ids) for ids, _, _ in ROWS)
    tokens = torch.full((len(ROWS), width), NEWLINE)
    valid = torch.zeros(len(ROWS), width, dtype=torch.bool)
    for row, (ids, _, _) in enumerate(ROWS):
        tokens[row, : len(ids)], valid[row, : len(ids)] = torch.tensor(ids), True
    ended = torch.tensor([ended for _, ended, _ in ROWS])
    steps = torch.zeros_like(tokens)
    for row, (ids, is_whole, _) in enumerate(ROWS):
        pieces = [{NEWLINE: "\n", BLANK: " "}.get(token, "x") for token in ids]
        numbers = line_numbers([*pieces[:-1], ""] if is_whole else pieces, True)
        steps[row, : len(ids)] = torch.tensor(numbers)
    blank = torch.isin(tokens, torch.tensor([NEWLINE, BLANK]))
    found = step_ends(steps, valid, ended, blank)
    for row, (_, _, expected) in enumerate(ROWS):
        assert found[row].nonzero().flatten().tolist() == expected, row


def test_a_score_outside_its_range_is_no_probability():
    outputs = torch.tensor([-0.1, 0.05, 1.03])
    assert step_probabilities(outputs, "score").tolist() == pytest.approx([0.0, 0.05, 1.0])
    expected = [1 / (1 + math.exp(-float(x))) for x in outputs]
    assert step_probabilities(outputs, "logit").tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="odds"):
        step_probabilities(outputs, "odds")


class Run:
    """The part of a context that is read."""

    def __init__(self, config: Config):
        self.config = config


class Cutter:
    """Of two steps."""

    def blanks_apart(self, rollout):
        return torch.tensor([[0, 0, 1, 1, 1]])

    def blanks(self, rollout):
        return torch.tensor([[False, True, False, False, False]])


def test_sequence_rewards_follow_the_configuration():
    prompt, answer = [4, 4, 4], [5, NEWLINE, 6, DOT, END]
    rollout = RolloutBatch(
        rows=(torch.tensor(prompt + answer),),
        prompt_lengths=torch.tensor([3]),
        group_ids=torch.tensor([0]),
        sample_ids=torch.tensor([0]),
        from_reference=torch.tensor([False]),
        ended=torch.tensor([True]),
    )
    rewards = torch.tensor([[9.0, 1.0, 9.0, -2.0, 4.0]])

    def of(**keys):
        config = make_config(
            reward={"outcome": keys.pop("outcome")},
            mask={"message_reward": keys.pop("message_reward", "mean")},
            reward_model=keys,
        )
        valid = rollout.response_mask

        return float(sequence_rewards(Run(config), rollout, rewards, valid, Cutter()))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    steps = [sigmoid(1.0), sigmoid(-2.0)]
    for kind in OUTCOMES:
        assert of(outcome=kind) == pytest.approx(BY_HAND[kind](steps), rel=1e-6)
    assert of(outcome="min", output="score") == 0.0
    assert of(outcome="tokens") == pytest.approx(21 / 5)
    assert of(outcome="tokens", message_reward="last") == 4.0
