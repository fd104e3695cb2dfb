"""Tensors in files without a name."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from megatron_amrlhf.engine.disk import Disk
from megatron_amrlhf.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_has_its_values_and_no_name_in_the_folder(tmp_path, dtype):
    disk = Disk(str(tmp_path / "new" / "folder"))
    values = torch.randn(1001).to(dtype)
    copy, zeros = disk.copy_of(values), disk.zeros_like(values)
    assert copy.dtype == zeros.dtype == dtype
    assert torch.equal(copy, values) and not zeros.any()
    copy += 1
    assert torch.equal(copy, values + 1) and not zeros.any()
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_an_empty_tensor_needs_no_file(tmp_path):
    assert Disk(str(tmp_path)).copy_of(torch.empty(0)).numel() == 0


@pytest.mark.parametrize("folder", ["taken", "taken/disk"])
def test_a_folder_that_cannot_be_is_named(tmp_path, folder):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="engine.nvme_folder: .*taken.*: cannot be written"):
        Disk(str(tmp_path / folder))


def test_a_folder_that_is_gone_is_named(tmp_path):
    disk = Disk(str(tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="engine.nvme_folder: .*gone: cannot be written"):
        disk.zeros_like(torch.empty(3))


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for 1 GiB more"):
        Disk(str(tmp_path)).zeros_like(torch.empty(2**28, device="meta"))
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_room_is_taken_leaves_no_file(tmp_path, monkeypatch):
    """Taking room for a large tensor takes long."""
    seen = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: seen.append(list(tmp_path.iterdir())))
    disk = Disk(str(tmp_path))
    with disk._file(4):
        pass
    assert seen == [[]]
