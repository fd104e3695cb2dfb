"""Whole runs: the same numbers on every layout, everything left behind, resumed runs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from megatron_amrlhf.checkpoint.folders import find_latest
from megatron_amrlhf.report.files import read_jsonl
from tests.distributed.processes import run_on
from tests.distributed.runs import (
    assert_same_line,
    assert_same_numbers,
    make_models,
    numbers,
    read_metrics,
    read_start,
    run_config,
    saved_parts,
    start,
    write_config,
)

pytestmark = pytest.mark.distributed

LAYOUTS = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))  # TP, PP, DP
# (TP, PP, DP), what else the engine is told
CHOICES = {
    "interleaved": ((1, 2, 1), ["parallel.virtual_stages=2", "engine.zero_stage=1"]),
    "interleaved-sequence": (
        (2, 2, 1),
        ["parallel.virtual_stages=2", "parallel.sequence=true", "engine.recompute=full"],
    ),
    "uneven": (
        (1, 2, 2),
        ["parallel.first_stage_layers=1", "engine.gather=microbatch", "engine.reduce=microbatch"],
    ),
    "tokens": (
        (1, 1, 2),
        ["engine.micro_batch_tokens=320", "engine.logit_positions=24", "engine.zero_stage=0"],
    ),
    "offload": (
        (1, 1, 2),
        [
            "engine.roles.reference.offload_parameters=cpu",
            "engine.roles.actor.offload_optimizer=cpu",
            "engine.roles.critic.zero_stage=1",
            "engine.roles.prm.zero_stage=0",
        ],
    ),
    "disk": (
        (1, 1, 2),
        [
            "engine.nvme_folder=DISK",
            "engine.roles.reference.offload_parameters=nvme",
            "engine.roles.actor.offload_parameters=nvme",
            "engine.roles.actor.offload_optimizer=nvme",
            "engine.roles.critic.offload_optimizer=nvme",
            "engine.roles.prm.offload_parameters=nvme",
        ],
    ),
}
SAMPLES = "samples.jsonl"
REWARD_KINDS = ("prm", "orm")  # they train a reward model, on no answers of their own
KINDS = (*REWARD_KINDS, "ppo", "grpo", "dpo", "kto", "rejection_sampling")

OWN_METRICS = {
    "prm": {"eval/step_auc", "prm/accuracy", "loss/prm"},
    "orm": {"orm/accuracy", "orm/margin", "eval/pair_accuracy", "loss/orm"},
    "ppo": {"policy/approx_kl", "policy/clipfrac", "loss/value", "optimizer/critic_lr"},
    "grpo": {"policy/clipfrac", "loss/kl", "grpo/advantage", "grpo/flat_groups"},
    "dpo": {"dpo/accuracy", "dpo/margin"},
    "kto": {"kto/z0", "kto/slope", "reward/implicit_chosen"},
    "rejection_sampling": {"loss/nll", "loss/kl"},
}

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_TOLERANCE = 1e-4  # relative; other processors round otherwise


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process of every algorithm."""
    folder = tmp_path_factory.mktemp("runs")
    make_models(folder)
    configs = {kind: write_config(folder, kind) for kind in KINDS}
    return folder, configs, {kind: start(folder, configs[kind], 1, 1, 1) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_is_invariant_to_layout(reference, kind, layout):
    folder, configs, runs = reference
    assert_same_run(runs[kind], start(folder, configs[kind], *layout), kind, layout)


@pytest.mark.parametrize("kind", ["ppo", "dpo", "orm"])
@pytest.mark.parametrize("choice", CHOICES)
def test_run_is_invariant_to_how_the_engine_works(reference, kind, choice):
    folder, configs, runs = reference
    layout, overrides = CHOICES[choice]
    overrides = [key.replace("DISK", str(folder / "disk")) for key in overrides]
    start(folder, configs[kind], *layout, f"run.name={kind}-{choice}", *overrides)
    assert_same_run(runs[kind], folder / "runs" / f"{kind}-{choice}", kind, layout)


def assert_same_run(one: Path, other: Path, kind: str, layout: tuple[int, int, int]):
    assert_same_numbers(one, other)
    if kind in REWARD_KINDS or layout[2] > 1:
        return  # no samples, or those of the first replica only
    first, second = ((run / SAMPLES).read_text().splitlines() for run in (one, other))
    for a, b in zip(map(json.loads, first), map(json.loads, second), strict=True):
        assert a["token_ids"] == b["token_ids"] and a["mask"] == b["mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_run_leaves_all_it_promises(reference, kind):
    folder = reference[2][kind]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    for name in ("config.resolved.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "export"):
        assert (folder / name).exists(), name
    line = read_metrics(folder)[-1]
    expected = {"engine/grad_norm", "engine/skipped_steps", "time/update_seconds", "optimizer/lr"}
    expected |= {"memory/peak_gib", "throughput/update_tokens_per_second"}
    if kind not in REWARD_KINDS:
        expected |= {"reward/mean", "reward/chosen", "loss/policy"}
        if kind != "rejection_sampling":
            expected |= {"reward/rejected"}
        expected |= {"mask/kept_fraction", "mask/num_messages", "mask/mean_message_tokens"}
        expected |= {"kl/ref_nats", "policy/entropy_nats", "time/rollout_seconds"}
        expected |= {"time/score_seconds", "time/mask_seconds", "eval/reward_mean"}
        expected |= {"throughput/rollout_tokens_per_second"}
        sample = read_jsonl(folder / SAMPLES)[0]
        assert {"prompt", "answer", "token_rewards", "mask", "messages"} <= sample.keys()
        assert len(sample["mask"]) == len(sample["token_ids"]) == len(sample["tokens"])
        assert sample["messages"][-1]["end"] == len(sample["mask"])
        AutoModelForCausalLM.from_pretrained(folder / "export")
    expected |= OWN_METRICS[kind]
    assert expected <= line.keys(), expected - line.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_those_that_were_kept(reference, kind):
    """A refactor changes no bit: ``AMRLHF_GOLDEN=write`` writes them anew, ``git diff`` shows."""
    file, loss = GOLDEN / f"{kind}.txt", f"loss/{kind if kind in REWARD_KINDS else 'policy'}"
    found = [(x["step"], x[loss], x["engine/grad_norm"]) for x in numbers(reference[2][kind])]
    if os.environ.get("AMRLHF_GOLDEN") == "write":
        file.write_text("".join(f"{step} {value!r} {norm!r}\n" for step, value, norm in found))
    kept = [[float(x) for x in line.split()] for line in file.read_text().splitlines()]
    assert len(kept) == len(found) == 2
    for expected, line in zip(kept, found, strict=True):
        assert line == pytest.approx(expected, rel=GOLDEN_TOLERANCE, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_an_uninterrupted_one(reference, kind):
    """Stopped after step 1 and started again: the same lines and weights, bit for bit."""
    folder, configs, runs = reference
    config = configs[kind]
    name = f"run.name={kind}-resumed"
    run_on(1, run_config, str(config), [name, "run.steps=1"])
    run_on(1, run_config, str(config), [name])
    resumed = folder / "runs" / f"{kind}-resumed"
    assert numbers(resumed)[1] == numbers(runs[kind])[1]
    assert saved_parts(resumed) == saved_parts(runs[kind])
    starts = [[x["eval/reward_mean"] for x in read_start(run)] for run in (resumed, runs[kind])]
    assert starts[0] == starts[1] and len(starts[0]) == (kind not in REWARD_KINDS)


@pytest.mark.parametrize("kind", ["ppo", "dpo", "rejection_sampling"])
def test_a_run_resumes_at_another_layout(reference, kind):
    folder, configs, runs = reference
    options = [f"run.name={kind}-moved", "checkpoint.asynchronous=true", "checkpoint.every=1"]
    run_on(2, run_config, str(configs[kind]), [*options, "parallel.pipeline=2", "run.steps=1"])
    run_on(4, run_config, str(configs[kind]), [*options, "parallel.tensor=2"])
    moved = folder / "runs" / f"{kind}-moved"
    assert_same_line(numbers(runs[kind])[1], numbers(moved)[1])


def run_in_job(path: str, overrides: list[str], job: str, restarts: int) -> None:
    """As Slurm runs the same command again, in a process of its own."""
    os.environ |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}
    run_config(path, [*overrides, "checkpoint.resume=false"])


def test_a_run_from_the_start_sets_earlier_checkpoints_aside(reference):
    folder, configs, _ = reference
    name, config = ["run.name=prm-anew"], str(configs["prm"])
    run_on(1, run_config, config, [*name, "checkpoint.every=1"])
    # A job whose node failed before it had begun has not made the checkpoints that are there.
    run_on(1, run_in_job, config, [*name, "run.steps=1"], "7", 1)
    run = folder / "runs" / "prm-anew"
    assert find_latest(run / "checkpoints").name == "step-1"
    assert find_latest(run / "checkpoints-before-attempt-2").name == "step-2"
    assert len(numbers(run)) == 1
    run_on(1, run_in_job, config, name, "7", 2)
    assert len(numbers(run)) == 2 and not (run / "checkpoints-before-attempt-3").exists()
    run_on(1, run_in_job, config, [*name, "run.steps=1"], "8", 1)
    assert len(numbers(run)) == 1 and (run / "checkpoints-before-attempt-4").exists()
    assert (run / "metrics-before-attempt-4.jsonl").read_text().count("\n") == 2


def test_a_run_with_more_steps_than_it_should_have_is_refused(reference):
    folder, configs, _ = reference
    name = "run.name=prm-fewer"
    run_on(1, run_config, str(configs["prm"]), [name])
    with pytest.raises(AssertionError, match="step-2 has more steps than the run's 1: raise run"):
        run_on(1, run_config, str(configs["prm"]), [name, "run.steps=1"])
    assert len(numbers(folder / "runs" / "prm-fewer")) == 2


def test_a_run_does_not_resume_on_other_data(reference):
    folder, configs, _ = reference
    name = "run.name=prm-other-data"
    run_on(1, run_config, str(configs["prm"]), [name, "run.steps=1"])
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "others.jsonl").write_text("".join(reversed(lines)))
    changed = [name, f"data.train={folder / 'others.jsonl'}"]
    with pytest.raises(AssertionError, match="is not what the checkpoint was trained on"):
        run_on(1, run_config, str(configs["prm"]), changed)
    run_on(1, run_config, str(configs["prm"]), [*changed, "checkpoint.accept_changed_data=true"])


def test_an_exported_orm_gives_one_reward_to_a_whole_answer(reference):
    folder, configs, runs = reference
    export = runs["orm"] / "export"
    assert json.loads((export / "config.json").read_text())["reward_kind"] == "outcome"
    kind = json.loads((runs["prm"] / "export" / "config.json").read_text())["reward_kind"]
    assert kind == "process"
    model = f"reward_model.path={export}"
    start(folder, configs["grpo"], 1, 1, 1, model, "run.name=grpo-orm", "run.steps=1")
    for sample in read_jsonl(folder / "runs" / "grpo-orm" / SAMPLES):
        assert len(set(sample["token_rewards"])) == 1
        assert math.isclose(sample["token_rewards"][0], sample["sequence_reward"], abs_tol=1e-3)


def test_no_mask_keeps_every_token(reference):
    folder, configs, _ = reference
    start(folder, configs["ppo"], 1, 1, 1, "mask.kind=none", "run.name=ppo-none")
    lines = numbers(folder / "runs" / "ppo-none")
    assert lines and all(line["mask/kept_fraction"] == 1 for line in lines)


def test_a_policy_that_was_trained_to_infinities_is_told_as_that(reference):
    folder, configs, _ = reference
    options = ["run.name=grpo-far", "optimizer.lr=1e9", "evaluation.prompts=0"]
    told = "NotFinite: step 2: the log-probs of the actor are not finite for .* its weights are"
    with pytest.raises(AssertionError, match=told):
        run_on(1, run_config, str(configs["grpo"]), options)
    assert len(numbers(folder / "runs" / "grpo-far")) == 1


def test_answers_of_neutral_tokens_alone_are_counted_and_teach_nothing(reference):
    folder, configs, _ = reference
    neutral = ["mask.delta=1000000.0", "mask.neutral=drop", "run.name=ppo-neutral"]
    neutral += ["loss.denominator=kept"]  # which counts nothing: the loss is 0, not null
    start(folder, configs["ppo"], 1, 1, 1, *neutral)
    for line in numbers(folder / "runs" / "ppo-neutral"):
        assert line["mask/empty_answers"] == 1 and line["mask/kept_fraction"] == 0
        assert line["loss/policy"] == line["engine/grad_norm"] == 0
        assert line["engine/skipped_steps"] == 0 and line["loss/value"] > 0
