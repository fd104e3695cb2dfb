"""Every file is whole, a file of its own, and of the mode that the user's umask says."""

import os
import re
import stat
import subprocess
import sys
import time

import pytest
import torch

from megatron_amrlhf.checkpoint.files import write_tensors
from megatron_amrlhf.files import (
    appendable,
    clear_temporaries,
    free_name,
    started_at,
    umask,
    write_atomic,
)
from megatron_amrlhf.report.files import append_jsonl
from megatron_amrlhf.report.metrics import MetricsWriter
from megatron_amrlhf.report.plots import plot_run
from megatron_amrlhf.run.folder import RunFolder

NAMES = re.compile(r"status\.json|latest")


def write_metrics(path):
    append_jsonl(path, [{"step": 1, "loss/policy": 1.0}])


def write_picture(path):
    write_metrics(path.with_name("metrics.jsonl"))
    assert plot_run(path.parent) == path


WRITERS = {
    "a.txt": lambda path: write_atomic(path, "text"),
    "a.safetensors": lambda path: write_tensors(path, {"a": torch.ones(2)}, {}),
    "metrics.jsonl": write_metrics,
    "curves.png": write_picture,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_replaced_and_its_target_stays(tmp_path, name):
    target = tmp_path / "users"
    target.write_text("mine\n")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    path.symlink_to(target)
    WRITERS[name](path)
    assert target.read_text() == "mine\n"
    assert path.is_file() and not path.is_symlink() and path.stat().st_size > 0


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_every_file_has_the_mode_that_the_umask_leaves(tmp_path, name, mask):
    before = os.umask(mask)
    try:
        assert umask() == mask
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_lines_are_added_to_no_file_that_has_another_name(tmp_path):
    path, backup = tmp_path / "metrics.jsonl", tmp_path / "backup.jsonl"
    write_metrics(path)
    os.link(path, backup)
    write_metrics(path)
    assert len(backup.read_text().splitlines()) == 1 and len(path.read_text().splitlines()) == 2
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    write_metrics(path)
    assert not path.is_symlink() and not (tmp_path / "nowhere").exists()
    assert appendable(tmp_path / "new") == tmp_path / "new"


def test_a_folder_pipe_or_device_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name, words in (("folder", "a folder"), ("pipe", "regular"), ("device", "regular")):
        with pytest.raises(OSError, match=words):
            write_atomic(tmp_path / name, "text")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["device", "folder", "pipe"]


def test_what_stands_under_the_temporary_name_is_not_written_through(tmp_path):
    target, path = tmp_path / "users", tmp_path / "a.txt"
    target.write_text("mine")
    (tmp_path / f".a.txt.{os.getpid()}.tmp").symlink_to(target)
    write_atomic(path, "text")
    assert target.read_text() == "mine" and path.read_text() == "text"


def test_only_dead_writers_own_temporaries_go(tmp_path):
    """Ours by name, older than this start, of no living process; whatever else is there stays."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    old = min(started_at(os.getpid()), started_at(living)) - 10
    gone = [f".status.json.{dead.pid}.tmp", f".latest.{os.getpid()}.tmp"]
    stay = [
        f".notes.txt.{dead.pid}.tmp",
        f"status.json.{dead.pid}.tmp",
        ".status.json.mine.tmp",
        ".status.json.0.tmp",
        "..tmp",
    ]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    living_one = tmp_path / f".latest.{living}.tmp"
    living_one.touch()
    os.utime(living_one, (started_at(living) + 0.5,) * 2)
    young, link = tmp_path / ".latest.4194303.tmp", tmp_path / ".latest.4194302.tmp"
    young.touch()
    link.symlink_to(tmp_path / "users")
    (tmp_path / ".latest.4194301.tmp").mkdir()
    clear_temporaries(tmp_path, NAMES)
    left = {x.name for x in tmp_path.iterdir()}
    kept = {living_one.name, young.name, link.name, ".latest.4194301.tmp"}
    assert left == {*stay, *kept}
    clear_temporaries(tmp_path / "none", NAMES)


def test_the_start_of_a_process_is_known():
    assert 0 < time.time() - started_at(os.getpid()) < 36_000
    assert started_at(4_194_304) == float("inf")


def test_a_free_name_is_one_that_nothing_has(tmp_path):
    path = tmp_path / "a"
    assert free_name(path) == path
    path.symlink_to("nowhere")
    (tmp_path / "a.1").mkdir()
    assert free_name(path) == tmp_path / "a.2"


def test_tensorboard_and_metrics_are_of_one_mode(tmp_path):
    writer = MetricsWriter(RunFolder(tmp_path, 1, True))
    writer.write(1, {"loss/policy": 1.0})
    writer.close()
    modes = {stat.S_IMODE(x.stat().st_mode) for x in tmp_path.rglob("*") if x.is_file()}
    assert modes == {0o666 & ~umask()}
