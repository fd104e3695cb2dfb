"""Times of the job's network: all-reduce over all ranks, exchanges between pairs of them.

Every rank enters every collective. They run in a thread, so that a rank that hangs in one can still
say which; what it had entered tells who the others wait for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from megatron_amrlhf.doctor.machine import own_device
from megatron_amrlhf.doctor.meeting import Meeting
from megatron_amrlhf.doctor.plan import Pair
from megatron_amrlhf.doctor.records import Traffic
from megatron_amrlhf.rendezvous import keep_gloo_inside
from megatron_amrlhf.sizes import MIB

ALL_REDUCE_BYTES = {"cpu": (4096, MIB // 4, 4 * MIB), "cuda": (4096, 4 * MIB, 128 * MIB)}
LINK_BYTES = {"cpu": MIB, "cuda": 64 * MIB}
REPEATS = 5  # the fastest counts: what else the machine does makes the others slower
GRACE_SECONDS = 10.0  # all ranks end together, or give up together
# The process group's own limit is later than ours, which can say more.
LATER_SECONDS = 300.0


class Measurement:
    """A rank's part in the measuring of the network.

    Args:
        meeting: of all ranks.
        plan: rounds of pairs, the same on every rank.
    """

    def __init__(self, meeting: Meeting, plan: Sequence[Sequence[Pair]]):
        self._meeting, self._plan = meeting, plan
        self._device = own_device()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._entered, self._name, self._error, self._done = 0, "nothing", "", False
        self._all_reduce: dict[int, float] = {}
        self._exchanges: dict[int, float] = {}

    @property
    def is_stuck(self) -> bool:
        """Whether it still hangs in a collective, so that the process cannot end in peace."""
        return self._thread.is_alive()

    def gather(self) -> list[Traffic]:
        """Measures for ``meeting.timeout_seconds`` at most; every rank's times on rank 0."""
        self._thread.start()
        self._thread.join(self._meeting.timeout_seconds)
        own = Traffic(
            rank=self._meeting.rank,
            entered=self._entered,
            name=self._name,
            done=self._done,
            error=self._error,
            all_reduce=dict(self._all_reduce),
            exchanges=dict(self._exchanges),
        )
        return [_read(x) for x in self._meeting.gather("network", asdict(own), GRACE_SECONDS)]

    def _run(self) -> None:
        try:
            self._measure()
        except (RuntimeError, OSError) as error:  # torch.distributed's errors are RuntimeErrors
            self._error = (str(error).strip().splitlines() or [type(error).__name__])[0]

    def _measure(self) -> None:
        rank, kind = self._meeting.rank, self._device.type
        if kind == "cuda":
            torch.cuda.set_device(self._device)
        self._enter(0, "the start of the process group")
        keep_gloo_inside()
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=self._meeting.connect("network"),
            rank=rank,
            world_size=self._meeting.world_size,
            timeout=timedelta(seconds=self._meeting.timeout_seconds + LATER_SECONDS),
        )
        sizes = ALL_REDUCE_BYTES[kind]
        for number, size in enumerate(sizes, start=1):
            self._enter(number, f"the all-reduce of {size} bytes")
            data = torch.zeros(size, dtype=torch.uint8, device=self._device)
            self._all_reduce[size] = self._fastest(partial(dist.all_reduce, data))
        ready = torch.zeros(1, device=self._device)
        out = torch.zeros(LINK_BYTES[kind], dtype=torch.uint8, device=self._device)
        into = torch.empty_like(out)
        last = len(sizes)
        for pairs in self._plan:
            self._enter(last + 1, "the barrier before an exchange")
            dist.all_reduce(ready)
            self._wait()
            partner = partner_of(rank, pairs)
            if partner is not None:
                self._enter(last + 2, f"the exchange with rank {partner}")
                seconds = self._fastest(partial(_exchange, out, into, partner))
                self._exchanges[partner] = seconds
            last += 2
        self._enter(last + 1, "the barrier at the end")
        dist.all_reduce(ready)
        self._wait()
        dist.destroy_process_group()
        self._done = True

    def _enter(self, number: int, name: str) -> None:
        """Notes what comes; ``number`` is the same on all ranks, also where some have no part."""
        self._entered, self._name = number, name

    def _fastest(self, act: Callable[[], object]) -> float:
        """Seconds of the fastest of ``REPEATS``, after one that makes connections."""
        times = []
        for _ in range(1 + REPEATS):
            self._wait()
            start = time.perf_counter()
            act()
            self._wait()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def partner_of(rank: int, pairs: Sequence[Pair]) -> int | None:
    """Whom a rank meets in a round; None: nobody."""
    return next((sum(pair) - rank for pair in pairs if rank in pair), None)


def _exchange(out: torch.Tensor, into: torch.Tensor, partner: int) -> None:
    """Sends and receives at once."""
    works = [
        dist.P2POp(dist.isend, out, partner),
        dist.P2POp(dist.irecv, into, partner),
    ]
    for work in dist.batch_isend_irecv(works):
        work.wait()


def _read(record: dict) -> Traffic:
    """JSON has made text of the keys."""
    for name in ("all_reduce", "exchanges"):
        record[name] = {int(key): value for key, value in record[name].items()}
    return Traffic(**record)
