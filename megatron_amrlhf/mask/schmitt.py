"""Signs of tokens: the Schmitt trigger of section 4.1 and appendix E."""

from __future__ import annotations

import torch
from torch import Tensor


def signs(
    signal: Tensor, valid: Tensor, baseline: Tensor, delta: Tensor | float, neutral: str
) -> Tensor:
    """Good, bad and neutral tokens, eq. 17 and 18.

    +1 where ``r > b + delta``, -1 where ``r < b - delta``, else neutral. With ``delta == 0`` the
    tie ``r == b`` is -1, so that good is exactly ``r > b`` as in eq. 13. A NaN is neutral.

    Args:
        signal: ``[B, R]``, floating.
        valid: ``[B, R]`` bool, response tokens.
        baseline: ``[B, 1]`` (or anything that broadcasts), signal units.
        delta: offset >= 0 in signal units, float or 0-dim tensor.
        neutral: ``drop`` leaves neutral tokens 0 (eq. 18); ``hold`` gives them the last sign before
            them in the row (hysteresis), 0 before the first crossing.

    Returns:
        ``[B, R]`` int8 in {-1, 0, +1}, 0 outside ``valid``.

    Raises:
        ValueError: unknown ``neutral``.
    """
    assert signal.shape == valid.shape, (signal.shape, valid.shape)
    delta = torch.as_tensor(delta, dtype=baseline.dtype, device=baseline.device)
    good = signal > baseline + delta
    # Eq. 13 rejects the tie, eq. 17 has it neutral. By torch.where, without an if: delta may lie
    # on the device, and asking for it would wait.
    bad = torch.where(delta == 0, signal <= baseline, signal < baseline - delta)
    signs_BR = (good.to(torch.int8) - bad.to(torch.int8)) * valid
    if neutral == "drop":
        return signs_BR
    if neutral == "hold":
        # Else the last sign would be held on through the padding.
        return hold_last_sign(signs_BR) * valid
    raise ValueError(f"unknown neutral {neutral!r}")


def hold_last_sign(signs: Tensor) -> Tensor:
    """Fills each 0 of a row with the nearest non-zero entry to its left; leading 0 stay.

    Args:
        signs: ``[B, R]`` int8.

    Returns:
        ``[B, R]`` int8.
    """
    if signs.shape[1] == 0:
        return signs
    positions_R = torch.arange(signs.shape[1], device=signs.device)
    last_BR = torch.where(signs != 0, positions_R, -1).cummax(dim=1).values
    # Before the first crossing the index -1 becomes 0, where the sign is 0: nothing to hold.
    return signs.gather(1, last_BR.clamp(min=0))
