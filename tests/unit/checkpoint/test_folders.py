"""Which checkpoints stay, and what a killed save leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_amrlhf.checkpoint import folders
from megatron_amrlhf.checkpoint.folders import (
    Retention,
    clear_leftovers,
    delete_old,
    find_latest,
    publish,
)
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import claim


def make(folder: Path, size: int = 100) -> Path:
    """A complete checkpoint of one file."""
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(b"x" * size)
    files = {"part": {"size": size, "sha256": "unread"}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def make_unfinished(folder: Path, size: int = 100) -> Path:
    """One that was being written, or deleted."""
    claim(make(folder, size), "checkpoint")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(1), [4]),
        (Retention(3), [2, 3, 4]),
        (Retention(9), [1, 2, 3, 4]),
        (Retention(9, 350 / 2**30), [2, 3, 4]),
        (Retention(2, 350 / 2**30), [3, 4]),
        (Retention(9, 10 / 2**30), [4]),
    ],
)
def test_the_newest_always_stays(tmp_path, retention, left):
    made = [make(tmp_path / f"step-{step}") for step in (1, 2, 3, 4)]
    (tmp_path / "step-0").mkdir()  # not complete: not ours to delete
    delete_old(tmp_path, made[-1], retention)
    assert names(tmp_path) == ["step-0", *(f"step-{step}" for step in left)]


def test_a_gap_in_size_ends_what_is_kept(tmp_path):
    for step, size in ((1, 10), (2, 500), (3, 100)):
        make(tmp_path / f"step-{step}", size)
    delete_old(tmp_path, tmp_path / "step-3", Retention(9, 200 / 2**30))
    assert names(tmp_path) == ["step-3"]


@pytest.mark.parametrize("file", ["part", "manifest.json"])
def test_a_damaged_newest_one_is_named_and_no_older_one_taken(tmp_path, monkeypatch, file):
    monkeypatch.setattr(folders, "LONGEST_LAG_SECONDS", 0.0)
    for step in (1, 2):
        make(tmp_path / f"step-{step}")
    (tmp_path / "step-3").mkdir()  # of somebody else
    (tmp_path / "step-2" / file).write_text("cut")
    with pytest.raises(UserError, match=rf"step-2/{file} .*; delete .*step-2 .*step-1$"):
        find_latest(tmp_path)


def test_a_link_goes_alone_and_what_cannot_be_deleted_is_told(tmp_path, monkeypatch, capsys):
    archive = make(tmp_path / "archive" / "step-1")
    checkpoints = make(tmp_path / "c" / "step-2").parent
    (checkpoints / "step-1").symlink_to(archive)
    delete_old(checkpoints, checkpoints / "step-2", Retention(1))
    assert names(checkpoints) == ["step-2"] and names(archive) == ["manifest.json", "part"]

    def refuse(path, kind):
        raise OSError("in use")

    monkeypatch.setattr(folders, "delete_ours", refuse)
    delete_old(checkpoints, make(checkpoints / "step-3"), Retention(1))
    assert "step-2 is not deleted: in use" in capsys.readouterr().err
    assert find_latest(checkpoints) == checkpoints / "step-3"


def test_a_save_killed_while_it_replaced_a_checkpoint_loses_nothing(tmp_path):
    make_unfinished(tmp_path / "tmp-old-step-2")
    make_unfinished(tmp_path / "tmp-step-2")
    (tmp_path / "tmp-step-3").mkdir()
    assert find_latest(tmp_path) is None
    assert clear_leftovers(tmp_path) == []
    assert names(tmp_path) == ["step-2"] and find_latest(tmp_path) == tmp_path / "step-2"


def test_what_was_being_deleted_goes(tmp_path):
    make(tmp_path / "step-2")
    make_unfinished(tmp_path / "tmp-old-step-2")
    make_unfinished(tmp_path / "tmp-old-step-1")
    (tmp_path / "tmp-old-step-1" / "part").unlink()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["step-2"]


def test_publishing_replaces_and_names_the_newest(tmp_path):
    make(tmp_path / "step-2", 10)
    publish(make_unfinished(tmp_path / "tmp-step-2", 20), tmp_path / "step-2")
    assert names(tmp_path) == ["latest", "step-2"]
    assert (tmp_path / "step-2" / "part").stat().st_size == 20
    assert (tmp_path / "latest").read_text() == "step-2\n"
