"""PPO's options: values behind cut-off answers, the KL in the loss, steps by sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_amrlhf.experience.maker import ExperienceMaker
from megatron_amrlhf.parallel.mesh import build_mesh
from tests import reference
from tests.distributed.contexts import (
    NO_PROMPTS,
    make_config,
    make_context,
    prm_rewarder,
    random_rollout,
    shard_rollout,
)
from tests.distributed.processes import run_on
from tests.distributed.runs import assert_same_numbers, make_models, numbers, start, write_config
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1, 1), (2, 2, 2)]  # (TP, PP, DP)
VOCAB_SIZE, HIDDEN = 131, 48
LENGTHS = [(3, 9), (3, 2), (7, 1), (7, 5), (2, 8), (2, 8)]  # (prompt, response)
ENDED = torch.tensor([True, False, False, True, False, True])
# float32 on both sides of some 50 layers of sums
TOLERANCE = 1e-4


def whole_rollout():
    return replace(random_rollout(LENGTHS, VOCAB_SIZE, seed=6), ended=ENDED)


def score(folder: str, tensor: int, pipeline: int, bootstrap: bool):
    """(values, bootstrap values) of this replica on a last stage."""
    mesh = build_mesh(tensor, pipeline)
    algorithm = {"kind": "ppo", "bootstrap_truncated": bootstrap}
    context = make_context(make_config(folder, mesh, algorithm), mesh)
    for role, head in (("actor", None), ("reference", None), ("prm", 1), ("critic", 1)):
        context.role(role, Path(folder), head)
    rewarder = prm_rewarder(context)
    maker = ExperienceMaker(context, temperature=1.0, rewarder=rewarder, offline=None)
    scored, _ = maker.score(shard_rollout(whole_rollout(), mesh), NO_PROMPTS, 1)
    if scored is None or mesh.tp_rank:
        return None
    lengths = scored.response_mask.sum(dim=1).tolist()
    values = [row[:n] for row, n in zip(scored.values, lengths, strict=True)]
    return values, scored.bootstrap_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder, "qwen2", vocab_size=VOCAB_SIZE, hidden=HIDDEN)
    reference.add_head(folder, HIDDEN, 1, seed=1)
    return folder


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_are_those_of_the_states_around_each_token(folder, layout, bootstrap):
    tensor, pipeline, data = layout
    found = run_on(tensor * pipeline * data, score, str(folder), tensor, pipeline, bootstrap)
    found = [rank for rank in found if rank is not None]
    values = [row for rank in found for row in rank[0]]
    after = torch.cat([rank[1] for rank in found])
    critic = reference.ReferenceModel(folder, True, reference.Hyper())
    rollout = whole_rollout()
    for row, (tokens, length) in enumerate(
        zip(rollout.rows, rollout.prompt_lengths.tolist(), strict=True)
    ):
        with torch.no_grad():
            hidden = critic.model.model(tokens[None]).last_hidden_state[0]
            states = critic.head(hidden)[length - 1 :, 0].float()
        torch.testing.assert_close(values[row], states[:-1], rtol=TOLERANCE, atol=TOLERANCE)
        expected = 0.0 if ENDED[row] or not bootstrap else float(states[-1])
        assert float(after[row]) == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with all the options on one process, and the same run as always."""
    folder = tmp_path_factory.mktemp("runs")
    make_models(folder)
    options = {"bootstrap_truncated": True, "kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.5}
    config = write_config(
        folder,
        "ppo",
        run={"name": "options"},
        algorithm=options,
        reward={"granularity": "step", "step_boundary": "sentence"},
    )
    return folder, config, start(folder, config, 1, 1, 1)


def test_run_with_options_is_invariant_to_layout(runs):
    folder, config, run = runs
    lines = numbers(run)
    assert all("loss/kl" in line for line in lines)
    assert lines[0]["loss/kl"] == pytest.approx(0.0, abs=1e-9) and lines[1]["loss/kl"] > 0
    assert_same_numbers(run, start(folder, config, 2, 2, 2))


def test_each_option_changes_what_is_learned(runs):
    folder, config, run = runs
    # In the first step policy and reference agree, so that the KL's gradient is 0.
    for option, metric in (
        ("bootstrap_truncated=false", "value/error"),
        ("kl_coef=0.0", "engine/grad_norm"),
    ):
        name = option.split("=")[0]
        start(folder, config, 1, 1, 1, f"algorithm.{option}", f"run.name={name}")
        assert numbers(folder / "runs" / name)[-1][metric] != numbers(run)[-1][metric], option
