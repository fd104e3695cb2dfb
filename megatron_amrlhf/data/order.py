"""Which samples come next: a function of (seed, consumed samples), never of the layout.

A checkpoint needs only the seed, the number of consumed samples and the data's fingerprint to go
on, with any number of data-parallel ranks.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from megatron_amrlhf.data.jsonl import fingerprint
from megatron_amrlhf.errors import UserError

__all__ = ["PADDING", "DataPosition", "epoch_permutation", "fingerprint", "shard", "take"]

PADDING = -1
"""Index that stands for "no sample" where ranks have unequal shares."""


def epoch_permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of the ``n`` samples in one epoch; depends on (n, seed, epoch) only."""
    return _permutation(n, seed, epoch).tolist()


def take(n: int, seed: int, consumed: int, count: int) -> list[int]:
    """Indices of the next ``count`` samples after ``consumed`` ones, going on into later epochs.

    Args:
        n: samples in the data set.
        seed: of the data order (``run.seed``).
        consumed: samples used since the start of the run, over all DP ranks and epochs.
        count: samples wanted.

    Returns:
        ``count`` indices in [0, n). A sample can be in it twice only where it crosses an epoch.
    """
    assert n > 0 and consumed >= 0 and count >= 0, (n, consumed, count)
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(consumed + len(indices), n)
        missing = count - len(indices)
        indices.extend(_permutation(n, seed, epoch)[offset : offset + missing].tolist())
    return indices


def shard(indices: list[int], dp_rank: int, dp_size: int) -> list[int]:
    """This rank's contiguous share of ``indices``, of the same length on every rank.

    The shares differ by one sample at most, the first ranks have the longer ones; shorter ones are
    filled with `PADDING` (-1) at their end, so that every rank enters the same collectives. The
    shares of ranks 0, 1, ... without the padding, one after the other, are ``indices``.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    base, remainder = divmod(len(indices), dp_size)
    start = dp_rank * base + min(dp_rank, remainder)
    share = list(indices[start : start + base + (dp_rank < remainder)])
    width = base + (remainder > 0)
    return share + [PADDING] * (width - len(share))


class DataPosition:
    """Where a run stands in its training data; what a checkpoint keeps of that.

    A resumed run goes on after the last consumed sample, with another number of samples a step
    as well, if its number of steps is given.

    Args:
        path: the data file.
        samples: samples in it.
        seed: of the order.
        per_step: samples a step.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str, samples: int, seed: int, per_step: int):
        self.path, self.samples, self.seed, self.per_step = path, samples, seed, per_step
        self.fingerprint = fingerprint(path)
        self._resumed_after, self._consumed_then = 0, 0

    def indices(self, step: int) -> list[int]:
        """The samples of a step (1-based)."""
        return take(self.samples, self.seed, self.consumed(step - 1), self.per_step)

    def consumed(self, steps: int) -> int:
        """Samples used in the first ``steps`` steps of the run."""
        return self._consumed_then + (steps - self._resumed_after) * self.per_step

    def state_dict(self, steps: int) -> dict[str, int | str]:
        """What a checkpoint after ``steps`` steps keeps, JSON-able."""
        consumed = self.consumed(steps)
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "consumed_samples": consumed,
            "epoch": consumed // self.samples,
        }

    def load_state_dict(
        self, state: dict, steps: int, accept_changed: bool, ends_with_data: bool
    ) -> None:
        """Goes on from what ``state_dict`` gave after ``steps`` steps.

        Args:
            state: the checkpoint's.
            steps: done so far.
            accept_changed: whether the data and the seed may be others.
            ends_with_data: whether the run's number of steps comes from the data and ``per_step``.

        Raises:
            UserError: the data or the seed are others, or the number of steps would be another one.
        """
        if ends_with_data and state["consumed_samples"] != steps * self.per_step:
            raise UserError(
                f"the checkpoint's {steps} steps used {state['consumed_samples']} samples, not "
                f"{self.per_step} each: put algorithm.batch_size or rollout.prompts_per_step back, "
                "or say by run.steps where the run ends"
            )
        if not accept_changed:
            why = None
            if state["fingerprint"] != self.fingerprint:
                why = f"data.train: {self.path} is not what the checkpoint was trained on"
            elif state["seed"] != self.seed:
                why = f"run.seed: {self.seed} is not the checkpoint's {state['seed']}"
            if why:
                raise UserError(
                    f"{why}; put it back, set checkpoint.accept_changed_data: true to go on all "
                    "the same, or use another run.name"
                )
        self._resumed_after, self._consumed_then = steps, state["consumed_samples"]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """``[n]`` int64."""
    # Sorting by random() keys: Python promises the same random() for a seed in all versions, and
    # promises nothing for shuffle().
    generator = random.Random(f"order/{seed}/{epoch}")
    keys = np.fromiter((generator.random() for _ in range(n)), np.float64, n)
    return np.argsort(keys, kind="stable")
