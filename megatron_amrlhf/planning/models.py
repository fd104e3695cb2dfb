"""The config.json of a run's models, without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.expected import HEAD_NAMES
from megatron_amrlhf.models.source import (
    HUB_ID,
    ShardedWeights,
    read_hf_config,
    resolve_model_folder,
)


def model_config(path: str, cache_folder: str) -> dict[str, Any]:
    """The parsed config.json of ``model.path``; of a hub id nothing else is downloaded.

    Args:
        path: a folder with a config.json (weights are not needed), a hub id, or whatever else
            ``model.path`` may be.
        cache_folder: where converted GGUF models are kept.

    Raises:
        UserError: there is none, or the hub does not give it.
    """
    folder = expanded(path)
    if (folder / "config.json").is_file():
        return read_hf_config(folder)
    if folder.exists() or path.startswith("pip:") or not HUB_ID.fullmatch(path):
        return read_hf_config(resolve_model_folder(path, cache_folder))
    try:
        # Asks for the repository first, so that it fails at once where there is no network.
        return read_hf_config(snapshot_download(path, allow_patterns=["config.json"]))
    except (OSError, ValueError, HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path: no folder {path!r} here, and the hub has not given its config.json "
            f"({reason}): give a folder that holds one by --model"
        ) from None


def reward_configs(
    config: Config, policy: dict[str, Any]
) -> tuple[dict[str, tuple[dict[str, Any], int]], list[str]]:
    """By role the config.json and the head's outputs of each reward model; what was assumed.

    A reward model that is not trained yet is taken to be of the policy's sizes, with one output.
    """
    found, notes = {}, []
    for role, path in config.reward_folders.items():
        folder = expanded(path)
        if (folder / "config.json").is_file():
            found[role] = read_hf_config(folder), _head_outputs(folder)
        else:
            found[role] = policy, 1
            notes.append(f"{role}: {path} is not there; taken to be as large as the policy")
    return found, notes


def _head_outputs(folder: Path) -> int:
    try:
        return ShardedWeights(folder).get(HEAD_NAMES[0]).shape[0]
    except UserError:  # without weights too a plan can be made
        return 1
