"""Plans by hand-counted rows, moved by offloading, warned about, and improved."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_amrlhf.cli import main
from megatron_amrlhf.config.algorithm_section import Pass
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.planning.advice import Machine, suggest, warnings
from megatron_amrlhf.planning.models import model_config, reward_configs
from megatron_amrlhf.planning.plan import Plan, make_plan
from megatron_amrlhf.planning.roles import planned_roles, row_lengths

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
SIZES = {
    "model_type": "qwen2",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
EXAMPLES = [
    ("ppo_qwen2_7b", "qwen2-7b", 8),
    ("ppo_llama3_70b", "llama-3.1-70b", 64),
    ("ppo_llama3_405b", "llama-3.1-405b", 512),
]


def config_of(tmp_path, kind="ppo", overrides=(), **sections):
    record = {
        "run": {"name": "plan"},
        "model": {"path": "none"},
        "reward_model": {"path": "none"},
        "algorithm": {"kind": kind},
        "data": {"train": "none", "max_prompt_tokens": 100, "max_row_tokens": 400},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 250},
        **sections,
    }
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(record))
    return load_config(path, list(overrides))


def roles_of(config):
    rewards, _ = reward_configs(config, SIZES)
    return planned_roles(config, SIZES, rewards)


def plan_of(tmp_path, data=1, overrides=(), **sections) -> Plan:
    config = config_of(tmp_path, overrides=overrides, **sections)
    return make_plan(config, data, roles_of(config))


def updates_of(config, data: int) -> list[Pass]:
    return [x for x in config.algorithm.passes(config, data) if x.phase == "update"]


@pytest.mark.parametrize(
    ("algorithm", "rows", "times", "together"),
    [
        ({"kind": "ppo", "minibatches": 4, "epochs": 2}, 4, 8, 1),  # 4 prompts of 4 answers
        ({"kind": "grpo"}, 16, 1, 1),
        ({"kind": "kto", "minibatches": 2}, 8, 2, 1),
        ({"kind": "dpo"}, 8, 1, 2),  # best and worst of each prompt
        ({"kind": "dpo", "pairs": "all_pairs"}, 48, 1, 2),  # 6 pairs a prompt
        ({"kind": "rejection_sampling"}, 4, 1, 1),
        ({"kind": "rejection_sampling", "select": "threshold"}, 16, 1, 1),
    ],
)
def test_rows_of_an_update(tmp_path, algorithm, rows, times, together):
    config = config_of(tmp_path, kind=algorithm["kind"], algorithm=algorithm)
    found = updates_of(config, data=2)[0]
    assert (found.role, found.rows, found.times, found.together) == ("actor", rows, times, together)


def test_the_reference_decodes_its_share(tmp_path):
    config = config_of(tmp_path, overrides=["rollout.reference_samples_per_prompt=1"])
    rollouts = [
        (x.role, x.rows) for x in config.algorithm.passes(config, 1) if x.phase == "rollout"
    ]
    assert rollouts == [("actor", 24), ("reference", 8)]


def test_rows_are_as_long_as_they_may_be(tmp_path):
    assert vars(row_lengths(config_of(tmp_path))) == {"prompt": 100, "response": 250}
    algorithm = {"kind": "prm"}
    prm = config_of(tmp_path, algorithm=algorithm, kind="prm")
    assert vars(row_lengths(prm)) == {"prompt": 399, "response": 1}
    assert [role.name for role in roles_of(prm)] == ["prm"]


def test_every_layer_and_parameter_is_on_one_stage(tmp_path):
    whole = plan_of(tmp_path).stages[0].specs[0].num_parameters
    cut = plan_of(tmp_path, overrides=["parallel.pipeline=4", "parallel.tensor=2"])
    assert sum(stage.specs[0].num_layers for stage in cut.stages) == 8
    halved = sum(stage.specs[0].num_parameters for stage in cut.stages)
    assert whole / 2 < halved < whole / 2 * 1.01  # norms are on both tensor ranks
    assert [list(cut.ranks(stage)) for stage in (0, 3)] == [[0, 1], [6, 7]]


def test_offloading_moves_bytes_to_the_host(tmp_path):
    plain = plan_of(tmp_path, data=2).stages[0].memory
    keys = [
        "engine.roles.reference.offload_parameters=cpu",
        "engine.roles.actor.offload_optimizer=cpu",
    ]
    moved = plan_of(tmp_path, data=2, overrides=keys).stages[0].memory
    assert moved["resting"].host > 0 == plain["resting"].host
    for memory in (plain, moved):
        assert memory["resting"].total == memory["resting"].weights + memory["resting"].optimizer
    both = moved["resting"].total + moved["resting"].host
    assert both == plain["resting"].total
    on_disk = plan_of(
        tmp_path, data=2, overrides=["engine.nvme_folder=/x", *(x[:-3] + "nvme" for x in keys)]
    )
    assert on_disk.stages[0].memory["resting"].disk == moved["resting"].host
    assert on_disk.stages[0].memory["resting"].host == 0 == moved["resting"].disk
    # While it scores, the reference is on the device whole.
    assert moved["score reference"].gathered == plain["score reference"].gathered


def lines(plan: Plan, gib: float = 80.0) -> str:
    return "\n".join(warnings(plan, Machine(int(gib * GIB), gpus_a_node=2)))


def test_poor_layouts_are_named(tmp_path):
    assert lines(plan_of(tmp_path)) == ""
    assert "does not fit: 'update" in lines(plan_of(tmp_path), gib=1)
    waits = plan_of(tmp_path, overrides=["parallel.pipeline=8", "algorithm.minibatches=4"])
    assert "'update actor' waits 78% of its time: 2 micro-batches on 8 stages" in lines(waits)
    wide = lines(plan_of(tmp_path, overrides=["parallel.tensor=4"]))
    assert "parallel.tensor = 4 crosses nodes of 2 GPUs" in wide
    assert "parallel.sequence: true would save" in wide
    ends = ["parallel.pipeline=2", "parallel.first_stage_layers=7", "parallel.last_stage_layers=1"]
    uneven = plan_of(tmp_path, overrides=ends)
    assert "set parallel.first_stage_layers" in lines(uneven, gib=8)
    assert "set parallel.first_stage_layers" not in lines(uneven, gib=80)
    cached = plan_of(tmp_path, overrides=["rollout.prompts_per_step=512"])
    share = cached.worst.memory["rollout"].cache / GIB
    assert "keys and values take" in lines(cached, gib=share / 0.41)
    assert "keys and values take" not in lines(cached, gib=share / 0.39)
    gathered = plan_of(tmp_path, data=2)
    assert "engine.gather and engine.reduce: microbatch" in lines(gathered, gib=1.5)


def test_suggestions_fit_and_are_what_they_say(tmp_path):
    config = config_of(tmp_path)
    roles, machine = roles_of(config), Machine(4 * GIB)
    found = suggest(config, roles, [SIZES], world_size=8, machine=machine, share=0.9)
    assert len(found) > 3
    assert [x.seconds for x in found] == sorted(x.seconds for x in found)
    for each in found:
        assert each.plan.world_size == 8 and each.plan.worst.peak <= 0.9 * 4 * GIB
        keys = [f"{key}={json.dumps(value)}" for key, value in each.changes.items()]
        again = make_plan(config_of(tmp_path, overrides=keys), each.plan.data, roles)
        assert again.worst.peak == each.plan.worst.peak
    assert suggest(config, roles, [SIZES], world_size=8, machine=Machine(GIB // 4), share=0.9) == []


@pytest.mark.parametrize(("name", "model", "gpus"), EXAMPLES)
def test_the_examples_fit_80_gib(name, model, gpus, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ["--model", str(ROOT / "configs" / "models" / model), "--gpus", str(gpus)]
    config = str(ROOT / "configs" / f"{name}.yaml")
    assert main(["plan", config, *options, "--memory", "80", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "fits: the peak is" in text and "warning" not in text
    record = json.loads(out.read_text())
    assert record["ranks"] == gpus and record["peak_bytes"] < 72 * GIB
    assert main(["plan", config, *options, "--memory", "20"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "must be a whole number of at least 1"),
        (["--memory", "-1"], "must be a number above 0"),
        (["--gpus", "12"], "12 processes do not divide"),
        (["--set", "parallel.tensor=3", "--gpus", "6"], "does not divide the model's 28"),
        (["--model", "nowhere"], "has not given its config.json"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = [] if "--model" in options else ["--model", str(ROOT / "configs/models/qwen2-7b")]
    assert main(["plan", str(ROOT / "configs/ppo_qwen2_7b.yaml"), *options, *model]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    start = time.monotonic()
    with pytest.raises(UserError, match="no folder 'no/such-model' here, and the hub has not"):
        model_config("no/such-model", "unused")
    assert time.monotonic() - start < 10, "it was asked again and again"
