"""Which checkpoints stay, and what a killed save leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_amrlhf.checkpoint import folders
from megatron_amrlhf.checkpoint.folders import (
    Retention,
    begin,
    clear_leftovers,
    delete_old,
    find_latest,
    is_complete,
    publish,
    read_manifest,
    step_folders,
)
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import claim, is_ours


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


def users(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    return folder


def test_what_others_have_in_the_folder_that_checkpoints_links_to_stays(tmp_path):
    """Whatever its name is; ours goes by the note inside."""
    disk, checkpoints = tmp_path / "scratch", tmp_path / "checkpoints"
    names_ = ("tmp-mine", "tmp-", "tmp-step-3", "tmp-old-step-4", "tmp-old-step-5.2", "tmp-step-07")
    theirs = [users(disk / name) for name in names_]
    (disk / "tmp-step-8").symlink_to(users(tmp_path / "elsewhere"))
    (disk / "tmp-step-6").write_text("mine")
    make_unfinished(disk / "tmp-step-9")
    make_unfinished(disk / "tmp-old-step-2.1")
    checkpoints.symlink_to(disk)
    told = clear_leftovers(checkpoints)
    assert all((folder / "thesis.tex").read_text() == "mine" for folder in theirs)
    assert (tmp_path / "elsewhere" / "thesis.tex").exists()
    assert names(disk) == sorted([*names_, "tmp-step-8", "tmp-step-6", "step-2"])
    stays = [line.partition(": it stays as it is")[0].rpartition("/")[2] for line in told]
    assert [text.split()[0] for text in stays] == [
        *("tmp-old-step-4", "tmp-old-step-5.2", "tmp-step-3", "tmp-step-6", "tmp-step-8"),
    ]


def test_a_users_file_among_what_a_kill_left_keeps_it(tmp_path):
    (make_unfinished(tmp_path / "tmp-step-3") / "thesis.tex").write_text("mine")
    assert "has files of others (thesis.tex)" in clear_leftovers(tmp_path)[0]
    assert (tmp_path / "tmp-step-3" / "part").exists()


def test_a_save_finds_another_name_than_one_that_is_taken(tmp_path):
    users(tmp_path / "tmp-step-3")
    first = begin(tmp_path, 3)
    assert first.name == "tmp-step-3.1" and is_ours(first, "checkpoint")
    assert begin(tmp_path, 3) == first, "what a killed save left is gone before the next"
    (first / "manifest.json").write_text('{"files": {}}')
    publish(first, tmp_path / "step-3")
    assert names(tmp_path) == ["latest", "step-3", "tmp-step-3"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json.bak", ".hidden"])
def test_a_checkpoint_with_a_users_file_is_neither_deleted_nor_replaced(tmp_path, capsys, name):
    for step in (1, 2):
        make(tmp_path / f"step-{step}")
        (tmp_path / f"step-{step}" / name).write_text("mine")
    delete_old(tmp_path, tmp_path / "step-2", Retention(1))
    assert f"step-1 has files of others ({name})" in capsys.readouterr().err
    for work in (
        lambda: begin(tmp_path, 2),
        lambda: publish(make(tmp_path / "t"), tmp_path / "step-2"),
    ):
        with pytest.raises(UserError, match="step-2 has files of others .*: move it away"):
            work()
    assert all((tmp_path / f"step-{step}" / name).read_text() == "mine" for step in (1, 2))


def test_a_users_folder_in_a_checkpoints_place_is_named(tmp_path):
    users(tmp_path / "step-3")
    (tmp_path / "step-4").write_text("mine")
    with pytest.raises(UserError, match="step-3 has files of others .thesis.tex.: move it away"):
        begin(tmp_path, 3)
    with pytest.raises(UserError, match="step-4 is no folder: move it away"):
        begin(tmp_path, 4)
    (tmp_path / "step-5").mkdir()
    publish(make_unfinished(tmp_path / "tmp-step-5"), tmp_path / "step-5")
    assert (tmp_path / "step-5" / "part").is_file()


@pytest.mark.parametrize(
    "manifest",
    [
        b"\0" * 100,
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"files": []}',
        b'{"files": {"part": null}}',
        b'{"files": {"part": {"size": -1, "sha256": ""}}}',
        b'{"files": {"part": {"size": true, "sha256": ""}}}',
        b'{"files": {"part": {"size": 100}}}',
        b'{"files": {"../x": {"size": 100, "sha256": ""}}}',
        b'{"files": {"/etc/passwd": {"size": 100, "sha256": ""}}}',
        b'{"files": {"": {"size": 100, "sha256": ""}}}',
    ],
)
def test_a_manifest_that_is_none_is_unreadable(tmp_path, manifest):
    folder = make(tmp_path / "step-1")
    assert is_complete(folder)
    (folder / "manifest.json").write_bytes(manifest)
    assert read_manifest(folder) is None and not is_complete(folder)


def test_only_the_names_that_we_give_are_steps(tmp_path):
    for name in ("step-1", "step-01", "step-1x", "step-", "step--1", "step-\u0661"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-2").touch()
    assert [x.name for x in step_folders(tmp_path)] == ["step-1"]
