"""Who can reach the store by which ranks find each other."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_amrlhf import ports, rendezvous
from megatron_amrlhf.errors import UserError

LISTENS = "0A"  # a socket's state in /proc/net/tcp
SECONDS = timedelta(seconds=20)


@pytest.fixture
def ranks(monkeypatch):
    """Rank 0 of two on this machine, at a free port."""
    port = str(ports.free_port())
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", rendezvous.GLOO_INTERFACE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def listeners(port: int) -> set[str]:
    """Local addresses, as the kernel writes them, at which somebody listens."""
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    found = [row[1].split(":") for row in rows if row[3] == LISTENS]
    return {address for address, at in found if int(at, 16) == port}


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "0100007F"), ("localhost", "0100007F"), ("127.0.0.2", "0200007F")],
)
def test_the_store_of_one_machine_is_open_to_it_alone(ranks, host, address):
    ranks.setenv("MASTER_ADDR", host)
    store = rendezvous.tcp_store(True, SECONDS, wait_for_workers=False)
    assert listeners(store.port) == {address}
    store.set("key", "value")
    assert rendezvous.tcp_store(False, SECONDS).get("key") == b"value"


def test_the_store_of_several_machines_stays_reachable(ranks):
    """By a name that may stand for a loopback address on the very machine that others look for."""
    ranks.setenv("MASTER_ADDR", socket.gethostname())
    assert rendezvous.private_store(SECONDS) is None and not rendezvous.keep_gloo_inside()
    store = rendezvous.tcp_store(True, SECONDS, wait_for_workers=False)
    assert listeners(store.port) & {"00000000", "0" * 32}


def test_a_taken_port_is_one_line(ranks):
    with ports.listen_at("127.0.0.1", int(os.environ["MASTER_PORT"])):
        with pytest.raises(UserError, match="cannot listen at port .* choose another MASTER_PORT"):
            rendezvous.private_store(SECONDS)


def test_torchruns_store_is_torchruns(ranks):
    ranks.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous.private_store(SECONDS) is None


def test_a_lone_process_listens_nowhere(ranks):
    ranks.setenv("WORLD_SIZE", "1")
    assert isinstance(rendezvous.private_store(SECONDS), dist.HashStore)


@pytest.mark.parametrize("chosen", [None, "eth7"])
def test_gloo_stays_inside_unless_an_interface_is_chosen(ranks, chosen):
    if chosen:
        ranks.setenv(rendezvous.GLOO_INTERFACE, chosen)
    assert rendezvous.keep_gloo_inside() == (chosen is None)
    assert os.environ[rendezvous.GLOO_INTERFACE] == (chosen or "lo")
    os.environ.pop(rendezvous.GLOO_INTERFACE)


@pytest.mark.parametrize("host", ["", "node1", "10.0.0.1", "::", "0.0.0.0", "127.evil.org"])
def test_what_others_reach_is_no_loopback(host):
    assert ports.loopback_address(host) is None


def test_the_loopback_of_the_newer_protocol_is_one():
    assert ports.loopback_address("::1") == "::1"
