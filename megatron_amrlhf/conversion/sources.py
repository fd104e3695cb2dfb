"""What a folder is, and its weights under Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_amrlhf.checkpoint.folders import STATE_FILE, find_latest
from megatron_amrlhf.checkpoint.opening import open_role, roles_in, saved_config
from megatron_amrlhf.config.load import read_yaml
from megatron_amrlhf.config.schema import ModelSection
from megatron_amrlhf.conversion.deepspeed_folder import DeepSpeedWeights, tag_folder
from megatron_amrlhf.conversion.megatron_folder import (
    TRACKER,
    has_ranks,
    iteration_folder,
    open_megatron,
)
from megatron_amrlhf.conversion.torch_dist import is_torch_dist, open_torch_dist
from megatron_amrlhf.errors import UserError, telling
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.shards import NamedWeights
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config, resolve_model_folder
from megatron_amrlhf.rewards.kinds import with_meaning

Form = Literal["ours", "megatron", "torch_dist", "deepspeed", "hf"]
RUN_CONFIG = "config.resolved.yaml"  # of run/folder.py


@dataclass(frozen=True)
class Source:
    """Weights to convert.

    Attributes:
        form: what kind of folder they are in.
        weights: read one at a time.
        hf_config: the parsed config.json of the model, with what a run's reward model means.
        model_folder: where the config, the tokenizer and the generation settings are.
        dtype: that the weights had in training, where they are kept in another one; else None.
    """

    form: Form
    weights: NamedWeights
    hf_config: Mapping[str, Any]
    model_folder: Path
    dtype: str | None = None


def form_of(folder: Path) -> tuple[Form, Path]:
    """What a folder is, and the folder that its files are in.

    Raises:
        UserError: it is nothing that can be converted.
    """
    for place in (folder, folder / "checkpoints"):
        latest = place if (place / STATE_FILE).is_file() else find_latest(place)
        if latest is not None:
            return "ours", latest
    if (folder / TRACKER).is_file() or has_ranks(folder) or is_torch_dist(folder):
        return "torch_dist" if is_torch_dist(iteration_folder(folder)) else "megatron", folder
    if tag_folder(folder) is not None:
        return "deepspeed", folder
    if (folder / "config.json").is_file():
        return "hf", folder
    raise UserError(
        f"{folder} is no Hugging Face folder, no checkpoint of a run, no Megatron-LM folder and no "
        "DeepSpeed ZeRO folder"
    )


def open_source(path: str, role: str | None, model: str | None) -> Source:
    """Opens what is to be converted.

    Args:
        path: a folder of any of the forms, or what ``model.path`` takes (a hub id, ``pip:NAME``).
        role: which role of a run's checkpoint; None: the only one.
        model: the model that gives the config and the tokenizer, as ``model.path``; None: what the
            folder or the run's own configuration tells.

    Raises:
        UserError: nothing usable is there.
    """
    cache, folder = ModelSection.model_fields["cache_folder"].default, expanded(path)
    if not folder.is_dir():  # a .gguf file, or the name of a model that is not here
        with telling({"model.path": "SOURCE", "model.cache_folder": "the cache folder"}):
            folder = resolve_model_folder(path, cache)
    form, place = form_of(folder)
    if form == "hf" and model is not None:
        raise UserError("--model: a Hugging Face folder has a config.json of its own")
    if form != "ours" and role is not None:
        raise UserError("--role: only the checkpoint of a run has roles")
    with telling({"model.path": "--model" if model else f"{place}'s model.path"}):
        model_folder = (
            resolve_model_folder(model, cache) if model else _model_of(form, place, cache)
        )
    hf_config = read_hf_config(model_folder)
    try:
        shape = read_shape(hf_config)
    except UserError as error:
        raise UserError(f"{model_folder}: {error}") from None
    dtype = None
    if form == "ours":
        roles = roles_in(place)
        if role is None and len(roles) > 1:
            raise UserError(f"--role: {place} holds {', '.join(roles)}: choose one")
        role = role or next(iter(roles))
        weights: NamedWeights = open_role(place, role, hf_config)
        dtype = roles[role]
        hf_config = with_meaning(hf_config, role, saved_config(place))
    elif form == "deepspeed":
        weights = DeepSpeedWeights(place)
    elif form == "hf":
        weights = ShardedWeights(place)
    else:
        weights = (open_megatron if form == "megatron" else open_torch_dist)(place, shape)
    return Source(form, weights, hf_config, model_folder, dtype)


def _model_of(form: Form, folder: Path, cache: str) -> Path:
    """Where the config.json of a source is that has no ``--model``."""
    candidates = [folder, folder.parent] if form == "deepspeed" else [folder]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    run_config = folder.resolve().parent.parent / RUN_CONFIG
    if form == "ours" and run_config.is_file():
        return _model_of_run(run_config, cache)
    raise UserError(f"{folder} has no config.json: give the model that it was made from by --model")


def _model_of_run(file: Path, cache: str) -> Path:
    """The model folder that a run's resolved configuration names."""
    section = read_yaml(file).get("model")
    path = section.get("path") if isinstance(section, dict) else None
    found = section.get("cache_folder", cache) if section and path else None
    if not isinstance(path, str) or not isinstance(found, str):
        raise UserError(f"{file}: names no model.path: give the model by --model")
    return resolve_model_folder(path, found)
