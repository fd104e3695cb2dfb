"""Rules between keys: each broken one is named with its fix, a right run passes."""

import json
import shutil

import pytest

from megatron_amrlhf.config.checks import check_files, check_model, check_run, check_total_steps
from megatron_amrlhf.config.deepspeed import REPOSITORY
from megatron_amrlhf.errors import UserError
from tests.unit.config.samples import OFFLINE, ORM, PPO, PRM, make_config

SMOLLM2 = {
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
}


FLAT = {"mask": {"threshold": "sequence"}}
BY_FILE = {"mask": {"threshold": "offline", "offline_file": "statistics.json"}}


def message_of(check, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_right_runs_pass():
    check_run(make_config(PPO), 8)
    check_run(make_config(PRM), 16)
    check_run(make_config(ORM), 16)
    for kind in ("dpo", "rejection_sampling"):
        # nothing is sampled, so nothing of the rollout's rules applies
        rollout = {"samples_per_prompt": 1, "max_new_tokens": 9999}
        group = {"threshold": "group"}  # a pair's two answers
        check_run(make_config(OFFLINE, algorithm={"kind": kind}, rollout=rollout, mask=group), 8)
    for kind in ("grpo", "kto"):
        check_run(make_config(PPO, algorithm={"kind": kind}), 8)
        check_run(make_config(PPO, algorithm={"kind": kind, "minibatches": 16}), 4)
    check_run(make_config(PPO, parallel={"tensor": 2, "pipeline": 3}), 12)
    for normalise in ("none", "offline"):
        check_run(make_config(PPO, **BY_FILE, reward={"normalise": normalise}), 1)
    weights = {"prm_weight": 0, "verifiable_weight": 1}
    check_run(make_config(PPO, reward=weights, reward_model={"path": None}), 1)
    below = {"signal": "implicit", "threshold": "fixed", "fixed_value": -0.5, "delta": 0.1}
    for kind, mask in (
        ("dpo", {"signal": "implicit"}),
        ("rejection_sampling", below),
        ("ppo", below | {"delta_unit": "deviations", "fixed_value": 0.01}),
    ):
        check_run(make_config(PPO, algorithm={"kind": kind}, mask=mask), 1)
    for kind in ("auto", "prm800k", "math_shepherd", "helpsteer", "helpsteer_sentences"):
        check_run(make_config(PRM, data={"format": kind}), 1)


@pytest.mark.parametrize(
    ("base", "sections", "world_size", "expected"),
    [
        (PPO, {"parallel": {"tensor": 2, "pipeline": 3}}, 4, "2 x 3 = 6: start a multiple of 6"),
        (PPO, {"parallel": {"context": 2}}, 1, "context parallelism is not supported"),
        (PPO, {"parallel": {"sequence": True}}, 1, "parallel.sequence: splits positions"),
        (PPO, {"parallel": {"virtual_stages": 2}}, 1, "use parallel.pipeline >= 2"),
        (
            PPO,
            {"parallel": {"pipeline": 2, "virtual_stages": 2, "last_stage_layers": 1}},
            2,
            "parallel.virtual_stages 1",
        ),
        (
            PPO,
            {"engine": {"zero_stage": 1, "roles": {"prm": {"offload_parameters": "cpu"}}}},
            1,
            "engine.roles.prm.offload_parameters: cpu needs zero_stage 3, this role has 1",
        ),
        (
            PPO,
            {"engine": {"roles": {"actor": {"offload_optimizer": "nvme"}}}},
            1,
            "engine.roles.actor.offload_optimizer: nvme needs a folder, engine.nvme_folder",
        ),
        (
            PPO,
            {"algorithm": {"kind": "dpo"}, "engine": {"micro_batch_tokens": 5000}},
            1,
            "does not hold a pair of rows of data.max_row_tokens = 4096: use at least 8192",
        ),
        (
            PPO,
            {},
            3,
            "prompts_per_step = 8 does not divide by the 3 data-parallel replicas: use 6 or 9",
        ),
        (PPO, {}, 16, "replicas: use 16"),
        (PRM, {}, 3, "algorithm.batch_size = 16 does not divide by the 3"),
        (PPO, {"algorithm": {"minibatches": 65}}, 1, "use at most 64"),
        (PPO, {"algorithm": {"kind": "dpo", "minibatches": 5}}, 2, "use at most 4"),
        (
            PPO,
            {"rollout": {"reference_samples_per_prompt": 8}},
            1,
            "leaves no answer to the policy",
        ),
        (
            PPO,
            {"algorithm": {"kind": "dpo"}, "rollout": {"samples_per_prompt": 1}},
            1,
            "dpo compares answers",
        ),
        (
            PPO,
            {"algorithm": {"kind": "rejection_sampling"}, "rollout": {"samples_per_prompt": 1}},
            1,
            "use at least 2",
        ),
        (PPO, {"rollout": {"samples_per_prompt": 1}}, 1, "mask.label: group compares answers"),
        (PPO, {"reward_model": {"path": None}}, 1, "reward_model.path: is required"),
        (
            PPO,
            {"data": {"format": "steps"}},
            1,
            "data.format: algorithm.kind ppo needs prompts (got steps)",
        ),
        (PRM, {"data": {"format": "prompts"}}, 1, "data.format: algorithm.kind prm needs steps"),
        (
            PPO,
            {"algorithm": {"kind": "dpo"}, "mask": {"signal": "td_error"}},
            1,
            "td_error needs a critic, which dpo has not",
        ),
        (
            PPO,
            {"algorithm": {"kind": "dpo"}, "mask": {"signal": "advantage"}},
            1,
            "advantage needs a critic",
        ),
        (
            PPO,
            {"algorithm": {"kind": "dpo"}, "mask": {"label": "value"}},
            1,
            "mask.label: is read by algorithm.kind ppo, grpo or kto only (got value)",
        ),
        (ORM, {"data": {"format": "steps"}}, 1, "data.format: algorithm.kind orm needs pairs"),
        (ORM, {}, 3, "algorithm.batch_size = 16 does not divide by the 3"),
        (ORM, {"engine": {"micro_batch_size": 3}}, 1, "orm keeps pairs together, use an even"),
        (
            PPO,
            {"algorithm": {"kind": "dpo"}, "engine": {"micro_batch_size": 3}},
            1,
            "dpo keeps pairs together, use an even number (got 3)",
        ),
        (
            PPO,
            {"algorithm": {"kind": "grpo"}, "rollout": {"samples_per_prompt": 1}},
            1,
            "grpo compares answers to one prompt, use at least 2",
        ),
        (
            PPO,
            {"algorithm": {"kind": "grpo"}, "mask": {"label": "batch"}},
            1,
            "mask.label: batch is not for grpo, where the group-relative advantage decides",
        ),
        (
            PPO,
            {"algorithm": {"kind": "grpo"}, "mask": {"signal": "td_error"}},
            1,
            "td_error needs a critic, which grpo has not",
        ),
        (
            PPO,
            {"algorithm": {"kind": "grpo"}, "mask": {"signal": "implicit", "delta": 0.1}},
            1,
            "with mask.delta = 0.1 0 is neutral, so nothing would ever be learned",
        ),
        (
            PPO,
            {
                "algorithm": {"kind": "rejection_sampling"},
                "mask": {"signal": "implicit", "threshold": "fixed", "fixed_value": 0.5},
            },
            1,
            "of chosen answers 0 is kept by a baseline below 0 only: use mask.kind: none",
        ),
        (
            PPO,
            {
                "algorithm": {"kind": "dpo"},
                "mask": {"signal": "implicit"},
                "reward": {"granularity": "sequence"},
            },
            1,
            "reward.granularity: is read by algorithm.kind ppo and a mask.signal other than",
        ),
        (
            PPO,
            {"reward": {"prm_weight": 0, "verifiable_weight": 1}},
            1,
            "reward_model.path: is read by reward.prm_weight only",
        ),
        (
            PPO,
            {"algorithm": {"kind": "grpo", "minibatches": 65}},
            1,
            "more than the 64 answers a step",
        ),
        (
            PPO,
            {"algorithm": {"kind": "kto"}, "rollout": {"prompts_per_step": 1}},
            1,
            "kto's reference point pairs a prompt with an answer to another one, use at least 2",
        ),
        (
            PPO,
            {"algorithm": {"kind": "kto"}, "mask": {"kind": "none", "label": "value"}},
            1,
            "mask.label: value needs a critic, which kto has not: use group or batch",
        ),
        (
            PPO,
            {
                "algorithm": {"kind": "kto"},
                "mask": {"kind": "none"},
                "rollout": {"samples_per_prompt": 1},
            },
            1,
            "mask.label: group compares answers to one prompt",
        ),
        (
            PPO,
            {"algorithm": {"kind": "dpo", "pair_margin": 0.5}},
            1,
            "algorithm.pair_margin: is read by algorithm.pairs: margin only (got best_worst)",
        ),
        (
            PPO,
            {"algorithm": {"kind": "rejection_sampling", "k": 2}},
            1,
            "algorithm.k: is read by algorithm.select: top_k only (got best)",
        ),
        (
            PPO,
            {"algorithm": {"kind": "rejection_sampling", "threshold": 0.5}},
            1,
            "algorithm.threshold: is read by algorithm.select: threshold only (got best)",
        ),
        (
            PPO,
            {"algorithm": {"kind": "rejection_sampling", "select": "top_k", "k": 9}},
            1,
            "algorithm.k = 9 is more than the answers to a prompt: use at most",
        ),
        (
            PPO,
            {
                "algorithm": {
                    "kind": "rejection_sampling",
                    "select": "top_k",
                    "k": 2,
                    "minibatches": 9,
                },
            },
            2,
            "use at most 8",
        ),
        (
            PPO,
            {
                "mask": {"threshold": "group", "label": "batch"},
                "rollout": {"samples_per_prompt": 1},
            },
            1,
            "mask.threshold: group is the mean over the answers to a prompt, of which there is one",
        ),
        (
            OFFLINE,
            {"algorithm": {"kind": "ppo"}},
            1,
            "data.format: algorithm.kind ppo needs prompts (got pairs)",
        ),
        (
            OFFLINE,
            {"data": {"format": "steps"}},
            1,
            "data.format: algorithm.kind dpo needs prompts or pairs (got steps)",
        ),
        (OFFLINE, {"data": {"format": "prompts"}}, 1, "reward_model.path: is required"),
        (
            OFFLINE,
            {"algorithm": {"pairs": "all_pairs"}},
            1,
            "algorithm.pairs: the pairs of data.format: pairs are given (got all_pairs)",
        ),
        (
            OFFLINE,
            {"algorithm": {"kind": "rejection_sampling", "control": "random"}},
            1,
            "algorithm.control: the pairs of data.format: pairs are given",
        ),
        (
            OFFLINE,
            {"algorithm": {"kind": "rejection_sampling", "select": "threshold"}},
            1,
            "algorithm.select: the pairs of data.format: pairs are given",
        ),
        (OFFLINE, {"reward": {"verifiable_weight": 1}}, 1, "are not compared with anything"),
        (PPO, {"reward": {"prm_weight": 0}}, 1, "one of the reward's weights must be above 0"),
        (PPO, {"rollout": {"temperature": 1e-6}}, 1, "rollout.temperature = 1e-06 is too small"),
        (PPO, {"reward": {"orm_weight": 1}}, 1, "reward_model.orm_path: is required by"),
        (PPO, {"reward_model": {"orm_path": "x"}}, 1, "is read by reward.orm_weight only"),
        (PPO, {"mask": {"offline_file": "x"}}, 1, "mask.offline_file: is read by mask.threshold"),
        (PPO, {"mask": {"threshold": "offline"}}, 1, "mask.threshold: offline needs mask.offline"),
        (PPO, {"mask": {"threshold": "running"}}, 1, "mask.threshold: running follows nothing"),
        (PPO, {"reward": {"normalise": "offline"}}, 1, "reward.normalise: offline needs mask.off"),
        (PPO, FLAT | {"reward": {"granularity": "sequence"}}, 1, "mask.threshold: sequence cuts"),
        (
            PPO,
            FLAT | {"reward": {"prm_weight": 0, "verifiable_weight": 1}},
            1,
            "mask.threshold: sequence cuts nothing",
        ),
        (PPO, BY_FILE, 1, "does not fit rewards that are whitened by batch"),
        (
            PPO,
            {"mask": {**BY_FILE["mask"], "signal": "implicit"}, "reward": {"normalise": "none"}},
            1,
            "offline is about rewards, use mask.signal: reward (got implicit)",
        ),
        (
            PPO,
            {**BY_FILE, "reward": {"normalise": "offline", "verifiable_weight": 1}},
            1,
            "offline is about the PRM's scores alone",
        ),
        (
            PPO,
            {**BY_FILE, "reward": {"normalise": "none"}, "rollout": {"truncated": "penalise"}},
            1,
            "no rollout.truncated: penalise",
        ),
        (PPO, {"optimizer": {"betas": [0.9, 1.0]}}, 1, "optimizer.betas: both must be < 1"),
        (PPO, {"run": {"steps": 5}, "optimizer": {"warmup_steps": 5}}, 1, "use at most 4"),
        (PPO, {"data": {"max_row_tokens": 1000}}, 1, "raise it to 1536"),
        (PPO, {"run": {"name": "../x"}}, 1, "run.name: must be a plain folder name"),
    ],
)
def test_a_broken_rule_is_named_with_its_fix(base, sections, world_size, expected):
    assert expected in message_of(check_run, make_config(base, **sections), world_size)


def test_warm_up_counts_optimizer_steps_not_rollouts():
    sections = {"run": {"steps": 5}, "algorithm": {"epochs": 2, "minibatches": 2}}
    check_run(make_config(PPO, **sections, optimizer={"warmup_steps": 19}), 1)
    config = make_config(PPO, **sections, optimizer={"warmup_steps": 20})
    assert "use at most 19" in message_of(check_run, config, 1)
    sections["algorithm"]["kind"] = "grpo"
    config = make_config(PPO, **sections, optimizer={"warmup_steps": 20})
    assert "use at most 19" in message_of(check_run, config, 1)


def test_warm_up_is_checked_again_once_the_data_have_told_the_steps():
    config = make_config(PRM, run={"steps": None}, optimizer={"warmup_steps": 50})
    check_run(config, 1)
    check_total_steps(config, 51)
    assert "use at most 49" in message_of(check_total_steps, config, 50)


def test_an_unmasked_run_may_leave_mask_keys_as_they_are():
    check_run(
        make_config(PPO, algorithm={"kind": "dpo"}, mask={"kind": "none", "label": "value"}), 1
    )


def test_all_broken_rules_come_at_once():
    config = make_config(PPO, optimizer={"betas": [1.0, 0.9]}, reward_model={"path": None})
    message = message_of(check_run, config, 3)
    for part in ("optimizer.betas", "reward_model.path", "rollout.prompts_per_step"):
        assert part in message


@pytest.mark.parametrize(
    ("tensor", "pipeline", "expected"),
    [
        (2, 1, "parallel.tensor = 2 does not divide the model's 9 attention heads: use 1 or 3"),
        (9, 1, "parallel.tensor = 9 does not divide the model's 3 key-value heads: use 1 or 3"),
        (
            1,
            4,
            "pipeline = 4 does not divide the model's 30 layers: use 1, 2, 3, 5, 6, 10, 15 or 30",
        ),
    ],
)
def test_sizes_that_do_not_divide_the_model_name_those_that_do(tensor, pipeline, expected):
    config = make_config(PPO, parallel={"tensor": tensor, "pipeline": pipeline})
    assert expected in message_of(check_model, config, SMOLLM2)


def test_model_sizes_that_divide_pass():
    check_model(make_config(PPO, parallel={"tensor": 3, "pipeline": 5}), SMOLLM2)
    without_kv = {key: value for key, value in SMOLLM2.items() if key != "num_key_value_heads"}
    check_model(make_config(PPO, parallel={"tensor": 3}), without_kv)


def test_feed_forward_units_must_divide():
    config = make_config(PPO, parallel={"tensor": 3})
    assert "1537 feed-forward" in message_of(
        check_model, config, SMOLLM2 | {"intermediate_size": 1537}
    )


def test_missing_files_are_named_together(tmp_path):
    config = make_config(
        PPO,
        data={"train": str(tmp_path / "a.jsonl"), "heldout": str(tmp_path / "b.jsonl")},
        reward_model={"path": str(tmp_path / "prm")},
        engine={
            "deepspeed": str(tmp_path / "zero.json"),
            "nvme_folder": str(tmp_path / "c.txt" / "disk"),
        },
    )
    (tmp_path / "c.txt").touch()
    message = message_of(check_files, config)
    keys = ("data.train", "data.heldout", "reward_model.path")
    for key in (*keys, "engine.deepspeed", "engine.nvme_folder"):
        assert f"{key}: {tmp_path}" in message
    (tmp_path / "c.txt").unlink()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "prm").mkdir()
    shutil.copy(REPOSITORY / "configs/deepspeed/zero3.json", tmp_path / "zero.json")
    check_files(config)


def test_a_folder_given_for_a_file_is_called_one(tmp_path):
    (tmp_path / "prm").mkdir()
    config = make_config(
        PPO,
        data={"train": str(tmp_path)},
        reward_model={"path": str(tmp_path / "prm")},
        engine={"deepspeed": str(tmp_path)},
        mask={"offline_file": str(tmp_path)},
    )
    message = message_of(check_files, config)
    for key in ("data.train", "engine.deepspeed", "mask.offline_file"):
        assert f"{key}: {tmp_path}: is a folder, give the file itself" in message


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no/model", "no such folder"),
        ("./model", "no such folder"),
        ("a/b/c", "no such folder"),
        ("no.gguf", "no such file"),
    ],
)
def test_a_local_model_has_to_be_there(path, words):
    message = message_of(check_files, make_config(PPO, model={"path": path}))
    assert f"model.path: {path}: {words}" in message
    on_hub = make_config(PPO, model={"path": "owner/name"})
    assert "owner/name" not in message_of(check_files, on_hub)


def test_deepspeeds_json_is_read_with_the_files(tmp_path):
    path = tmp_path / "zero.json"
    shipped = json.loads((REPOSITORY / "configs/deepspeed/zero3.json").read_text())
    path.write_text(json.dumps(shipped | {"train_batch_size": 2, "optimizer": {}}))
    config = make_config(PPO, engine={"deepspeed": str(path)})
    message = message_of(check_files, config, 4)
    assert f"{path}: train_batch_size must be" in message and "remove optimizer" in message
    message = message_of(check_files, config)
    assert "train_batch_size" not in message and "remove optimizer" in message


@pytest.mark.parametrize("base", [PPO, PRM])
def test_scoring_reads_the_reward_models_and_no_data(tmp_path, base):
    """The statistics of a threshold may be what the scores are made for."""
    config = make_config(
        base,
        data={"train": str(tmp_path / "a.jsonl")},
        mask={"threshold": "offline", "offline_file": str(tmp_path / "statistics.json")},
        reward_model={"path": str(tmp_path / "prm")},
    )
    assert "a.jsonl: no such file" in message_of(check_files, config)
    answers = tmp_path / "answers.jsonl"
    assert f"--answers {answers}: no such file" in message_of(check_files, config, 1, str(answers))
    answers.touch()
    message = message_of(check_files, config, 1, str(answers))
    assert message == f"reward_model.path: {tmp_path / 'prm'}: no such folder, train a prm first"
    (tmp_path / "prm").mkdir()
    check_files(config, 1, str(answers))
    assert message_of(check_files, config, 1, "") == "--answers : no such file"
