"""Rotary positions: which kinds are ours, and numbers that make sense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from megatron_amrlhf.errors import UserError

# Rotary frequencies that are the same for every row, whatever its length. transformers computes
# "dynamic" and "longrope" anew from the longest row of a batch, so that a token's rotation would
# depend on the rows packed beside it and keys in the cache would be stale.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_BY_BATCH = ("dynamic", "longrope")
FROM_ABOVE_0 = (
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
FROM_0 = ("mscale", "mscale_all_dim")


def check_rope(config: PretrainedConfig) -> None:
    """Refuses rotary positions that are not ours, however the file spells them.

    Args:
        config: transformers' object: of ``rope_parameters``, ``rope_scaling``, ``rope_theta`` and
            ``type`` it holds what transformers computes with.

    Raises:
        UserError: names the key.
    """
    rope = config.rope_parameters
    if not isinstance(rope, Mapping) or any(isinstance(x, Mapping) for x in rope.values()):
        raise UserError(f"rope_parameters must be one set of numbers for all layers (got {rope})")
    kind = rope["rope_type"]
    if kind in ROPE_BY_BATCH:
        raise UserError(
            f"rope_parameters: rope type {kind!r} is not supported: its frequencies depend on the "
            f"longest row of a batch, use {' or '.join(ROPE_TYPES)}"
        )
    if kind not in ROPE_TYPES:
        raise UserError(
            f"rope_parameters: rope type {kind!r} is not supported: use {' or '.join(ROPE_TYPES)}"
        )
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if part not in (None, 1, 1.0):
        raise UserError(f"partial_rotary_factor {part} is not supported: only 1")
    _check_numbers(rope)
    if kind == "default" and rope.get("factor") not in (None, 1, 1.0):
        raise UserError(
            f"rope_parameters: factor {rope['factor']} without a rope_type that reads it: give one "
            f"of {', '.join(ROPE_TYPES[1:])}"
        )
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(
            f"rope_parameters: low_freq_factor {rope['low_freq_factor']} must be below "
            f"high_freq_factor {rope['high_freq_factor']}"
        )


def _check_numbers(rope: Mapping[str, Any]) -> None:
    def check(keys: tuple[str, ...], lowest: float, strictly: bool) -> None:
        for key in keys:
            found = rope.get(key)
            if found is None and key != "rope_theta":
                continue
            if (
                not isinstance(found, int | float)
                or isinstance(found, bool)
                or not math.isfinite(found)
                or found < lowest
                or (strictly and found == lowest)
            ):
                wanted = "above" if strictly else "of at least"
                raise UserError(
                    f"config.json: {key} must be a finite number {wanted} {lowest} (got {found!r})"
                )

    check(("rope_theta",), 1, strictly=True)  # at 1 and below, no position turns further apart
    check(("factor",), 1, strictly=False)
    check(FROM_ABOVE_0, 0, strictly=True)
    check(FROM_0, 0, strictly=False)
