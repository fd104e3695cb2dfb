"""What of the environment gets into the process lists of other nodes."""

import os
from unittest import mock

import pytest
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher.runner import EXPORT_ENVS

from megatron_amrlhf.launching.environment import BY_DEEPSPEED, forwarding
from megatron_amrlhf.launching.prepare import write_environment

ADDRESS = "https://hub.example.org"
SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "abc",
    "MLFLOW_TRACKING_PASSWORD": "abc",
    "MLFLOW_TRACKING_URI": "postgresql+psycopg2://user:word@host/db",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "abc",
    "MLFLOW_S3_CREDENTIALS_JSON": "{}",
    "MLFLOW_ARTIFACT": f"{ADDRESS}/x?sig=abc",
    "PYTHON_KEYRING_PASSWORD": "abc",
    "PYTHONREPO_AUTH": "abc",
    "MLFLOW_HEADER": "Authorization: Bearer abcdefgh12",
    "UCX_X": "AKIAABCDEFGHIJKLMNOP",
    "NCCL_APIKEY": "abc",
    "HF_TOKEN": "abc",
    "HF_TOKEN_2": "abc",
    "HF_ENDPOINT": "https://user:word@hub.example.org",
    "HF_MIRROR": "https://hf_abcdefghijklmnopqrstuvwxyz@hub.example.org",
    "HF_X": "hf_abcdefghijklmnopqrstuvwxyz",
    "TORCH_PASS": "abc",
    "AMRLHF_COOKIE": "abc",
}
PLAIN = {
    "HF_HOME": "/data/hf_cache-for-the-whole-team-2026",
    "HF_ENDPOINT": f"{ADDRESS}/@team",
    "HF_TOKEN_PATH": "/home/me/token",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "4",
    "HF_DATASETS_CACHE": "/data/a b",
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_looks_secret_is_nowhere(name):
    found = forwarding({name: SECRETS[name]})
    assert found.text == "" and found.secret == (name,)
    assert found.hidden == ((name,) if name.startswith(BY_DEEPSPEED) else ())


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_none_gets_there(name):
    found = forwarding({name: PLAIN[name]})
    assert found.text == f"{name}={PLAIN[name]}\n" and not found.secret + found.hidden


@pytest.mark.parametrize("value", ["$(touch x)", "`x`", 'a"b', "a\nb", "a\\", "%h", "\udcff"])
def test_what_a_shell_would_change_is_left_out_and_hidden_from_deepspeed(value):
    found = forwarding({"PYTHON_X": value, "HF_X": value})
    assert found.text == "" and found.unquotable == ("HF_X", "PYTHON_X")
    assert found.hidden == ("PYTHON_X",)


def test_what_deepspeed_forwards_by_itself_is_known():
    assert {*EXPORT_ENVS, *CUDA_Accelerator.export_envs(None)} == set(BY_DEEPSPEED)


def test_one_line_has_the_names_alone(tmp_path, capsys):
    with mock.patch.dict(os.environ, SECRETS | {"HF_Y": "$x"}, clear=True):
        hidden = write_environment(tmp_path / "file")
    told = capsys.readouterr().err
    assert "PYTHON_KEYRING_PASSWORD" in hidden and "HF_TOKEN" not in hidden
    assert told.count("\n") == 1 and "MLFLOW_TRACKING_TOKEN" in told and "HF_Y (a shell" in told
    assert "abc" not in told and "word@" not in told
    assert (tmp_path / "file").read_text() == ""
