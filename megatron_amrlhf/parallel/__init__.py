"""Mesh, process groups, collectives. Importing it quiets what the pinned libraries always say."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)


@contextmanager
def without_compiler() -> Iterator[None]:
    """For imports: on a CPU functions that ask to be compiled stay as they are.

    Loading the compiler takes every rank seconds of its start, and nothing here is compiled on a
    CPU: ``patch_for_cpu`` switches megatron-core's fusions off.
    """

    def keep(function: Callable | None = None, **options: object) -> Callable:
        return function if function is not None else lambda decorated: decorated

    compiler = torch.compile
    if not torch.cuda.is_available():
        torch.compile = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


with without_compiler():
    import megatron.core  # noqa: F401
