"""The baseline b of eq. 13 and the offset delta of eq. 17."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_amrlhf.mask.statistics import (
    at_least_float32,
    group_means,
    masked_moments,
    row_means,
)


@dataclass
class RunningBaseline:
    """Exponential moving average of the signal's global mean, the state of threshold ``running``.

    The first step with valid tokens sets the mean; later ones move it by ``1 - decay``. A step
    without valid tokens leaves it. It belongs in the checkpoint.

    Attributes:
        decay: weight of the past in [0, 1].
        mean: the current average, signal units; 0 before the first update.
        num_updates: steps that had valid tokens.
    """

    decay: float
    mean: float = 0.0
    num_updates: int = 0

    def update(self, mean: float, count: float) -> float:
        """Takes in one step's global mean over ``count`` tokens and returns the new average."""
        if count > 0:
            is_first = self.num_updates == 0
            self.mean = mean if is_first else self.decay * self.mean + (1 - self.decay) * mean
            self.num_updates += 1
        return self.mean

    def state_dict(self) -> dict[str, float | int]:
        """The numbers that a checkpoint keeps; ``decay`` is configuration and not among them."""
        return {"mean": self.mean, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Goes on from what ``state_dict`` gave; a missing key is a KeyError."""
        self.mean, self.num_updates = float(state["mean"]), int(state["num_updates"])


def baseline_and_std(
    signal: Tensor,
    valid: Tensor,
    kind: str,
    *,
    fixed_value: float = 0.0,
    running: RunningBaseline | None = None,
    group_ids: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Baseline b of each row and the global standard deviation of the signal.

    Every kind enters exactly one all-reduce over ``group``; ``sequence`` and ``group`` means are
    local, so all answers to a prompt must lie on one data-parallel rank.

    Args:
        signal: ``[B, R]`` dense signal R(x, y_t); not read outside ``valid``.
        valid: ``[B, R]`` bool, response tokens.
        kind: ``fixed`` or ``offline`` (both: ``fixed_value``), ``running`` (updates ``running``,
            then uses it), ``batch`` (global mean), ``sequence`` (mean of the row) or ``group``
            (mean over tokens of a prompt's answers).
        fixed_value: b of ``fixed`` and ``offline``.
        running: state of ``running``, changed in place; call once a step.
        group_ids: ``[B]`` int64, needed by ``group``.
        group: last stage's data-parallel group; None: this process only.

    Returns:
        Baseline ``[B, 1]`` and std (0-dim, population, over the global batch whatever the kind),
        both in the signal's dtype (at least float32).

    Raises:
        ValueError: unknown kind.
    """
    # For every kind: delta may be in standard deviations, and all ranks meet in this one.
    moments = masked_moments(signal, valid, group)
    num_rows = signal.shape[0]
    if kind in ("fixed", "offline"):
        baseline_B = moments.mean.new_full((num_rows,), fixed_value)
    elif kind == "running":
        assert running is not None, "threshold 'running' needs its state"
        mean = running.update(moments.mean.item(), moments.count.item())
        baseline_B = moments.mean.new_full((num_rows,), mean)
    elif kind == "batch":
        baseline_B = moments.mean.expand(num_rows)
    elif kind == "sequence":
        baseline_B = row_means(signal, valid)
    elif kind == "group":
        assert group_ids is not None, "threshold 'group' needs group_ids"
        baseline_B = group_means(signal, valid, group_ids)
    else:
        raise ValueError(f"unknown threshold {kind!r}")
    dtype = at_least_float32(signal).dtype
    return baseline_B.to(dtype)[:, None], moments.std.to(dtype)


def delta_in_signal_units(delta: float, unit: str, std: Tensor) -> Tensor:
    """The offset of eq. 17 as a 0-dim tensor in the signal's units.

    It is above 0 where ``delta`` is, also for a signal without deviation (the log-ratios of the
    first step): what equals the baseline is then neutral, as eq. 17 says.

    Args:
        delta: the configured offset, at least 0.
        unit: ``signal`` (taken as it is) or ``deviations`` (times ``std``).
        std: 0-dim, the signal's global standard deviation.

    Raises:
        ValueError: unknown unit.
    """
    if unit not in ("signal", "deviations"):
        raise ValueError(f"unknown delta unit {unit!r}")
    offset = delta * std if unit == "deviations" else torch.full_like(std, delta)
    return offset.clamp(min=torch.finfo(offset.dtype).tiny) if delta > 0 else offset
