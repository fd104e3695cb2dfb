"""A process that is alone."""

from __future__ import annotations

import os

import torch.distributed as dist

from megatron_amrlhf.parallel.mesh import start_processes, stop_processes


def test_a_lone_process_leaves_the_environment_as_it_was(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    before = dict(os.environ)
    start_processes()
    assert dist.get_world_size() == 1 and os.environ["WORLD_SIZE"] == "1"
    stop_processes()
    assert dict(os.environ) == before and not dist.is_initialized()
