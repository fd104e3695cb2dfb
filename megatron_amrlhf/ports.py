"""Ports at which the ranks of a run meet, none of which Linux gives to outgoing connections.

Those begin at 32768 (``net.ipv4.ip_local_port_range``): a port taken from there may be gone before
rank 0 listens on it.
"""

from __future__ import annotations

import ipaddress
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


def loopback_address(host: str) -> str | None:
    """The address that only this machine reaches, where ``host`` itself says so, else None.

    A host's name is not resolved: a machine may know its own by a loopback address, though others
    are to find it by that name.
    """
    host = "127.0.0.1" if host == "localhost" else host
    try:
        return host if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return None


def listen_at(address: str, port: int) -> socket.socket:
    """A socket that listens at one address alone.

    Raises:
        OSError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(socket.SOMAXCONN)
    except OSError:
        server.close()
        raise
    return server
