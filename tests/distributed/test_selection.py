"""Replicas may learn from different numbers of answers, none too: the same run on every layout."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from megatron_amrlhf.report.files import read_jsonl
from tests.distributed.runs import (
    assert_same_numbers,
    make_models,
    numbers,
    start,
    write_config,
)

pytestmark = pytest.mark.distributed

LAYOUT = (2, 2, 2)  # TP, PP, DP
PROMPTS, ANSWERS = 4, 3
TAKEN = 5  # of them, by the threshold
EVERY = 100  # more samples than there are
SELECTIONS = {
    "all": ("dpo", {"pairs": "all_pairs"}),
    "one": ("dpo", {"pairs": "margin", "pair_margin": "ONE PAIR"}),
    "none": ("dpo", {"pairs": "margin", "pair_margin": 1e6}),
    "top": ("rejection_sampling", {"select": "top_k", "k": 2}),
    "above": ("rejection_sampling", {"select": "threshold", "threshold": "SOME"}),
    "chance": (
        "rejection_sampling",
        {"select": "threshold", "threshold": "SOME", "control": "random"},
    ),
}
PER_PROMPT = {"all": ANSWERS, "one": 1 / PROMPTS, "none": 0.0, "top": 2.0}


def first_step(run: Path) -> list:
    return [sample for sample in read_jsonl(run / "samples.jsonl") if sample["step"] == 1]


def taken_of(run: Path) -> list:
    """The answers that are learned from; the others are logged too."""
    assert len(first_step(run)) == PROMPTS * ANSWERS
    return [sample for sample in first_step(run) if sample["use"] == "chosen"]


class World:
    """Rewards of the first step's answers, and one run of each selection on one process."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_models(folder)
        self.rewards = self._rewards()
        self.runs = {name: self.start(name, 1, 1, 1) for name in SELECTIONS}

    def _rewards(self) -> dict[str, list[float]]:
        config = write_config(
            self.folder,
            "rejection_sampling",
            run={"name": "every", "steps": 1, "log_samples": EVERY},
            algorithm={"select": "top_k", "k": ANSWERS},
        )
        found = defaultdict(list)
        for sample in first_step(start(self.folder, config, 1, 1, 1)):
            found[sample["prompt"]].append(sample["sequence_reward"])
        assert [len(rewards) for rewards in found.values()] == [ANSWERS] * PROMPTS
        return found

    def margin_of_one_pair(self) -> float:
        """Between the largest and the second largest difference of two answers to a prompt."""
        differences = sorted(a - b for row in self.rewards.values() for a in row for b in row)
        return sum(differences[-2:]) / 2

    def reward_of_some(self) -> float:
        """A threshold that `TAKEN` answers reach."""
        ordered = sorted(reward for row in self.rewards.values() for reward in row)
        return sum(ordered[-TAKEN - 1 : -TAKEN + 1]) / 2

    def start(self, name: str, tp: int, pp: int, dp: int) -> Path:
        kind, algorithm = SELECTIONS[name]
        known = {"ONE PAIR": self.margin_of_one_pair(), "SOME": self.reward_of_some()}
        algorithm = {key: known.get(value, value) for key, value in algorithm.items()}
        run = {"name": name, "steps": 1, "log_samples": EVERY}
        config = write_config(self.folder, kind, run=run, algorithm=algorithm)
        return start(self.folder, config, tp, pp, dp)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("selection"))


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection_is_invariant_to_layout(world, name):
    assert_same_numbers(world.runs[name], world.start(name, *LAYOUT))
    if name == "all":  # in the first step policy and reference agree
        assert numbers(world.runs[name])[0]["dpo/accuracy"] == 0.5


@pytest.mark.parametrize("name", PER_PROMPT)
def test_as_many_are_learned_from_as_asked_for(world, name):
    line = numbers(world.runs[name])[0]
    assert line["selection/per_prompt"] == PER_PROMPT[name]
    assert ("loss/policy" in line) == (name != "none")


def test_threshold_takes_the_answers_above_it_and_no_other(world):
    taken = sorted(sample["sequence_reward"] for sample in taken_of(world.runs["above"]))
    every = sorted(reward for row in world.rewards.values() for reward in row)
    assert taken == every[-TAKEN:]


def test_the_control_takes_as_many_answers_of_each_prompt_by_chance(world):
    taken, by_chance = (
        [(sample["prompt"], sample["sequence_reward"]) for sample in taken_of(world.runs[name])]
        for name in ("above", "chance")
    )
    assert sorted(prompt for prompt, _ in taken) == sorted(prompt for prompt, _ in by_chance)
    assert sorted(taken) != sorted(by_chance)
