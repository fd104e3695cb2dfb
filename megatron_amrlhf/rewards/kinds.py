"""What a reward model's numbers mean: written into its export, read where it scores answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROCESS, OUTCOME = "process", "outcome"
KEY = "reward_kind"  # in the export's config.json
KIND_OF_ROLE = {"prm": PROCESS, "orm": OUTCOME}  # role that was trained -> kind


def reward_kind(hf_config: Mapping[str, Any]) -> str:
    """``process``: each token's number is a reward (also where a folder does not say).

    ``outcome``: the head was trained at the last token only, its number there is the answer's
    reward, and what it says before is not used.
    """
    return hf_config.get(KEY, PROCESS)
