"""Conversion of runs' checkpoints and DeepSpeed's, and to files that megatron-core loads."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_amrlhf.checkpoint.export import export_role
from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.engine import role
from megatron_amrlhf.engine.role import RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.rewards.kinds import KEYS
from tests import reference
from tests.distributed.contexts import make_config
from tests.distributed.processes import run_on
from tests.distributed.small_run import save_checkpoint
from tests.distributed.test_logits import full_logits, hugging_face_logits, random_rows
from tests.helpers import load_tool
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

tool = load_tool("convert_checkpoint")
HEAD_OUTPUTS, TOLERANCE = 3, 1e-4
PRM_RUN = {
    "algorithm": {"kind": "prm", "loss": "mse"},
    "data": {"train": "unused", "step_marker": "<extra_0>"},
}
MEANING = {
    "reward_kind": "process",
    "reward_output": "score",
    "step_marker": "<extra_0>",
    "step_separator": "\n",
}
KIND = {"vocab_size": 131, "layers": 5, "head_dim": 10}


def run(*arguments) -> int:
    return tool.main([str(x) for x in arguments])


def assert_same_weights(wanted: Path, found: Path) -> None:
    old, new = ShardedWeights(wanted), ShardedWeights(found)
    assert new.names() == old.names()
    for name in old.names():
        assert torch.equal(new.get(name), old.get(name)), name


def save_run(folder: str, tensor: int, cut: PipelineCut, zero_stage: int) -> None:
    """A run's folder with one checkpoint of an actor and a PRM, and their exports."""
    root = Path(folder)
    mesh = build_mesh(tensor, cut)
    sizes = {"first_stage_layers": cut.first_layers, "last_stage_layers": cut.last_layers}
    config = make_config(
        str(root / "model"),
        mesh,
        {"kind": "ppo"},
        engine={"zero_stage": zero_stage},
        parallel={"tensor": tensor, "pipeline": cut.stages, **sizes},
    )
    engine = Zero3Engine(config, mesh)
    training = {"trainable": True, "learning_rate": 1e-2}
    engine.add_role(RoleSpec("actor", root / "model", torch.bfloat16, None, **training))
    engine.add_role(RoleSpec("prm", root / "prm", torch.bfloat16, HEAD_OUTPUTS, **training))
    for name in ("actor", "prm"):
        export_role(engine, name, root / f"{name}-export", load_tokenizer(root / "model"))
    trained = Config.model_validate(config.model_dump() | PRM_RUN)
    state = {"config": trained.model_dump(mode="json")}
    save_checkpoint(engine, root / "run" / "checkpoints", 3, state, keep=1)


@pytest.mark.parametrize(
    ("tensor", "cut", "data", "zero_stage"),
    [
        (2, PipelineCut(1), 2, 3),
        (1, PipelineCut(2, 1, 2, 3), 2, 1),
        (2, PipelineCut(2, 1, None, 4), 1, 0),
    ],
    ids=["tp2-dp2-zero3", "pp2-uneven-dp2-zero1", "tp2-pp2-zero0"],
)
def test_a_runs_checkpoint_converts_to_what_it_exports(
    tmp_path, capfd, tensor, cut, data, zero_stage
):
    make_tiny_model(tmp_path / "model", "qwen3", tied=True, **KIND)
    make_tiny_model(tmp_path / "prm", "qwen3", tied=True, **KIND)
    reference.add_head(tmp_path / "prm", 48, HEAD_OUTPUTS, seed=1)
    stale = tmp_path / "model" / "config.json"  # as where the run began from an export
    stale.write_text(json.dumps(json.loads(stale.read_text()) | {"reward_kind": "outcome"}))
    run_on(tensor * cut.stages * data, save_run, str(tmp_path), tensor, cut, zero_stage)
    settings = {"model": {"path": str(tmp_path / "model")}}
    (tmp_path / "run" / "config.resolved.yaml").write_text(json.dumps(settings))

    source = tmp_path / "run"
    assert run(source, tmp_path / "actor", "--to", "hf", "--role", "actor", "--verify") == 0
    assert "(tolerance 1e-04)" in capfd.readouterr().out  # both sides have the rounded weights
    assert_same_weights(tmp_path / "actor-export", tmp_path / "actor")
    step = source / "checkpoints" / "step-3"
    assert run(step, tmp_path / "prm-hf", "--to", "hf", "--role", "prm") == 0
    assert_same_weights(tmp_path / "prm-export", tmp_path / "prm-hf")
    told = read_hf_config(tmp_path / "prm-hf")
    assert {key: told.get(key) for key in KEYS} == MEANING
    assert not read_hf_config(tmp_path / "actor").keys() & set(KEYS)
    classifier = tmp_path / "classifier"
    options = ["--to", "hf", "--role", "prm", "--as", "token-classification", "--verify"]
    assert run(step, classifier, *options) == 0
    assert_same_weights(tmp_path / "prm-export", classifier)
    assert run(step, tmp_path / "x", "--to", "hf") == 2  # which role?
    part = next(step.glob("actor-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(bytes(content))
    assert run(step, tmp_path / "x", "--to", "hf", "--role", "actor") == 2
    assert not (tmp_path / "x").exists()


def rank_logits(folder: str, model: str, rows: tuple, tensor: int, pipeline: int):
    """Logits of stages that took a Megatron-LM folder's files as they are, name for name."""

    def load_as_it_is(stage: StageModel, _head_outputs, _weights, mesh) -> None:
        place = f"mp_rank_{mesh.tp_rank:02d}_{mesh.pp_rank:03d}"
        file = Path(folder) / "iter_0000001" / place / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        assert isinstance(content["args"], argparse.Namespace)
        stage.chunks[0].load_state_dict(content["model"], strict=True)

    role.load_stage = load_as_it_is
    return full_logits({"model": model}, rows, tensor, pipeline)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_megatron_core_loads_the_files_and_gives_hugging_faces_logits(tmp_path, family):
    """Independent of our reader: the order of heads, halves and rows is megatron-core's own."""
    model = tmp_path / "model"
    make_tiny_model(model, family, tied=True, **{**KIND, "layers": 4})
    layout = ["--tensor", "2", "--pipeline", "2", "--layer-spec", "local", "--vocab-multiple", "1"]
    assert run(model, tmp_path / "megatron", "--to", "megatron", *layout) == 0
    folder, rows = str(tmp_path / "megatron"), random_rows()
    ranks = run_on(4, rank_logits, folder, str(model), rows, 2, 2)
    wanted = hugging_face_logits(str(model), rows)
    found = [rank["model"] for rank in ranks if rank]
    assert len(found) == 2
    for logits in found:
        for row, expected in zip(logits, wanted, strict=True):
            torch.testing.assert_close(row, expected, rtol=0, atol=TOLERANCE)


def train_with_deepspeed(folder: str) -> dict[str, torch.Tensor] | None:
    """A step of plain DeepSpeed ZeRO-3 on a Hugging Face model; its weights on rank 0."""
    root = Path(folder)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    tokens = torch.arange(12)[None]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(str(root / "zero"))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    return weights if torch.distributed.get_rank() == 0 else None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_deepspeed_zero3_folder_converts_and_a_payload_in_it_is_not_loaded(tmp_path, tied, capfd):
    make_tiny_model(tmp_path / "model", "qwen3", tied=tied, **KIND)
    wanted = run_on(2, train_with_deepspeed, str(tmp_path))[0]
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(before["model.norm.weight"], wanted["model.norm.weight"])
    source, model = tmp_path / "zero", tmp_path / "model"
    assert run(source, tmp_path / "hf", "--to", "hf", "--model", model) == 0
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == wanted.keys() == before.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert run(source, tmp_path / "m", "--to", "megatron", "--model", model, "--tensor", 2) == 0

    assert run(source, tmp_path / "x", "--to", "hf") == 2
    assert "--model" in capfd.readouterr().err
    file = next(source.rglob("zero_pp_rank_1_*_optim_states.pt"))
    trace = tmp_path / "trace"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"more": Touches(trace)}, file)
    assert run(source, tmp_path / "x", "--to", "hf", "--model", model) == 2
    assert f"{file}: holds pickled objects" in capfd.readouterr().err
    assert not trace.exists() and not (tmp_path / "x").exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "else the test could not fail"
    shutil.rmtree(source)


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)
