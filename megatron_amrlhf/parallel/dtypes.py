"""What dtype this machine multiplies fast: what ``auto`` in the configuration becomes.

A CPU without instructions for bfloat16 multiplies it 8 to 17 times slower than float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm's BF16"}  # by flag
# Rows, inner size and columns; the second one is as large as a small model's, and takes seconds
# where there are no instructions for it, as the first one tells.
PRODUCTS = ((16, 256, 256), (128, 512, 768))
FAR_SLOWER = 3.0
MEASURED_SECONDS = 0.05
SLOW_FACTOR = 1.5  # bfloat16 that was asked for is remarked upon


@dataclass(frozen=True)
class DtypeChoice:
    """What ``auto`` means on a machine.

    Attributes:
        dtype: ``float32`` or ``bfloat16``.
        why: a clause that names what was found.
    """

    dtype: str
    why: str


def own_choice(cpuinfo: Path = CPUINFO, factor: Callable[[], float] | None = None) -> DtypeChoice:
    """Bfloat16 where this process's device multiplies it no slower than float32.

    A GPU is taken at its word; a CPU's flags are confirmed by a product.

    Args:
        cpuinfo: the processor's flags, as Linux tells them.
        factor: measures; None: ``bfloat16_factor``.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice("bfloat16", "this GPU has bfloat16")
        return DtypeChoice("float32", "this GPU has no bfloat16")
    found = instructions(cpuinfo)
    if found is None:
        return DtypeChoice("float32", "this CPU has no bfloat16 instructions (AVX512-BF16 or AMX)")
    measured = (factor or bfloat16_factor)()
    if measured > 1:
        why = f"the CPU has {found}, but bfloat16 products take {measured:.1f} times as long"
        return DtypeChoice("float32", f"{why} as float32 ones")
    return DtypeChoice("bfloat16", f"the CPU has {found}, {1 / measured:.1f} times as fast")


def instructions(cpuinfo: Path = CPUINFO) -> str | None:
    """The name of the processor's instructions for bfloat16; None where there are none."""
    if not cpuinfo.is_file():
        return None
    flags: set[str] = set()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags.update(values.split())
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), None)


def bfloat16_factor(seconds: float = MEASURED_SECONDS) -> float:
    """Time of a product in bfloat16 over that in float32, on the CPU; takes about ``seconds``.

    It is one thread's own time, so that what else runs on the machine counts little.
    """
    factor, threads = 1.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for sizes in PRODUCTS:
            factor = _factor_of(sizes, seconds / len(PRODUCTS))
            if factor > FAR_SLOWER:
                break
    finally:
        torch.set_num_threads(threads)
    return factor


def _factor_of(sizes: tuple[int, int, int], seconds: float) -> float:
    """Of the fastest of several products of these sizes, taken in turn."""
    rows, inner, columns = sizes
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    pairs = {
        dtype: (torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype))
        for dtype in best
    }
    for left, right in pairs.values():
        left @ right  # the first one sets things up
    deadline = time.thread_time() + seconds
    while time.thread_time() < deadline or float("inf") in best.values():
        for dtype, (left, right) in pairs.items():
            start = time.thread_time()
            left @ right
            best[dtype] = min(best[dtype], time.thread_time() - start)
    return best[torch.bfloat16] / best[torch.float32]


def slow_line(key: str, factor: float) -> str:
    """What to tell of bfloat16 that was asked for by ``key``."""
    return (
        f"warning: bfloat16 products take {factor:.0f} times as long as float32 ones on this CPU: "
        f"{key}: auto takes float32 here"
    )


def slowest(choices: Sequence[DtypeChoice]) -> DtypeChoice:
    """What all can take: float32 as soon as one machine wants it."""
    return next((choice for choice in choices if choice.dtype == "float32"), choices[0])
