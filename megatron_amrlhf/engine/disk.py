"""Tensors whose memory is a file: what fits neither the device nor the host's memory.

Files are mapped (``torch.from_file``), so the optimizer, checkpoints and gathers use such tensors
as any other on the CPU, and the kernel moves pages to and from the disk. DeepSpeed's own swapping
needs an op compiled on each machine, and tensors of above a megabyte.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.sizes import in_units


class Disk:
    """Makes tensors in a folder. Their files have no name, so they end with the process.

    Args:
        folder: on a local disk; made if it is not there.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, folder: str):
        self._folder = expanded(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """1-D zeros of a 1-D tensor's size and dtype.

        Raises:
            UserError: the disk has no room, or the folder cannot be written.
        """
        assert tensor.dim() == 1, tensor.shape
        # Neither room on a disk nor a mapping can be of 0 bytes.
        if not tensor.numel():
            return torch.zeros_like(tensor, device="cpu")
        num_bytes = tensor.numel() * tensor.element_size()
        try:
            with self._file(num_bytes) as name:
                return torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise self._unusable(error) from None
            raise UserError(
                f"engine.nvme_folder: {self._folder}: no room for {in_units(num_bytes)} more "
                "(every rank of the machine puts its part here): use a larger disk, or offload less"
            ) from None

    @contextmanager
    def _file(self, num_bytes: int) -> Iterator[str]:
        """A file of zeros; its own name is gone at once, so that a kill leaves nothing."""
        handle, name = tempfile.mkstemp(prefix="amrlhf-", dir=self._folder)
        try:
            os.unlink(name)
            # Room is taken now: a full disk would else kill the process at some later write.
            os.posix_fallocate(handle, 0, num_bytes)
            yield f"/proc/self/fd/{handle}"
        finally:
            os.close(handle)

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"engine.nvme_folder: {self._folder}: cannot be written ({error.strerror})"
        )

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The same values in a file."""
        return self.zeros_like(tensor).copy_(tensor)
