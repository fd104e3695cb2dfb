"""Which files of a folder its weights are read from, and which lie beside them unread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import FileName, Record, Unreadable, checked, read_json

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
HEAD_FILE = "head.safetensors"  # a linear head of ours, beside either
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Weights, or code that would compute with them otherwise; what else lies in a folder is no matter.
NOTABLE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".py")
FORMS_OF_WEIGHTS = tuple(x for x in NOTABLE if x != ".py")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model.

    Attributes:
        file_of: name of the file of each tensor, by the tensor's name in it.
        unread: names of other files that hold weights or code.
        conflict: an index that disagrees with the file that is read; else empty.
    """

    file_of: Mapping[str, str]
    unread: tuple[str, ...]
    conflict: str


class _Index(Record):
    """The file's name of each tensor."""

    weight_map: dict[str, FileName]


def find_weight_files(folder: Path) -> WeightFiles:
    """Chooses as transformers does: ``model.safetensors`` before an index and its shards.

    An index that also names ``model.safetensors`` lists more than that file, and a folder with
    neither is all of its safetensors files.

    Raises:
        UserError: no safetensors file, a malformed index, a file that the index names is missing,
            a damaged file, one tensor in two files, or an adapter in the folder.
    """
    adapter = [name for name in ADAPTER if (folder / name).is_file()]
    if adapter:
        raise UserError(
            f"model folder {folder} holds an adapter ({', '.join(adapter)}), which would not be "
            "applied: merge it into the model first (in peft: merge_and_unload), or take its files "
            "away"
        )
    index, conflict = _read_index(folder), ""
    has_single = (folder / SINGLE_FILE).is_file()
    if index is not None and (not has_single or SINGLE_FILE in index):
        files = _there(folder, index)
    elif has_single:
        files, conflict = [SINGLE_FILE], INDEX_FILE if index is not None else ""
    else:
        files = _all_files(folder)
    if HEAD_FILE not in files and (folder / HEAD_FILE).is_file():
        files = [*files, HEAD_FILE]
    file_of: dict[str, str] = {}
    for file in files:  # what an index says of single tensors is not read: the files know
        for name in tensors_in(folder / file):
            if name in file_of:
                raise UserError(f"{folder}: {name} is in {file_of[name]} and in {file}")
            file_of[name] = file
    unread = sorted(
        file.name for file in folder.iterdir() if file.suffix in NOTABLE and file.name not in files
    )
    return WeightFiles(file_of, tuple(unread), conflict)


def _read_index(folder: Path) -> list[str] | None:
    """The files that an index names; None without an index."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return None
    try:
        return sorted(set(checked(_Index, read_json(index, strict=False)).weight_map.values()))
    except Unreadable as error:
        raise UserError(f"{index}: malformed index: {error}") from None


def _there(folder: Path, files: list[str]) -> list[str]:
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"model folder {folder} lacks the file {file}")
    return files


def _all_files(folder: Path) -> list[str]:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        others = [x.name for x in sorted(folder.iterdir()) if x.suffix in FORMS_OF_WEIGHTS]
        found = f", only {', '.join(others[:3])}: save it as safetensors" if others else ""
        raise UserError(f"model folder {folder} has no *.safetensors file{found}")
    return files


def tensors_in(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        UserError: it cannot be read as one.
    """
    return list(open_safetensors(file).keys())


def open_safetensors(file: Path) -> safe_open:
    """A reader of a safetensors file, on CPU.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
