"""An actor and a critic that take a few steps on random rows, and are saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from megatron_amrlhf.checkpoint.folders import Retention
from megatron_amrlhf.checkpoint.store import CheckpointWriter
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.microbatch import response_outputs
from megatron_amrlhf.engine.role import RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.parallel.vocab import token_logprobs

VOCAB = 131
LENGTHS, PROMPT_LENGTHS = [7, 12, 9, 15, 11, 8, 14, 10], [3, 4, 2, 5, 3, 2, 6, 4]


def build_engine(
    folder: str, mesh: Mesh, dtype: str, persist: int = 0, sub_group: int = 0, **engine_keys: object
) -> Zero3Engine:
    """A trainable actor and critic (one output) and a frozen reference.

    ``persist`` is DeepSpeed's persistence threshold: smaller parameters are never freed;
    ``sub_group`` its sub-groups' size where it is not 0.
    ``engine_keys`` are of the configuration's section ``engine``.
    """
    engine_section = {"micro_batch_size": 2, **engine_keys}
    if persist or sub_group:
        template = json.loads(Path("configs/deepspeed/zero3.json").read_text())
        template["zero_optimization"]["stage3_param_persistence_threshold"] = persist
        if sub_group:
            template["zero_optimization"]["sub_group_size"] = sub_group
        file = Path(folder) / f"zero3-{mesh.rank}.json"
        file.write_text(json.dumps(template))
        engine_section["deepspeed"] = str(file)
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"path": folder, "dtype": dtype},
            "algorithm": {"kind": "ppo"},
            "data": {"train": "a"},
            "parallel": {"tensor": mesh.tp_size, "pipeline": mesh.pp_size},
            "engine": engine_section,
            "optimizer": {
                "max_grad_norm": 0.5,
                "weight_decay": 0.1,
                "warmup_steps": 2,
                "schedule": "cosine",
            },
        }
    )
    engine = Zero3Engine(config, mesh)
    source, training = Path(folder), {"trainable": True, "total_steps": 6}
    precision = getattr(torch, dtype)
    engine.add_role(RoleSpec("actor", source, precision, learning_rate=1e-2, **training))
    engine.add_role(RoleSpec("reference", source, precision))
    engine.add_role(RoleSpec("critic", source, precision, 1, learning_rate=3e-2, **training))
    return engine


def save_checkpoint(
    engine: Zero3Engine, checkpoints: Path, step: int, state: dict, keep: int
) -> Path:
    """Saves at once; gives the complete folder."""
    CheckpointWriter(engine, checkpoints, Retention(keep)).save(step, state)
    return checkpoints / f"step-{step}"


def take_steps(engine: Zero3Engine, steps: range) -> list[tuple]:
    """Trains actor and critic; (loss of this rank, norm, learning rate) of each, each step."""
    mesh, results = engine.mesh, []
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        rows = [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]
        rows = tuple(rows[mesh.dp_rank :: mesh.dp_size])
        prompts = torch.tensor(PROMPT_LENGTHS[mesh.dp_rank :: mesh.dp_size])
        plan = response_outputs(torch.tensor([len(row) for row in rows]), prompts, "before")

        def read(logits, targets):
            return token_logprobs(logits, targets, VOCAB, mesh.tp_group)

        def actor_loss(output, block):
            loss = -output[: block.num_outputs].sum() / sum(LENGTHS) * mesh.dp_size
            return loss, loss.item()

        def critic_loss(output, block):
            values = output[: block.num_outputs, 0].float()
            loss = (
                (values - block.targets[: block.num_outputs] / VOCAB).square().sum()
                / sum(LENGTHS)
                * mesh.dp_size
            )
            return loss, loss.item()

        for name, function, loss in (("actor", read, actor_loss), ("critic", None, critic_loss)):
            rate = engine.roles[name].weights.counters()["schedule"]["lr"][0]
            done = engine.train_step(name, rows, torch.arange(len(rows)), plan, function, loss=loss)
            assert not done.skipped
            results.append((name, step, done.extras, done.grad_norm, rate))
    return results


def fingerprint(engine: Zero3Engine) -> dict[str, str]:
    """SHA-256 of all that a role is on this rank: gathered weights, masters, moments, counters."""
    prints = {}
    for name in ("actor", "critic"):
        role = engine.roles[name]
        with role.window() as module:
            tensors = {f"weight.{key}": x.detach().clone() for key, x in module.named_parameters()}
        tensors |= role.weights.read_states()
        for key, tensor in tensors.items():
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            prints[f"{name}.{key}"] = hashlib.sha256(data).hexdigest()
        prints[f"{name}.counters"] = str(role.weights.counters())
    return prints
