"""Sizes in bytes: their binary units, and how a person reads them."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30


def in_units(num_bytes: float) -> str:
    """Bytes with three digits and a binary unit, such as ``1.25 GiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= size:
            value = num_bytes / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{num_bytes:.0f} B"
