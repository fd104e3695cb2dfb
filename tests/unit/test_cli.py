"""The command line: exit codes, one line an error, and nothing heavy before the config is right."""

import os
import subprocess
import sys
import types

import pytest

from megatron_amrlhf import cli
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.errors import UserError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VALID = """\
run: {{name: demo}}
model: {{path: some/model}}
algorithm: {{kind: prm}}
data: {{train: {folder}/steps.jsonl, format: steps}}
"""


@pytest.fixture
def config_path(tmp_path, monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "steps.jsonl").touch()
    path = tmp_path / "run.yaml"
    path.write_text(VALID.format(folder=tmp_path))
    return str(path)


def set_ranks(monkeypatch, **changes: str) -> None:
    """The environment of rank 0 of 4, some variables changed."""
    ranks = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (ranks | changes).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for the trainer's module: records the configs, raises what it is told to."""
    module = types.SimpleNamespace(configs=[], error=None, is_done=True)

    def run(config):
        module.configs.append(config)
        if module.error:
            raise module.error
        return module.is_done

    module.run = run
    monkeypatch.setitem(sys.modules, "megatron_amrlhf.commands.train", module)
    monkeypatch.setattr(cli, "OTHER_RANK_DELAY_SECONDS", 0.0)
    return module


def test_train_hands_over_the_config_with_overrides(config_path, trainer):
    overrides = ["optimizer.lr=1e-5", "run.steps=2"]
    assert cli.main(["train", config_path, "--set", *overrides, "--set", "run.seed=7"]) == 0
    config = trainer.configs[0]
    assert (config.optimizer.lr, config.run.steps, config.run.seed) == (1e-5, 2, 7)


@pytest.mark.parametrize("place", [0, 1, 2, 4])
@pytest.mark.parametrize("option", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_the_launchers_local_rank_is_ignored_anywhere(config_path, trainer, place, option):
    arguments = ["train", config_path, "--set", "run.seed=7"]
    assert cli.main(arguments[:place] + option + arguments[place:]) == 0
    assert trainer.configs[0].run.seed == 7


def test_a_config_error_is_one_line_and_exit_code_2(config_path, trainer, capsys):
    assert cli.main(["train", config_path, "--set", "run.sed=1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and "did you mean run.seed?" in err
    assert not trainer.configs


def test_only_rank_0_prints_a_config_error(config_path, trainer, capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", config_path, "--set", "run.sed=1"]) == 2
    assert capsys.readouterr().err == ""
    # The launcher ends all ranks after the first that leaves: that has to be rank 0.
    assert slept == [cli.OTHER_RANK_DELAY_SECONDS]


def test_the_world_size_is_checked_before_training(config_path, trainer, capsys, monkeypatch):
    set_ranks(monkeypatch, WORLD_SIZE="3")
    assert cli.main(["train", config_path]) == 2
    assert "algorithm.batch_size" in capsys.readouterr().err
    assert not trainer.configs


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("RANK", "x"), ("RANK", "-1")]
)
def test_ranks_that_are_no_numbers_are_one_line(
    config_path, trainer, capsys, monkeypatch, name, value
):
    set_ranks(monkeypatch, **{name: value})
    assert cli.main(["train", config_path]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {name} is '{value}'") and "launch/train.sh" in err
    assert not trainer.configs


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_ranks_without_a_meeting_place_are_one_line(
    config_path, trainer, capsys, monkeypatch, name
):
    set_ranks(monkeypatch)
    monkeypatch.delenv(name)
    assert cli.main(["train", config_path]) == 2
    assert f"WORLD_SIZE is 4, but {name} is not set" in capsys.readouterr().err
    assert not trainer.configs


def test_missing_data_is_found_before_training(config_path, trainer, capsys):
    assert cli.main(["train", config_path, "--set", "data.train=nowhere.jsonl"]) == 2
    assert "data.train: nowhere.jsonl: no such file" in capsys.readouterr().err
    assert not trainer.configs


@pytest.mark.parametrize(("rank", "start"), [("0", "error: "), ("2", "error (rank 2): ")])
def test_a_mistake_met_while_running_is_printed_by_its_rank(
    config_path, trainer, capsys, monkeypatch, rank, start
):
    set_ranks(monkeypatch, RANK=rank)
    trainer.error = UserError("data.jsonl, line 7: malformed\nJSON")
    assert cli.main(["train", config_path]) == 2
    assert capsys.readouterr().err == f"{start}data.jsonl, line 7: malformed JSON\n"


def test_ctrl_c_is_exit_code_130(config_path, trainer):
    trainer.error = KeyboardInterrupt()
    assert cli.main(["train", config_path]) == 130


def test_a_run_that_was_asked_to_stop_is_exit_code_75(config_path, trainer):
    trainer.is_done = False
    assert cli.main(["train", config_path]) == 75


def test_our_own_errors_keep_their_traceback(config_path, trainer):
    trainer.error = AssertionError("a bug")
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["train", config_path])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "arguments are required: COMMAND"),
        (["train"], "arguments are required: CONFIG.yaml"),
        (["trian", "x.yaml"], "invalid choice: 'trian'"),
        (["train", "x.yaml", "--sett", "a.b=1"], "unrecognized arguments"),
        (["plan", "x.yaml", "--share", "7"], "--share: must be at most 1, found '7'"),
        (["plan", "x.yaml", "--share", "0"], "--share: must be a number above 0, found '0'"),
        (["train", "no/such.yaml"], "no/such.yaml: no such file"),
    ],
)
def test_wrong_arguments_are_one_line_too(arguments, expected, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and expected in err


def test_masks_are_those_of_the_run_that_overrides_name(config_path, tmp_path, capsys):
    names = [f"run.folder={tmp_path}", "run.name=other"]
    assert cli.main(["show-masks", config_path, "--set", *names]) == 2
    assert f"{tmp_path / 'other'}: no such file" in capsys.readouterr().err


def test_config_prints_yaml_that_loads_back(config_path, tmp_path, capsys):
    assert cli.main(["config", config_path, "--set", "parallel.tensor=3"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert load_config(resolved) == load_config(config_path, ["parallel.tensor=3"])


def test_train_help_teaches_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("algorithm (kind: dpo):", "float > 0, <= 1; default 0.99", "epsilon of eq. 14"):
        assert part in text


def test_config_refuses_keys_that_do_not_go_together(config_path, capsys):
    arguments = ["config", config_path, "--set", "optimizer.betas=[1.0,0.9]"]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: optimizer.betas: both must be < 1")


def test_nothing_heavy_is_loaded_for_a_wrong_config(config_path):
    code = (
        "import sys; from megatron_amrlhf.cli import main; "
        f"code = main(['train', {config_path!r}, '--set', 'run.sed=1']); "
        "heavy = {'torch', 'deepspeed', 'megatron', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_the_module_runs_and_returns_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_amrlhf", "--local_rank=0", "train", "no/such.yaml"],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RANK"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no/such.yaml") and "Traceback" not in done.stderr


def test_score_hands_over_its_files(config_path, monkeypatch, tmp_path, capsys):
    calls = []
    scorer = types.SimpleNamespace(run=lambda config, *rest: calls.append(rest))
    monkeypatch.setitem(sys.modules, "megatron_amrlhf.commands.score", scorer)
    answers = tmp_path / "a.jsonl"
    files = ["--answers", str(answers), "--out", "scores"]
    assert cli.main(["score", config_path, *files]) == 2
    assert f"--answers {answers}: no such file" in capsys.readouterr().err and not calls
    answers.touch()
    assert cli.main(["score", config_path, *files, "--part", "8"]) == 0
    assert calls == [(str(answers), "scores", 8)]
    assert cli.main(["score", config_path, "--out", "scores"]) == 2
    assert cli.main(["score", config_path, *files, "--set", "parallel.tensor=2"]) == 2
    assert len(calls) == 1
