"""The command on one machine: what it finds, writes, leaves and answers."""

import json
import os
import socket
import time

import pytest

from megatron_amrlhf import cli
from megatron_amrlhf.doctor import command, machine, software
from megatron_amrlhf.doctor.judge_run import judge_run
from megatron_amrlhf.doctor.judge_versions import judge_versions
from tests.helpers_models import CHATML, make_tiny_model, tiny_tokenizer
from tests.unit.config.samples import PRM, make_config
from tests.unit.doctor.samples import facts, only

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")


MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.chdir(tmp_path)


def doctor(*arguments: str) -> tuple[int, dict]:
    code = cli.main(["doctor", "--json", "doctor.json", *arguments])
    with open("doctor.json") as file:
        return code, json.load(file)


def by_check(record: dict) -> dict[str, dict]:
    return {finding["check"]: finding for finding in record["findings"]}


def test_one_process_has_a_line_for_each_check_and_leaves_nothing(capsys, tmp_path):
    code, record = doctor()
    lines = capsys.readouterr().out.splitlines()
    checks = ("versions", "devices", "dtype", "limits", "disk", "locks", "shared files", "clocks")
    assert set(by_check(record)) == set(checks)
    assert code == record["exit_code"] == any(x["level"] == "error" for x in record["findings"])
    for finding in record["findings"]:
        assert [line for line in lines if finding["message"] in line]
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]
    assert record["ranks"][0]["host"] == socket.gethostname()


def test_a_lock_file_is_found_and_stays(tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, time.time() - 3600))
    _, record = doctor()
    found = by_check(record)["locks"]
    assert found["level"] == "warning" and str(lock) in found["message"]
    assert "60 minutes" in found["message"] and lock.exists()


def test_a_wrong_pin_is_an_error_and_exit_code_1(monkeypatch):
    versions = dict(software.installed_versions(software.read_pins()), deepspeed="0.1.0")
    monkeypatch.setattr(software, "installed_versions", lambda pins: versions)
    code, record = doctor()
    assert code == 1 and "deepspeed 0.1.0" in by_check(record)["versions"]["message"]


def test_a_run_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    code, record = doctor("--folder", str(tmp_path / "file" / "run"))
    found = by_check(record)["shared files"]
    assert code == 1 and found["level"] == "error" and "cannot write" in found["message"]


def test_an_existing_run_folder_is_left_as_it_was(tmp_path):
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    doctor("--folder", str(folder))
    assert [path.name for path in folder.iterdir()] == ["stop"]


def test_checkpoints_are_compared_with_the_free_space(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "runs" / "demo" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(
        "run: {name: demo}\nmodel: {path: model}\nalgorithm: {kind: ppo}\ndata: {train: x.jsonl}\n"
    )
    layer = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 16 * 8 + 2 * 8  # q, k and v, o, gate up down, norms
    actor, critic = 2 * layer + 2 * 32 * 8 + 8, 2 * layer + 32 * 8 + 8 + 8 + 1
    seen = []
    real, disk = command.judge_disks, machine.Disk("run folder", "runs/demo", 1000.0, True)
    monkeypatch.setattr(machine, "find_disks", lambda run_folder, model_cache: [disk])
    monkeypatch.setattr(command, "judge_disks", lambda f, room: seen.append(room) or real(f, room))
    _, record = doctor("run.yaml", "--set", "checkpoint.keep=3")
    assert seen[0].num_bytes == 12 * (actor + critic)
    assert seen[0].count == 3  # one of three is there, and one is written beside three
    assert "runs/demo" in by_check(record)["disk"]["message"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/model", "no/model is not on this machine"),
        ("/no/such/folder", "/no/such/folder is not on this machine"),
        ("no.gguf", "no.gguf: no such file"),
        ("bad.gguf", "bad.gguf: not a readable GGUF file"),
        ("pip:no-such-package", "'no-such-package' is not installed"),
    ],
)
def test_an_unknown_model_is_a_warning(tmp_path, path, words):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    (tmp_path / "run.yaml").write_text(
        f'run: {{name: demo}}\nmodel: {{path: "{path}"}}\nalgorithm: {{kind: dpo}}\n'
        "data: {train: x.jsonl}\n"
    )
    _, record = doctor("run.yaml")
    disk = [x for x in record["findings"] if x["check"] == "disk"]
    assert disk[0]["level"] == "warning" and words in disk[0]["message"]


def test_what_keeps_the_run_from_starting_is_an_error(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "run: {name: demo}\nmodel: {path: /no/model}\nalgorithm: {kind: prm}\n"
        "data: {train: x.jsonl, format: steps}\n"
    )
    code, record = doctor("run.yaml", "--set", "parallel.tensor=2")
    found = by_check(record)["run"]
    assert code == 1 and found["level"] == "error" and found["fix"]
    assert "model.path: /no/model: no such folder" in found["message"]
    assert "data.train: x.jsonl: no such file" in found["message"]


def test_keys_and_layout_are_judged_where_the_ranks_are_the_runs(tmp_path):
    (tmp_path / "steps.jsonl").touch()
    config = make_config(PRM, data={"train": str(tmp_path / "steps.jsonl")})
    assert only(judge_run(config, 1), "ok").message.startswith("files and keys are")
    assert "3 data-parallel replicas" in only(judge_run(config, 3), "error").message
    wrong = make_config(PRM, optimizer={"betas": [1.0, 0.9]}, data={"train": "no.jsonl"})
    for ranks in (1, 2):
        assert [finding.level for finding in judge_run(wrong, ranks)] == ["error", "error"]
    many = make_config(PRM, parallel={"pipeline": 2}, data={"train": str(tmp_path / "steps.jsonl")})
    assert only(judge_run(many, 1), "ok")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--timeout", "0"], "--timeout"),
        (["--set", "run.seed=1"], "CONFIG.yaml"),
        (["--json", "no/folder/x.json"], "--json no/folder/x.json: cannot be written"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert cli.main(["doctor", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_ranks_without_a_meeting_place_are_wrong_usage(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["doctor"]) == 2
    assert "MASTER_ADDR is not set" in capsys.readouterr().err


def test_a_rank_that_does_not_reach_rank_0_says_so(monkeypatch, capsys):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert cli.main(["doctor", "--timeout", "1"]) == 1
    assert "rank 1 (host " in (err := capsys.readouterr().err)
    assert "did not reach rank 0 at 127.0.0.1:1 within 1 s" in err


def test_the_pins_are_those_of_requirements_txt():
    pins = software.read_pins()
    wanted = {each.name: str(each.specifier) for each in pins.requirements}
    assert wanted["megatron-core"] == "==0.16.1" and wanted["deepspeed"] == "==0.19.8"
    assert "3.11.2" in pins.python and "3.13.0" not in pins.python
    installed = software.installed_versions(pins)
    assert judge_versions([facts(versions=installed)], pins)[0].level == "ok"


def test_a_driver_without_a_gpu_is_hidden_unless_asked_for(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n")
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert machine.driver_version() == "550.54.15"
    assert machine.has_hidden_gpu({})
    assert not machine.has_hidden_gpu({"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("template", "eos", "level", "words"),
    [
        (CHATML, "<|im_end|>", "ok", "answers end with '<|im_end|>'"),
        (CHATML, "<unk>", "warning", "turns with '<|im_end|>', the tokenizer's EOS is '<unk>'"),
        (None, "<|im_end|>", "warning", "no chat template"),
        ("{{ 1 // 0 }}", "<|im_end|>", "error", "the chat template cannot be used: it fails"),
        (CHATML, "<|frob|>", "error", "token '<|frob|>' has id 131, but the model's vocab_size"),
        (CHATML.replace("in messages", "in messages[-1:]"), "<|im_end|>", "error", "a system mess"),
    ],
)
def test_tokenizer_and_template_are_judged_as_at_a_runs_start(
    tmp_path, template, eos, level, words
):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 131}))
    file = tmp_path / "model" / "tokenizer_config.json"
    (tmp_path / "model" / "chat_template.jinja").unlink()
    said = json.loads(file.read_text()) | {"eos_token": eos, "chat_template": template}
    file.write_text(json.dumps(said))
    (tmp_path / "run.yaml").write_text(
        "run: {name: demo}\nmodel: {path: model}\nalgorithm: {kind: dpo}\n"
        "data: {train: x.jsonl, system_prompt: Be brief.}\n"
    )
    code, record = doctor("run.yaml")
    found = by_check(record)["chat"]
    assert found["level"] == level and words in found["message"]
    assert code == 1 or level != "error"


def test_a_template_that_stops_the_start_is_told_once(tmp_path):
    make_tiny_model(tmp_path / "model", "llama", layers=2, vocab_size=131)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "run.yaml").write_text(
        "run: {name: demo}\nmodel: {path: model}\nalgorithm: {kind: orm}\n"
        "data: {train: x.jsonl, heldout: x.jsonl, format: pairs}\n"
    )
    _, record = doctor("run.yaml")
    told = [x["check"] for x in record["findings"] if "chat template cannot" in x["message"]]
    assert told == ["chat"] and by_check(record)["run"]["level"] == "ok"
