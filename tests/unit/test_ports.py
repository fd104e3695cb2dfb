"""Ports that nobody else takes between the choice and the ranks' meeting."""

import socket
from pathlib import Path

import pytest

from megatron_amrlhf import ports

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_no_port_is_one_of_an_outgoing_connection():
    first = int(OUTGOING.read_text().split()[0])
    jobs = [ports.job_port({"SLURM_JOB_ID": str(job)}) for job in range(30000)]
    assert len(set(jobs)) == len(ports.JOB_PORTS) and max(jobs) < first
    assert ports.free_port() < first and not set(ports.FREE_PORTS) & set(jobs)


def test_a_requeued_job_gets_another_port():
    job = {"SLURM_JOB_ID": "77"}
    assert ports.job_port(job) != ports.job_port(job | {"SLURM_RESTART_COUNT": "1"})


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    port = ports.free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        monkeypatch.setattr(ports, "FREE_PORTS", range(port, port + 1))
        with pytest.raises(OSError, match="no free port"):
            ports.free_port()
    assert ports.free_port() == port
