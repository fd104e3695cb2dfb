"""Whole runs with the mask's and the rewards' other choices: any layout, and resumed."""

from __future__ import annotations

import pytest

from tests.distributed.processes import run_on
from tests.distributed.runs import (
    assert_same_numbers,
    make_models,
    numbers,
    run_config,
    saved_parts,
    start,
    write_config,
)

pytestmark = pytest.mark.distributed

LAYOUT = (1, 2, 2)  # TP, PP, DP
# name -> (algorithm, sections): each choice that is no default stands in one of them
THREE_HELDOUT = {"evaluation": {"prompts": 3}}
RUNS: dict[str, tuple[str, dict]] = {
    "td-error": (
        "ppo",
        {
            "algorithm": {"gamma": 0.95, "bootstrap_truncated": True},
            "mask": {
                "signal": "td_error",
                "threshold": "sequence",
                "neutral": "drop",
                "label": "batch",
            },
            "reward": {"granularity": "token"},
        },
    ),
    "advantage": (
        "ppo",
        {
            "mask": {
                "signal": "advantage",
                "threshold": "running",
                "running_decay": 0.8,
                "message_reward": "last",
                "label": "value",
            },
            "reward": {"normalise": "none", "granularity": "sequence", "placement": "spread"},
        },
    ),
    "reward": (
        "ppo",
        {
            "mask": {"threshold": "group", "delta_unit": "signal"},
            "reward": {"granularity": "step", "outcome": "product"},
        },
    ),
    "implicit": (
        "dpo",
        {
            "mask": {
                "signal": "implicit",
                "threshold": "fixed",
                "fixed_value": 1e-3,
                "delta": 0.0,
            },
        },
    ),
    "labels": (
        "kto",
        {
            "mask": {"threshold": "sequence", "label": "batch"},
            "rollout": {"truncated": "penalise", "truncated_penalty": 0.5},
        },
    ),
    # Parts of a step, and three held-out prompts, which are not as many for each replica.
    "ppo-parts": ("ppo", {"algorithm": {"minibatches": 3, "epochs": 2}, **THREE_HELDOUT}),
    "dpo-parts": ("dpo", {"algorithm": {"minibatches": 3, "pairs": "all_pairs"}, **THREE_HELDOUT}),
    "kto-parts": ("kto", {"algorithm": {"minibatches": 5}, **THREE_HELDOUT}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process of every run."""
    folder = tmp_path_factory.mktemp("runs")
    make_models(folder)
    found = {}
    for name, (kind, sections) in RUNS.items():
        few = {"run": {"name": name}, "evaluation": {"prompts": 0}, "checkpoint": {"export": False}}
        config = write_config(folder, kind, **few | sections)
        found[name] = config, start(folder, config, 1, 1, 1)
    return folder, found


@pytest.mark.parametrize("name", RUNS)
def test_run_is_invariant_to_layout(reference, name):
    folder, found = reference
    config, run = found[name]
    assert all(0 < line["mask/kept_fraction"] < 1 for line in numbers(run))
    assert_same_numbers(run, start(folder, config, *LAYOUT))


def test_a_resumed_run_goes_on_with_its_running_threshold(reference):
    """Stopped after step 1 and started again: the same lines and weights, bit for bit."""
    folder, found = reference
    config, run = found["advantage"]
    name = "run.name=resumed"
    run_on(1, run_config, str(config), [name, "run.steps=1"])
    run_on(1, run_config, str(config), [name])
    resumed = folder / "runs" / "resumed"
    assert numbers(resumed) == numbers(run)
    assert saved_parts(resumed) == saved_parts(run)
