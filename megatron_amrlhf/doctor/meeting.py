"""Where the ranks meet: torch's key-value store at MASTER_ADDR:MASTER_PORT, without any collective.

A rank that does not come, or does not go on, costs rank 0 a time limit and is named; the others are
told to end.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_amrlhf.rendezvous import has_agent, tcp_store

BYE_SECONDS = 5.0  # rank 0 has the store: it leaves last
POLL_SECONDS = 0.02


class Unreachable(Exception):
    """This rank has lost, or never found, rank 0. The message says what to do."""


class Absent(Exception):
    """Some ranks did not get as far as a step in time; on rank 0 only.

    Attributes:
        step: what they should have done.
        ranks: theirs.
        seconds: how long rank 0 waited.
        values: of all ranks where they were to be gathered, None of those that are late.
    """

    def __init__(self, step: str, ranks: list[int], seconds: float, values: list):
        super().__init__(step, ranks, seconds)
        self.step, self.ranks, self.seconds, self.values = step, ranks, seconds, values


class Ended(Exception):
    """Rank 0 has ended the examination; on the other ranks. ``code`` is the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Meeting:
    """All ranks, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; one process alone where unset.

    Every method is called by every rank, in the same order.

    Args:
        timeout_seconds: longest wait for other ranks.

    Attributes:
        rank, world_size: of this process.
        host: its name.
        timeout_seconds: as given.

    Raises:
        Unreachable: rank 0 cannot be connected to, or cannot listen.
    """

    def __init__(self, timeout_seconds: float):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.host, self.timeout_seconds = socket.gethostname(), timeout_seconds
        self._answers = 0
        if self.world_size == 1:
            self._store: dist.Store = dist.HashStore()
            return
        self._store = self._connect(self.rank == 0 and not has_agent())

    @property
    def is_main(self) -> bool:
        """Rank 0, which judges and prints."""
        return self.rank == 0

    def connect(self, name: str) -> dist.Store:
        """A connection of its own to the store, for another thread; keys are under ``name``."""
        return dist.PrefixStore(name, self._connect(False))

    def gather(self, step: str, value: Any, limit_seconds: float | None = None) -> list:
        """Every rank's JSON-able ``value`` in rank order on rank 0, an empty list elsewhere.

        Args:
            step: its name, used once.
            value: of this rank.
            limit_seconds: how long rank 0 waits; None: ``timeout_seconds``.

        Raises:
            Absent: on rank 0, where ranks are too late.
        """
        with self._told_when_lost():
            self._store.set(f"{step}/{self.rank}", json.dumps(value))
        if not self.is_main:
            return []
        limit = self.timeout_seconds if limit_seconds is None else limit_seconds
        deadline = time.monotonic() + limit
        keys = [f"{step}/{rank}" for rank in range(self.world_size)]
        came = self._await(keys, deadline)
        values = [
            json.loads(self._store.get(key)) if there else None
            for key, there in zip(keys, came, strict=True)
        ]
        if not all(came):
            absent = [rank for rank, there in enumerate(came) if not there]
            raise Absent(step, absent, limit, values)
        return values

    def answer(self, value: Any = None, limit_seconds: float | None = None) -> Any:
        """Rank 0's JSON-able ``value`` (read on rank 0 only), on every rank.

        Args:
            value: of rank 0.
            limit_seconds: how long the others wait; None: by ``timeout_seconds``.

        Raises:
            Ended: on the other ranks, where rank 0 has called ``end`` instead.
            Unreachable: on the other ranks, where rank 0 is gone.
        """
        key = f"answer/{self._answers}"
        self._answers += 1
        if self.is_main:
            self._store.set(key, json.dumps({"value": value}))
            return value
        with self._told_when_lost():
            # Rank 0 may wait for a rank that is late for each of two gathers before this answer.
            limit = limit_seconds or 2 * self.timeout_seconds + 30
            self._store.wait([key], timedelta(seconds=limit))
            said = json.loads(self._store.get(key))
        if "end" in said:
            raise Ended(said["end"])
        return said["value"]

    def send(self, key: str, value: Any) -> None:
        """Puts a JSON-able value where ``receive`` finds it; a key is used once."""
        self._store.set(key, json.dumps(value))

    def receive(self, key: str, sender: int) -> Any:
        """Waits for what a rank sends.

        Raises:
            Absent: on rank 0, where it does not come in time.
            Unreachable: the same on another rank.
        """
        if self.is_main:
            try:
                self._store.wait([key], timedelta(seconds=self.timeout_seconds))
            except dist.DistStoreError:
                step = key.partition("/")[0]
                raise Absent(step, [sender], self.timeout_seconds, []) from None
            return json.loads(self._store.get(key))
        with self._told_when_lost():
            self._store.wait([key], timedelta(seconds=self.timeout_seconds))
            return json.loads(self._store.get(key))

    def end(self, code: int) -> int:
        """Rank 0 ends the examination with an exit code, also before its time.

        Others that still wait for an answer get ``Ended``; those that are here wait for the code.

        Returns:
            Rank 0's code, on every rank.
        """
        if not self.is_main:
            try:
                self.answer()
            except Ended as ended:
                return ended.code
            raise AssertionError("rank 0 went on")
        self._store.set(f"answer/{self._answers}", json.dumps({"end": code}))
        byes = [f"bye/{rank}" for rank in range(1, self.world_size)]
        self._await(byes, time.monotonic() + BYE_SECONDS)
        return code

    def leave(self) -> None:
        """Tells rank 0 that this rank needs the store no more."""
        if not self.is_main:
            with self._told_when_lost():
                self._store.set(f"bye/{self.rank}", "1")

    def _connect(self, is_server: bool) -> dist.Store:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        try:
            timeout = timedelta(seconds=self.timeout_seconds)
            options = {"wait_for_workers": False, "multi_tenant": True}
            store = tcp_store(is_server, timeout, **options)
        except (dist.DistError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            if is_server:
                raise Unreachable(
                    f"rank 0 (host {self.host}) cannot listen at port {port} ({reason}): choose "
                    "another MASTER_PORT"
                ) from None
            raise Unreachable(
                f"rank {self.rank} (host {self.host}) did not reach rank 0 at {host}:{port} within "
                f"{self.timeout_seconds:g} s ({reason}): does {host} resolve here, is its port "
                "open, and is rank 0 running?"
            ) from None
        return dist.PrefixStore("doctor", store)

    def _await(self, keys: list[str], deadline: float) -> list[bool]:
        """Which keys are there when all are, or at the deadline.

        It polls, as torch prints two warnings for a wait in vain.
        """
        while keys and not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return [self._store.check([key]) for key in keys]

    @contextmanager
    def _told_when_lost(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise Unreachable(
                f"rank {self.rank} (host {self.host}) waits in vain for rank 0 "
                f"({str(error).splitlines()[0]}): see what rank 0 has printed"
            ) from None
