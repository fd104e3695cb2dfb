"""What is deleted or replaced has a note of ours inside and nothing of somebody else's."""

import errno
import json
import os
import time

import pytest

from megatron_amrlhf import owned
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import (
    NOTE_NAME,
    OTHER_HOST_SECONDS,
    begin_beside,
    delete_ours,
    is_abandoned,
    is_ours,
    is_whole,
    make_folder,
    put_in_place,
    why_not_ours,
)

DEAD = 4_194_303


def complete(target, text="ours"):
    """A folder as an export is made."""
    new = begin_beside(target, "export")
    (new / "inner").mkdir()
    (new / "a.txt").write_text(text)
    (new / "inner" / "b.txt").write_text(text)
    put_in_place(new, target, "export")
    return target


def names(folder):
    return sorted(x.name for x in folder.iterdir())


def test_a_complete_folder_is_ours_and_replaced(tmp_path):
    target = complete(tmp_path / "x")
    assert is_whole(target, "export") and why_not_ours(target, "export") == ""
    complete(target, "newer")
    assert (target / "a.txt").read_text() == "newer" and names(tmp_path) == ["x"]
    delete_ours(target, "export")
    delete_ours(target, "export")  # none may be there
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: (x / "notes.txt").write_text("mine"), r"added or changed .*\(notes.txt\)"),
        (lambda x: (x / "inner" / "c").write_text("mine"), r"\(inner/c\)"),
        (lambda x: (x / "a.txt").write_text("edit"), r"\(a.txt\)"),
        (lambda x: (x / "link").symlink_to("nowhere"), r"\(link\)"),
        (lambda x: (x / NOTE_NAME).unlink(), "was not made by this version"),
        (lambda x: (x / NOTE_NAME).write_text("{}"), "was not made by this version"),
        (lambda x: (x / NOTE_NAME).write_text("[" * 99999), "was not made by this version"),
        (lambda x: (x / NOTE_NAME).write_bytes(bytes(99)), "was not made by this version"),
        (lambda x: os.replace(x / NOTE_NAME, x / "b"), "was not made by this version"),
    ],
)
def test_what_a_user_has_added_or_changed_stays(tmp_path, change, words):
    target = complete(tmp_path / "x")
    change(target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for work in (begin_beside, delete_ours):
        with pytest.raises(UserError, match=words):
            work(target, "export")
    assert not is_whole(target, "export")
    assert {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()} == before


def test_a_folder_is_no_other_kinds(tmp_path):
    target = complete(tmp_path / "x")
    assert not is_ours(target, "conversion")
    with pytest.raises(UserError, match="was not made by"):
        begin_beside(target, "conversion")


def test_nothing_is_ours_for_its_name(tmp_path):
    users = tmp_path / ".x.tmp"
    users.mkdir()
    (users / "thesis.tex").write_text("mine")
    (tmp_path / ".x.old").mkdir()
    (tmp_path / ".x.old" / "data").write_text("mine")
    complete(complete(tmp_path / "x"))
    assert names(tmp_path) == [".x.old", ".x.tmp", "x"]
    assert (users / "thesis.tex").exists() and (tmp_path / ".x.old" / "data").exists()
    (tmp_path / "link").symlink_to(users)
    assert "is a link" in why_not_ours(tmp_path / "link", "export")
    assert "is no folder" in why_not_ours(users / "thesis.tex", "export")


def test_what_killed_processes_left_goes_or_is_put_back(tmp_path):
    target = complete(tmp_path / "x")
    target.rename(tmp_path / ".x.old")  # a kill between the two renamings
    made_by(tmp_path / ".x.tmp", DEAD)
    new = begin_beside(target, "export")
    assert (target / "a.txt").read_text() == "ours"
    assert new.name == ".x.tmp" and names(new) == [NOTE_NAME]


def test_what_a_living_process_writes_is_left_to_it(tmp_path):
    other = made_by(tmp_path / ".x.tmp", os.getppid())
    assert begin_beside(tmp_path / "x", "export").name == ".x.tmp.1"
    assert (other / "part").exists()


def made_by(folder, pid, **more):
    make_folder(folder, "export")
    note = json.loads((folder / NOTE_NAME).read_text())
    (folder / NOTE_NAME).write_text(json.dumps(note | {"pid": pid} | more))
    (folder / "part").touch()
    return folder


def test_what_another_host_writes_is_left_to_it_for_a_day(tmp_path):
    other = made_by(tmp_path / ".x.tmp", DEAD, host="far")
    assert not is_abandoned(other)
    day_ago = time.time() - OTHER_HOST_SECONDS - 60
    for path in other.iterdir():
        os.utime(path, (day_ago, day_ago))
    assert is_abandoned(other)


def test_the_note_is_deleted_last(tmp_path, monkeypatch):
    """So that the next start still knows what a kill while deleting has left."""
    target = complete(tmp_path / "x")

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(owned.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_ours(target, "export")
    assert is_ours(target, "export") and why_not_ours(target, "export") == ""


def test_a_kill_before_the_note_was_whole_leaves_nothing_to_lose(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f".{NOTE_NAME}.{DEAD}.tmp").write_text("{")
    assert why_not_ours(tmp_path / "x", "export") == ""
    delete_ours(tmp_path / "x", "export")
    assert names(tmp_path) == []


def test_a_full_disk_leaves_no_folder_without_its_note(tmp_path, monkeypatch):
    (tmp_path / ".x.tmp").mkdir()  # of a process that was killed before its note

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owned, "write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            begin_beside(tmp_path / "x", "export")
    assert names(tmp_path) == []
    (tmp_path / ".x.tmp").mkdir()
    complete(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_an_empty_folder_holds_nothing_to_lose(tmp_path):
    (tmp_path / "x").mkdir()
    assert complete(tmp_path / "x").is_dir() and names(tmp_path) == ["x"]
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "x", "export")
