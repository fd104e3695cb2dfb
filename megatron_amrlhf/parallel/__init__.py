"""Mesh, process groups, collectives. Importing it quiets what the pinned libraries always say."""

import importlib
import warnings
from collections.abc import Callable

import torch

for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)


def _import_megatron() -> None:
    """Imports megatron-core, on a CPU without the compiler that its decorators would load.

    ``patch_for_cpu`` switches their fusions off anyway, and loading the compiler takes every rank
    most of a second of its start.
    """

    def keep(function: Callable | None = None, **options: object) -> Callable:
        return function if function is not None else lambda decorated: decorated

    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = keep
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compiler


_import_megatron()
