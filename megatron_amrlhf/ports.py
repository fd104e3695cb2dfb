"""Ports at which the ranks of a run meet, none of which Linux gives to outgoing connections.

Those begin at 32768 (``net.ipv4.ip_local_port_range``): a port taken from there may be gone before
rank 0 listens on it.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping

FREE_PORTS = range(10000, 20000)
JOB_PORTS = range(20000, 32000)


def job_port(environment: Mapping[str, str]) -> int:
    """A port that jobs of one node do not share, nor a requeued job with what it left behind."""
    job, restart = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    return JOB_PORTS[(int(job) + 1009 * int(restart)) % len(JOB_PORTS)]


def free_port() -> int:
    """A port that nobody listens on now, seldom one that another start has just been given."""
    for port in random.SystemRandom().sample(FREE_PORTS, len(FREE_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {FREE_PORTS[0]} to {FREE_PORTS[-1]}")
