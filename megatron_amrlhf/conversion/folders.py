"""New folders that appear complete or not at all, and the files that go along with weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_amrlhf.checkpoint.files import fsync, make_empty, write_text
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import remove
from megatron_amrlhf.sizes import in_units

TRAVELLING = (  # tokenizer files of all kinds, the chat template, how to generate
    "tokenizer*",
    "*.model",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
# What a folder of a model has: Hugging Face's, Megatron-LM's.
MODEL_SIGNS = ("config.json", "latest_checkpointed_iteration.txt")
TEMPLATES = "additional_chat_templates"


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuses a target that would destroy something.

    Raises:
        UserError: it exists and ``overwrite`` is not given, or is no model; or it holds or is the
            source.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give a folder")
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{target} holds what is converted: give another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists: give another folder, or --overwrite")
    if not any((target / name).exists() for name in MODEL_SIGNS):
        raise UserError(
            f"{target} holds no model that --overwrite could replace: give another folder"
        )


def check_free_space(target: Path, needed: int) -> None:
    """Refuses to start where ``needed`` bytes are not free.

    Raises:
        UserError: tells both numbers.
    """
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"no room in {place}: {in_units(needed)} are needed, {in_units(free)} are free"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that gets the name ``target`` at the end; on any failure it is deleted."""
    target = target.resolve()  # a link may lead to a larger disk
    temporary = target.with_name(f".{target.name}.tmp")
    old = target.with_name(f".{target.name}.old")
    try:
        make_empty(temporary)
        yield temporary
        for path in temporary.rglob("*"):
            fsync(path)
        remove(old)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        fsync(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def travelling_files(folder: Path) -> list[Path]:
    """Tokenizer files, chat templates and generation settings of a model folder, sorted."""
    found = {path for pattern in TRAVELLING for path in folder.glob(pattern) if path.is_file()}
    found |= {path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file()}
    return sorted(found)


def copy_travelling(folder: Path, target: Path) -> None:
    """Copies ``travelling_files``."""
    for path in travelling_files(folder):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def write_config(target: Path, hf_config: Mapping[str, Any]) -> None:
    """Writes ``config.json``."""
    write_text(target / "config.json", json.dumps(hf_config, indent=2) + "\n")
