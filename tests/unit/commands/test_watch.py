"""How a rank leaves that fails only because another one has gone."""

import json
import os
from types import SimpleNamespace

import pytest

from megatron_amrlhf.commands import watch
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.heartbeat import RankProgress
from megatron_amrlhf.run.watchdog import EXIT_STALLED
from tests.unit.config.samples import PRM, make_config

LOST, OWN = RuntimeError("gloo: Connection closed by peer"), ArithmeticError("own")


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(make_config(PRM, run={"folder": str(tmp_path)}), 0)


@pytest.fixture
def waited(monkeypatch):
    """Seconds that the main thread waited for, at most, until a signal came."""
    monkeypatch.setattr(os, "_exit", _raise_exit)
    return []


@pytest.fixture
def stop(waited):
    return SimpleNamespace(wait_for_signal=waited.append)


@pytest.fixture
def beating(folder, stop):
    context = SimpleNamespace(
        config=SimpleNamespace(engine=SimpleNamespace(watchdog_seconds=0.0)),
        mesh=SimpleNamespace(rank=0, world_size=1),
        folder=folder,
        console=SimpleNamespace(progress=RankProgress()),
        stop=stop,
    )
    beating = watch.watch(context)
    yield beating
    beating.__exit__(None, None, None)  # after an error its thread goes on


def _raise_exit(code):
    raise SystemExit(code)


def test_who_lost_a_partner_waits_until_that_one_is_seen(folder, beating, waited):
    with pytest.raises(RuntimeError, match="gloo"), beating:
        raise LOST
    assert waited == [watch.LOST_PARTNER_DELAY_SECONDS]
    assert "gloo" in json.loads((folder.path / "status.json").read_text())["message"]


def test_an_error_of_its_own_ends_it_at_once(beating, waited):
    with pytest.raises(ArithmeticError), beating:
        raise OWN
    assert waited == []


@pytest.mark.parametrize("is_late", [False, True])
def test_after_a_watchdog_all_leave_alike(folder, beating, stop, is_late):
    def report(*_):
        folder.watchdog.write_text("no progress\n")

    if is_late:  # while this rank waits
        stop.wait_for_signal = report
    with pytest.raises(SystemExit) as end, beating:
        if not is_late:
            report()
        raise LOST
    assert end.value.code == EXIT_STALLED


def test_a_run_is_ended_also_where_its_status_cannot_be_written(folder, beating, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder.stop.write_text("now")
    monkeypatch.setattr(RunFolder, "status", full)
    with pytest.raises(SystemExit) as end, beating:
        raise LOST
    assert end.value.code == watch.EXIT_ENDED


def test_an_error_is_not_hidden_by_a_status_that_cannot_be_written(beating, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "status", full)
    with pytest.raises(ArithmeticError, match="own"), beating:
        raise OWN
    assert capsys.readouterr().err == "status.json: No space left on device\n"


def test_a_run_that_is_ended_blames_no_rank_for_leaving_first(folder, beating, capsys):
    """Ranks see the stop file within some seconds, in which the others lose them."""
    with pytest.raises(SystemExit) as end, beating:
        folder.stop.write_text("now script\n")
        raise LOST
    assert end.value.code == watch.EXIT_ENDED
    status = json.loads((folder.path / "status.json").read_text())
    assert status["state"] == "stopped"
    assert status["message"] == "ended without a checkpoint: launch/train.sh was killed"
    assert status["message"] in capsys.readouterr().err
