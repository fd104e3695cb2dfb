"""How much room a run's checkpoints need, by the model's sizes. Nothing is fetched or converted."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from megatron_amrlhf.checkpoint.folders import step_folders
from megatron_amrlhf.checkpoint.store import BYTES_PER_ELEMENT
from megatron_amrlhf.config.layout import ParallelSection
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor.records import CheckpointRoom
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.gguf import gguf_of_package, open_gguf
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import HUB_ID, read_hf_config
from megatron_amrlhf.planning.weights import stage_spec


def checkpoint_room(config: Config, run_folder: Path) -> CheckpointRoom:
    """Of the trained roles' masters and moments; what is there already is not counted again.

    Args:
        config: the run.
        run_folder: its folder.

    Raises:
        UserError: the model is not on this machine, or is not supported.
    """
    there = len(step_folders(run_folder / "checkpoints"))
    count = config.checkpoint.keep + 1 - min(config.checkpoint.keep, there)
    return CheckpointRoom(_num_trained(config) * BYTES_PER_ELEMENT, count)


def _num_trained(config: Config) -> int:
    """Parameters of all trained roles."""
    heads = [role.head_outputs for role in config.algorithm.roles(config) if role.trainable]
    path = config.model.path
    if path.startswith("pip:") or path.endswith(".gguf"):
        file = expanded(path)
        if path.startswith("pip:"):
            file = gguf_of_package(path.removeprefix("pip:"))
        if not file.is_file():
            raise UserError(f"model.path {path}: no such file")
        return len(heads) * sum(int(tensor.n_elements) for tensor in open_gguf(file).tensors)
    shape = read_shape(read_hf_config(_folder_of(path)))
    whole = config.model_copy(update={"parallel": ParallelSection()})
    return sum(
        stage_spec(whole, shape, 0, 1, "actor", trainable=True, head_outputs=x).num_parameters
        for x in heads
    )


def _folder_of(path: str) -> Path:
    local = expanded(path)
    if local.is_dir():
        return local
    is_hub_id = HUB_ID.fullmatch(path) is not None
    cached = try_to_load_from_cache(path, "config.json") if is_hub_id else None
    if not isinstance(cached, str):
        raise UserError(f"model.path {path} is not on this machine")
    return Path(cached).parent
