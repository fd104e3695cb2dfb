"""What launch/train.sh is asked for, and how it calls the deepspeed launcher."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.launching import start
from megatron_amrlhf.launching.prepare import Hosts, Prepared
from megatron_amrlhf.launching.start import HELP, launcher, read_request, with_whole_paths

PREPARED = Prepared(Path("/runs/x"), Path("/logs"), ("HF_TOKEN",), 3, 7)
RANKS = {"OMP_NUM_THREADS": "4", "AMRLHF_HOSTS": "a,b", "AMRLHF_PREPARED": "1"}
TWO = {"one": 2, "two": 3}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "run.yaml").touch()
    (tmp_path / "hosts").write_text("one slots=2\ntwo slots=3\n")

    def request(*words: str, gpus: int = 0):
        return read_request(list(words), tmp_path, gpus, {"VENV": "/v"})

    return request


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give the CONFIG.yaml"),
        (["score"], "give the CONFIG.yaml"),
        (["--processes", "0", "run.yaml"], "--processes"),
        (["--processes", "2x", "run.yaml"], "--processes"),
        (["--processes"], "--processes"),
        (["--nope", "run.yaml"], "--nope"),
        (["--proc", "2", "run.yaml"], "--proc"),
        (["--hostfile", "no", "run.yaml"], "--hostfile needs a file (got 'no')"),
        (["--hostfile", "", "run.yaml"], "--hostfile needs a file (got '')"),
        (["--node-rank", "0", "run.yaml"], "need a --hostfile"),
        (["--master", "a:1", "run.yaml"], "need a --hostfile"),
        (["--hostfile", "hosts", "--master", "a", "run.yaml"], "HOST:PORT"),
        (["--hostfile", "hosts", "--node-rank", "-1", "run.yaml"], "--node-rank"),
        (["--hostfile", "hosts", "--node-rank", "2", "run.yaml"], "use 0 to 1"),
        (["--hostfile", "hosts", "--processes", "2", "run.yaml"], "hostfile has slots=N"),
        (["--logs", "", "run.yaml"], "--logs needs a folder"),
        (["plan", "run.yaml", "--gpus", "4"], "call /v/bin/amrlhf plan run.yaml --gpus 4"),
        (["status", "x"], "only train, score and doctor are launched"),
        (["run.yaml", "--processes", "4"], "--processes is the launcher's: it goes before"),
        (["doctor", "--master=x:1"], "--master is the launcher's"),
    ],
)
def test_a_wrong_call_is_refused(read, words, told):
    with pytest.raises(UserError) as error:
        read(*words)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_without_pdsh_other_machines_are_not_reached(read):
    given = ["--hostfile", "hosts", "run.yaml"]
    with mock.patch.object(start.shutil, "which", lambda name: None):
        with pytest.raises(UserError, match="pdsh is not installed"):
            read(*given)
        assert read("--node-rank", "1", *given).hosts == Hosts(TWO, 1, from_file=True)
    with mock.patch.object(start.shutil, "which", lambda name: f"/bin/{name}"):
        assert read(*given).hosts.by_ssh


@pytest.mark.parametrize(
    ("words", "gpus", "processes"),
    [([], 0, 2), ([], 4, 4), (["--processes", "3"], 0, 3), (["--processes", "3"], 4, 3)],
)
def test_a_process_for_each_gpu_or_two(read, words, gpus, processes):
    assert read(*words, "run.yaml", gpus=gpus).hosts == Hosts({"localhost": processes})
    with pytest.raises(UserError, match="--processes 5, but 4 GPUs are visible"):
        read("--processes", "5", "run.yaml", gpus=4)


@pytest.mark.parametrize("command", ["train", "score", "doctor"])
def test_a_command_and_its_words(read, tmp_path, command):
    request = read("--logs", "l", command, "run.yaml", "--set", "a.b=--x", "--help")
    words = (str(tmp_path / "run.yaml"), "--set", "a.b=--x", "--help")
    assert (request.command, request.words) == (command, words)
    assert request.logs == tmp_path / "l"
    assert read("doctor").words == ()
    assert read("run.yaml").command == "train"


def test_paths_count_from_the_callers_folder(tmp_path):
    for name in ("run.yaml", "a b.jsonl", "steps"):
        (tmp_path / name).touch()
    here = str(tmp_path)
    given = ["run.yaml", "no.yaml", "--answers=a b.jsonl", "--answers", "no", "--out=o/../p"]
    given += ["--folder", "f", "--json", "~/x", "--set", "data.train=steps", "--x=run.yaml"]
    assert with_whole_paths(given, tmp_path) == [
        *(f"{here}/run.yaml", "no.yaml", "--answers", f"{here}/a b.jsonl", "--answers", "no"),
        *("--out", f"{here}/p", "--folder", f"{here}/f", "--json", "~/x"),
        *("--set", "data.train=steps", "--x=run.yaml"),
    ]


def after(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def test_one_machine_without_gpus(read):
    options, variables, unset = launcher(read("run.yaml"), PREPARED, RANKS)
    assert after(options, "--num_gpus") == variables["LOCAL_SIZE"] == "2"
    assert after(options, "--enable_each_rank_log") == "/logs"
    assert 0 < int(after(options, "--master_port")) and unset == ["HF_TOKEN"]
    assert RANKS.items() <= variables.items() and "DS_ENV_FILE" not in variables
    options, _, _ = launcher(read("doctor"), PREPARED, RANKS | {"MASTER_PORT": "222"})
    assert "--enable_each_rank_log" not in options and after(options, "--master_port") == "222"


@pytest.mark.parametrize(
    ("visible", "taken"), [(None, "0,1"), ("", "0,1"), ("3,1,2,0", "3,1"), ("2,7", "2,7")]
)
def test_one_machine_with_gpus(read, visible, taken):
    request = read("--processes", "2", "run.yaml", gpus=4)
    environment = RANKS | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    options, variables, unset = launcher(request, PREPARED, environment)
    assert after(options, "--include") == f"localhost:{taken}" and "--num_gpus" not in options
    assert unset == ["HF_TOKEN", "CUDA_VISIBLE_DEVICES"] and "LOCAL_SIZE" not in variables
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=GPU-1: the deepspeed launcher"):
        launcher(request, PREPARED, RANKS | {"CUDA_VISIBLE_DEVICES": "GPU-1"})


@pytest.mark.parametrize(
    ("words", "environment", "address", "port"),
    [
        (["--node-rank", "1"], {}, "one", "29500"),
        (["--node-rank", "1"], {"MASTER_PORT": "5"}, "one", "5"),
        (["--node-rank", "1", "--master", "x:9"], {"MASTER_PORT": "5"}, "x", "9"),
        (["--master", "x:9"], {}, "x", "9"),
        ([], {"MASTER_PORT": "5"}, "one", "5"),
    ],
)
def test_machines_of_a_hostfile(read, tmp_path, words, environment, address, port):
    with mock.patch.object(start.shutil, "which", lambda name: name):
        request = read("--hostfile", "hosts", *words, "run.yaml", gpus=8)
    options, variables, _ = launcher(request, PREPARED, RANKS | environment)
    assert (after(options, "--master_addr"), after(options, "--master_port")) == (address, port)
    assert after(options, "--hostfile") == str(tmp_path / "hosts")
    assert variables["DS_ENV_FILE"] == "/runs/x/.deepspeed_env" and "--include" not in options
    by_hand = "--node-rank" in words
    assert ("--no_ssh" in options) == by_hand
    assert not by_hand or after(options, "--node_rank") == "1"


def test_hosts_tell_where_this_machine_stands():
    second = Hosts(TWO, 1, from_file=True)
    assert (second.own_slots, second.first_rank, second.has_rank_0, second.by_ssh) == (3, 2, 0, 0)
    head = Hosts(TWO, None, from_file=True)
    assert (head.own_slots, head.first_rank, head.has_rank_0, head.by_ssh) == (2, 0, 1, 1)


def test_the_help_has_the_options_that_are_taken(read, capsys):
    with pytest.raises(SystemExit) as ended:
        read("--processes", "2", "--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text == HELP.read_text()
    options = set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)) - {"--help", "--set"}
    assert options == {"--processes", "--hostfile", "--node-rank", "--master", "--logs"}
    for option in options:
        with pytest.raises(UserError, match="expected one argument"):
            read(option)


def test_a_wrong_option_is_told_by_the_scripts_name(tmp_path, capsys):
    with mock.patch.dict(os.environ):
        assert start.main(["--from", str(tmp_path), "--gpus", "0", "--", "--no\x1bpe"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("train.sh: ") and "\x1b" not in told.err
