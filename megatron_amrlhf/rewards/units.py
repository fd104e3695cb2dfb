"""Where the reward of a unit of figure 1 stands."""

from __future__ import annotations

import torch
from torch import Tensor


def place_on_last(rewards_BR: Tensor, unit_ids_BR: Tensor, valid_BR: Tensor) -> Tensor:
    """Keeps the reward of each unit on its last valid token; 0 elsewhere. Shapes ``[B, R]``."""
    is_last = valid_BR.clone()
    is_last[:, :-1] &= (unit_ids_BR[:, :-1] != unit_ids_BR[:, 1:]) | ~valid_BR[:, 1:]
    return torch.where(is_last, rewards_BR, 0.0)
