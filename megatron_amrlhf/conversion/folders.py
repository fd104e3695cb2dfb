"""New folders that appear complete or not at all, and the files that go along with weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_amrlhf.checkpoint.files import write_text
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.owned import begin_beside, delete_ours, put_in_place, why_not_ours
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
TEMPLATES = "additional_chat_templates"


def check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuses a target that would destroy something.

    Raises:
        UserError: it exists and ``overwrite`` is not given, or is not as a conversion has written
            it; or it holds or is the source.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give a folder")
    if source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{target} holds what is converted: give another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists: give another folder, or --overwrite")
    if why := why_not_ours(target.resolve(), "conversion"):
        raise UserError(
            f"{target} {why}: --overwrite replaces what this tool wrote, give another folder"
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
    """A temporary folder that gets the name ``target`` at the end; on any failure it is deleted.

    What stands at ``target`` is replaced as far as it is as a conversion has written it.
    """
    target = target.resolve()  # a link may lead to a larger disk
    temporary = None
    try:
        temporary = begin_beside(target, "conversion")
        yield temporary
        put_in_place(temporary, target, "conversion")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        with suppress(OSError, UserError):
            if temporary is not None:
                delete_ours(temporary, "conversion")


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
