"""Bytes of the tensors that live in a process, now and at most; on a CPU too.

A CPU process' resident set holds libraries and freed memory as well; this counts tensors alone.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows every storage that an operation makes until it is freed.

    What was made outside is not counted, nor what an operation frees before it returns. It slows
    every torch operation down, so what runs inside is not to be timed.

    Attributes:
        now: bytes alive.
        peak: the largest ``now`` since ``reset_peak``.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def reset_peak(self) -> None:
        """Starts a new peak from what lives now."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def freed(_: weakref.ref) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
