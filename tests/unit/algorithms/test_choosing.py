"""Who is chosen: by the critic's value in its own units, and by chance as often as by reward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.algorithms.grpo import Grpo
from megatron_amrlhf.algorithms.ppo import Ppo
from megatron_amrlhf.algorithms.rejection_sampling import RejectionSampling
from megatron_amrlhf.experience.dense import DenseRewards
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.types import RolloutBatch, ScoredBatch
from tests.unit.config.samples import make_config

NAN = torch.nan
GAMMA, KL_COEF = 0.5, 0.25


def experience_of(
    shaped: list[list[float]],
    values: list[list[float]],
    sequences: list[float],
    answers: int,
    logratios: list[list[float]] | None = None,
) -> Experience:
    """Answers of as many tokens as they have rewards, ``answers`` a prompt; NaN is a failed one."""
    rows = len(shaped)
    rollout = RolloutBatch(
        rows=tuple(torch.arange(2 + len(row)) for row in shaped),
        prompt_lengths=torch.full((rows,), 2),
        group_ids=torch.arange(rows) // answers,
        sample_ids=torch.arange(rows),
        from_reference=torch.zeros(rows, dtype=torch.bool),
        ended=torch.ones(rows, dtype=torch.bool),
    )
    valid = rollout.response_mask

    def rectangle(lists):
        return torch.tensor([row + [0.0] * (valid.shape[1] - len(row)) for row in lists])

    zeros, whole = torch.zeros(valid.shape), torch.tensor(sequences)
    scored = ScoredBatch(
        token_rewards=zeros,
        sequence_rewards=whole,
        logprobs=rectangle(logratios) if logratios else zeros,
        reference_logprobs=zeros,
        values=rectangle(values),
        bootstrap_values=torch.zeros(rows),
        response_mask=valid & ~whole.isnan()[:, None],
    )
    dense = DenseRewards(
        signal=zeros,
        baseline=zeros[:, :1],
        delta=torch.tensor(0.0),
        signs=zeros.to(torch.int8),
        messages=zeros.long(),
        message_rewards=zeros,
        shaped=rectangle(shaped),
        sequence_rewards=whole,
    )
    return Experience(rollout, scored, dense)


def algorithm_of(kind: type, **sections) -> Ppo | RejectionSampling:
    algorithm = object.__new__(kind)  # no prompts, no PRM folder
    mesh = SimpleNamespace(dp_group=None, device=torch.device("cpu"))
    config = make_config(**sections)
    algorithm.context = SimpleNamespace(config=config, mesh=mesh)
    algorithm.section = config.algorithm
    return algorithm


# The critic's values are of shaped rewards, which lie elsewhere than the raw ones.
SHAPED = [[0.0, 0.4], [0.5, -0.5, 0.0], [-1.0], [9.0, 9.0]]
VALUES = [[0.15, 5.0], [0.3, 5.0, 5.0], [-1.5], [0.0, 0.0]]
RAW = [0.9, 0.2, -3.0, NAN]


@pytest.mark.parametrize(
    ("kl_coef", "expected"),
    [
        # returns 0 + 0.5 * 0.4 = 0.2 > 0.15, 0.5 - 0.25 = 0.25 < 0.3, -1 > -1.5
        (0.0, [True, False, True, False]),
        # less 0.25 of 0.5 * 0.8, of -0.4, of 4: 0.1 < 0.15, 0.35 > 0.3, -2 < -1.5
        (KL_COEF, [False, True, False, False]),
    ],
)
def test_labels_by_value_compare_the_return_with_the_value_before_it(kl_coef, expected):
    algorithm = {"gamma": GAMMA, "gae_lambda": 1.0, "kl_coef": kl_coef}
    ppo = algorithm_of(Ppo, mask={"label": "value"}, algorithm=algorithm)
    logratios = [[0.0, 0.8], [-0.4, 0.0, 0.0], [4.0], [0.0, 0.0]]
    experience = experience_of(SHAPED, VALUES, RAW, 2, logratios)
    rows, labels = ppo.choose(experience, 1)
    assert rows.tolist() == [0, 1, 2, 3] and labels.tolist() == expected
    by_raw_reward = [reward > row[0] for reward, row in zip(RAW, VALUES, strict=True)]
    assert by_raw_reward == [True, False, False, False]


def test_the_other_labels_are_by_the_answers_own_rewards():
    experience = experience_of(SHAPED, VALUES, RAW, 2)
    for label, expected in (
        ("group", [True, False, False, False]),  # 0.9 > 0.55, and one alone is a tie
        ("batch", [True, True, False, False]),  # the mean of the three is -0.63
    ):
        ppo = algorithm_of(Ppo, mask={"label": label})
        assert ppo.choose(experience, 1)[1].tolist() == expected, label


ANSWERS, PROMPTS = 6, 4
REWARDS = [
    *[0.5, 2.0, -1.0, 2.0, 3.0, 1.0],
    *[NAN, 0.0, NAN, NAN, 4.0, 5.0],  # fewer than three are left, two above 1
    *[NAN] * 6,
    *[-1.0, -2.0, NAN, 0.0, 0.5, NAN],  # none above 1
]
SELECTIONS = {
    "best": ({"select": "best"}, [1, 1, 0, 1]),
    "top_k": ({"select": "top_k", "k": 4}, [4, 3, 0, 4]),
    "threshold": ({"select": "threshold", "threshold": 1.0}, [4, 2, 0, 0]),
}


def selected(steps: range, **algorithm) -> list[list[int]]:
    """Rows that are selected in each step."""
    kind = {"kind": "rejection_sampling", **algorithm}
    sampling = algorithm_of(RejectionSampling, algorithm=kind)
    tokens = [[0.0]] * (ANSWERS * PROMPTS)
    experience = experience_of(tokens, tokens, REWARDS, ANSWERS)
    found = []
    for step in steps:
        rows, labels = sampling.select(experience, step)
        assert bool(labels.all()) and len(labels) == len(rows)
        found.append(rows.tolist())
    return found


def per_prompt(rows: list[int]) -> list[int]:
    return [sum(row // ANSWERS == prompt for row in rows) for prompt in range(PROMPTS)]


@pytest.mark.parametrize("name", SELECTIONS)
def test_chance_picks_as_many_answers_of_each_prompt_as_the_selection(name):
    algorithm, counts = SELECTIONS[name]
    (by_reward,) = selected(range(1, 2), **algorithm)
    assert per_prompt(by_reward) == counts
    by_chance = selected(range(1, 21), **algorithm, control="random")
    for rows in by_chance:
        assert per_prompt(rows) == counts and len(set(rows)) == len(rows)
        assert not any(REWARDS[row] != REWARDS[row] for row in rows)
    assert any(set(rows) != set(by_reward) for rows in by_chance)
    first = [row for rows in by_chance for row in rows if row < ANSWERS]
    assert set(first) == set(range(ANSWERS))  # every answer has its chance
    again = selected(range(1, 21), **algorithm, control="random")
    assert again == by_chance


def test_an_answer_that_is_its_groups_mean_but_for_rounding_is_rejected():
    rewards = [1.1, 1.2, 1.3]
    assert torch.tensor(rewards).double().mean() < torch.tensor(rewards)[1].double()
    tokens = [[0.0]] * 3
    grpo = algorithm_of(Grpo, algorithm={"kind": "grpo"})
    assert grpo.choose(experience_of(tokens, tokens, rewards, 3), 1)[1].tolist() == [
        False,
        False,
        True,
    ]
