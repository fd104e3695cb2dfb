"""What a role offloads to nvme is in files, trains and resumes to the bit, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from megatron_amrlhf.checkpoint.folders import find_latest
from megatron_amrlhf.checkpoint.loading import load_checkpoint
from megatron_amrlhf.engine.partitioned import PartitionedWeights
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.parallel.mesh import build_mesh
from tests.distributed.processes import run_on
from tests.distributed.small_run import (
    VOCAB,
    build_engine,
    fingerprint,
    save_checkpoint,
    take_steps,
)
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

RANKS = 2


def offloaded(place: str, disk: str) -> dict:
    weights, states = {"offload_parameters": place}, {"offload_optimizer": place}
    roles = {"actor": weights | states, "critic": states, "reference": weights}
    return {"nvme_folder": disk, "roles": roles}


def kept_on_disk(engine: Zero3Engine) -> Iterator[tuple[str, Tensor]]:
    """What ``offloaded`` wants in files."""
    for name in ("actor", "critic"):
        weights = engine.roles[name].weights
        assert isinstance(weights, PartitionedWeights)
        for flat in weights.engine.optimizer.fp32_partitioned_groups_flat:
            state = weights.engine.optimizer.state[flat]
            yield f"{name}.master", flat
            yield f"{name}.exp_avg", state["exp_avg"]
            yield f"{name}.exp_avg_sq", state["exp_avg_sq"]
    zero = engine.roles["actor"].weights.engine.optimizer
    assert not zero.param_groups_fp16_flat_cpu_memory, "the weights are in memory too"
    for name in ("actor", "reference"):
        for key, parameter in engine.roles[name].weights.module.named_parameters():
            yield f"{name}.{key}", parameter.ds_tensor


def not_in_files(engine: Zero3Engine, disk: str) -> list[str]:
    """Names of tensors whose memory is not a file of ``disk``, by the kernel's own table."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        if path.startswith(disk) and path.endswith("(deleted)"):
            spans.append([int(end, 16) for end in span.split("-")])
    return [
        name
        for name, tensor in kept_on_disk(engine)
        if tensor.numel() and not any(a <= tensor.data_ptr() < b for a, b in spans)
    ]


def train(folder: str, root: str, place: str, dtype: str) -> tuple:
    """Three steps, with a checkpoint after the second; and the third again from there."""
    mesh, disk, checkpoints = build_mesh(1, 1), f"{root}/disk", Path(root) / place
    keys = offloaded(place, disk) if place != "none" else {}
    engine = build_engine(folder, mesh, dtype, **keys)
    early = not_in_files(engine, disk) if place == "nvme" else []  # moments too
    steps = take_steps(engine, range(2))
    save_checkpoint(engine, checkpoints, 2, {}, keep=1)
    steps += take_steps(engine, range(2, 3))
    strays = early + not_in_files(engine, disk) if place == "nvme" else []

    resumed = build_engine(folder, mesh, dtype, **keys)
    load_checkpoint(resumed, find_latest(checkpoints))
    strays += not_in_files(resumed, disk) if place == "nvme" else []
    again = take_steps(resumed, range(2, 3))
    return steps, fingerprint(engine), again, fingerprint(resumed), strays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_disk_has_the_bits_of_one_in_memory(tmp_path, dtype):
    model = tmp_path / "model"
    make_tiny_model(model, tied=True, vocab_size=VOCAB, hidden=45, layers=2)
    found = {}
    for place in ("none", "nvme"):
        found[place] = run_on(RANKS, train, str(model), str(tmp_path), place, dtype)
    assert list((tmp_path / "disk").iterdir()) == [], "files with a name stay after a kill"
    for memory, disk in zip(found["none"], found["nvme"], strict=True):
        steps, prints, again, resumed, strays = disk
        assert strays == []
        assert (steps, prints) == memory[:2]
        assert again == steps[-2:] and resumed == prints
