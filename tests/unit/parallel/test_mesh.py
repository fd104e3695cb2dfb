"""A process that is alone."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_amrlhf.parallel import compat
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


def test_a_task_that_sees_one_device_tells_deepspeed_its_number(monkeypatch):
    chosen = []
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(compat, "on_gpu", lambda: True)
    monkeypatch.setattr(compat, "backend", lambda: "gloo")
    monkeypatch.setattr(compat, "patch_for_cpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    start_processes()
    stop_processes()
    assert chosen == [torch.device("cuda", 0)] and os.environ["LOCAL_RANK"] == "0"
