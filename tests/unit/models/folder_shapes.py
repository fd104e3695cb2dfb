"""Public shapes of model folders: what is changed in a tiny model's folder for each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_amrlhf.models.weight_files import INDEX_FILE, SINGLE_FILE

Change = Callable[[Path], None]


@dataclass(frozen=True)
class FolderShape:
    """A folder to make.

    Attributes:
        name: of the test.
        family: ``model_type`` of the tiny model.
        changes: what is done to its folder, one after the other.
        refused: a pattern of the line that refuses it; None: it computes what transformers does.
        left: words of the line that says what was not read.
        options: more arguments of ``make_tiny_model``.
    """

    name: str
    family: str
    changes: tuple[Change, ...] = ()
    refused: str | None = None
    left: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def config(**keys: Any) -> Change:
    """Sets keys of config.json; those of value ``...`` are taken away."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        content = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return change


def transformers_4(folder: Path) -> None:
    """A config.json as transformers 4 wrote it."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = {"type": kind, **rope} if kind != "default" else None
    keys = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    config(rope_parameters=..., dtype=..., layer_types=..., transformers_version="4.41.0", **keys)(
        folder
    )


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Changes the tensors of model.safetensors, in place or by a new dictionary."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / SINGLE_FILE)
        weights = change(weights) or weights
        weights = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
        save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})

    return apply


def renamed(old: str, new: str) -> Change:
    """Writes another beginning of names."""
    return tensors(
        lambda w: {new + k.removeprefix(old) if k.startswith(old) else k: w[k] for k in w}
    )


def cast(dtype: torch.dtype, only: str = "") -> Change:
    return tensors(lambda w: {k: x.to(dtype) if k.endswith(only) else x for k, x in w.items()})


def added(**shapes: tuple[int, ...]) -> Change:
    """Adds random tensors; two underscores stand for a point."""
    new = {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}
    return tensors(lambda weights: weights | new)


def dropped(name: str) -> Change:
    return tensors(lambda w: {key: x for key, x in w.items() if key != name})


def quantized(dtype: torch.dtype, **parts: torch.dtype) -> Change:
    """Projections in another dtype, with further tensors beside each of them."""

    def change(weights):
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            stem = name.removesuffix("weight")
            weights[name] = weights[name].clamp(-1, 1).to(dtype)
            weights |= {f"{stem}{part}": torch.ones(3, 3).to(kind) for part, kind in parts.items()}

    return tensors(change)


def packed(**parts: torch.dtype) -> Change:
    """Projections that are replaced by integer tensors, as GPTQ, AWQ and others write them."""

    def change(weights):
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            stem = name.removesuffix("weight")
            del weights[name]
            weights |= {f"{stem}{part}": torch.ones(3, 3).to(kind) for part, kind in parts.items()}

    return tensors(change)


def shards(index: bool = True, keep_single: bool = False) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / SINGLE_FILE)
        names = sorted(weights)
        place = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({k: weights[k] for k in part}, folder / file, metadata={"format": "pt"})
            place |= dict.fromkeys(part, file)
        if index:
            (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": place}))
        if not keep_single:
            (folder / SINGLE_FILE).unlink()

    return change


def older_shards(folder: Path) -> None:
    """An index and shards of other weights, and a newer model.safetensors."""
    new = load_file(folder / SINGLE_FILE)
    tensors(lambda weights: {k: x + 1 for k, x in weights.items()})(folder)
    shards(keep_single=True)(folder)
    save_file(new, folder / SINGLE_FILE, metadata={"format": "pt"})


def index_of_other_files(folder: Path) -> None:
    """An index that names a wrong file of one tensor and none of another one."""
    shards()(folder)
    content = json.loads((folder / INDEX_FILE).read_text())
    place = content["weight_map"]
    place["model.norm.weight"] = next(x for x in place.values() if x != place["model.norm.weight"])
    del place["model.embed_tokens.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(content))


def file(name: str, content: str = "{}") -> Change:
    return lambda folder: (folder / name).write_text(content)


def as_bin(beside: bool) -> Change:
    def change(folder: Path) -> None:
        torch.save(load_file(folder / SINGLE_FILE), folder / "pytorch_model.bin")
        if not beside:
            (folder / SINGLE_FILE).unlink()

    return change


def linked(folder: Path) -> None:
    """As the hub's cache: files are links to blobs elsewhere."""
    blobs = folder.parent / f"{folder.name}-blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))


def frequencies(weights):
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        weights[name] = torch.ones(4)


def resized(rows: int) -> Change:
    """More rows of the embedding and the head, as after a new padding token."""

    def change(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = torch.cat([weights[name], weights[name][: rows - 131]])

    return tensors(change)
