"""torch's key-value store, by which ranks find each other; on one machine only that reaches it.

torch's own server listens on all interfaces, and whoever reaches it can change what ranks read.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.ports import listen_at, loopback_address

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
LOOPBACK_INTERFACE = "lo"


def has_agent() -> bool:
    """Whether torchrun has a store at the port, which its ranks use."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_on_one_machine() -> bool:
    """Whether MASTER_ADDR is an address that other machines cannot reach."""
    return loopback_address(os.environ.get("MASTER_ADDR", "")) is not None


def keep_gloo_inside() -> bool:
    """On one machine gloo's connections take its loopback interface too, unless one is chosen.

    Returns:
        Whether a variable of the environment was set for that.
    """
    if not is_on_one_machine() or GLOO_INTERFACE in os.environ:
        return False
    os.environ[GLOO_INTERFACE] = LOOPBACK_INTERFACE
    return True


def private_store(timeout: timedelta) -> dist.Store | None:
    """The store of ranks that are all on this machine; None: it is left to torch.

    Raises:
        UserError: on rank 0, where MASTER_PORT is taken.
    """
    world_size, port = int(os.environ["WORLD_SIZE"]), os.environ["MASTER_PORT"]
    if world_size == 1:
        return dist.HashStore()
    if has_agent() or not is_on_one_machine():
        return None
    try:
        return tcp_store(os.environ["RANK"] == "0", timeout, world_size=world_size)
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen at port {port} ({error.strerror}): start it again, or choose "
            "another MASTER_PORT"
        ) from None


def tcp_store(is_server: bool, timeout: timedelta, **options) -> dist.TCPStore:
    """A connection to the store at MASTER_ADDR:MASTER_PORT, and the store itself on its server.

    Args:
        is_server: whether this process has the store.
        timeout: longest wait.
        options: more of torch's own.

    Raises:
        OSError: the server's port is taken on this machine.
        torch.distributed.DistError: nobody answers; the port is taken, where others reach it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = loopback_address(host)
    if is_server and address is not None:
        options["master_listen_fd"] = listen_at(address, port).detach()
    return dist.TCPStore(address or host, port, is_master=is_server, timeout=timeout, **options)
