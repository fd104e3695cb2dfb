"""Runs a function on several real gloo processes and returns what each rank returned."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore

from tests.patience import PATIENCE_SECONDS

# The fork server imports this once; every rank is then forked from it in milliseconds.
PRELOAD = ["tests.distributed.preload"]


def _rank_main(rank: int, world_size: int, port: int, folder: str, call: bytes) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent's
    )
    log = open(Path(folder) / f"rank{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    import torch  # noqa: PLC0415 - after the environment is set

    from megatron_amrlhf.parallel.mesh import start_processes, stop_processes  # noqa: PLC0415

    torch.set_num_threads(1)
    try:
        start_processes(timeout_seconds=300)
        function, arguments = pickle.loads(call)
        result = function(*arguments)
        (Path(folder) / f"rank{rank}.pkl").write_bytes(pickle.dumps(result))
        stop_processes()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


@contextmanager
def launch(world_size: int, function: Callable, *arguments) -> Iterator[list]:
    """The processes of all ranks, running; those that still do at the end are killed."""
    store = _meeting_place()
    with tempfile.TemporaryDirectory() as folder:
        ranks = _start(world_size, store.port, folder, function, arguments)
        try:
            yield ranks
        finally:
            _kill(ranks)


def run_on(world_size: int, function: Callable, *arguments) -> list:
    """Calls ``function(*arguments)`` on every rank; results in rank order.

    A failing rank ends all of them and its log is raised.
    """
    store = _meeting_place()
    with tempfile.TemporaryDirectory() as folder:
        _wait(_start(world_size, store.port, folder, function, arguments), folder)
        return [
            pickle.loads((Path(folder) / f"rank{r}.pkl").read_bytes()) for r in range(world_size)
        ]


def _meeting_place() -> TCPStore:
    """This process listens, on a port that no one else can take before the ranks come."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _start(world_size: int, port: int, folder: str, function: Callable, arguments: tuple) -> list:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # Plain pickle: multiprocessing's own sends a file descriptor a tensor and runs out of them.
    call = pickle.dumps((function, arguments))
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, port, folder, call))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _kill(ranks: list) -> None:
    for process in ranks:
        process.kill()
        process.join()


def _wait(ranks: list, folder: str) -> None:
    sentinels = {process.sentinel: rank for rank, process in enumerate(ranks)}
    failed = None
    while sentinels and failed is None:
        ready = multiprocessing.connection.wait(list(sentinels), timeout=PATIENCE_SECONDS)
        if not ready:
            failed = next(iter(sentinels.values()))
        for sentinel in ready:
            rank = sentinels.pop(sentinel)
            ranks[rank].join()
            if ranks[rank].exitcode != 0 and failed is None:
                failed = rank
    if failed is not None:
        _kill(ranks)
        log = (Path(folder) / f"rank{failed}.log").read_text()[-6000:]
        raise AssertionError(f"rank {failed} failed or hung:\n{log}")
