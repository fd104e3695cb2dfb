"""What a reward model's numbers mean: written into its export, read where it scores answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_amrlhf.config.algorithms import PrmAlgorithm
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.models.heads import Form

PROCESS, OUTCOME = "process", "outcome"
KIND_OF_ROLE = {"prm": PROCESS, "orm": OUTCOME}  # role that was trained -> kind
OUTPUT_OF_LOSS = {"bce": "logit", "mse": "score"}
# In the export's config.json:
KIND, OUTPUT, MARKER, SEPARATOR = KEYS = (
    "reward_kind",
    "reward_output",
    "step_marker",
    "step_separator",
)


def export_keys(role: str, config: Config) -> dict[str, str | None]:
    """What the ``config.json`` of a trained role says about its numbers.

    Args:
        role: that is exported.
        config: of the run that trained it.

    Returns:
        Nothing for a policy; the kind of a reward model; of a PRM also what its head gives
        (``logit`` or ``score``), and the marker and separator of the steps that it was trained on.
    """
    found: dict[str, str | None] = {}
    if role in KIND_OF_ROLE:
        found[KIND] = KIND_OF_ROLE[role]
    if role == "prm" and isinstance(config.algorithm, PrmAlgorithm):
        found[OUTPUT] = OUTPUT_OF_LOSS[config.algorithm.loss]
        found[MARKER], found[SEPARATOR] = config.data.step_marker, config.data.step_separator
    return found


def with_meaning(hf_config: Mapping[str, Any], role: str, config: Config | None) -> dict[str, Any]:
    """A role's ``config.json``: that of the model it began from, with what its own numbers mean.

    Args:
        hf_config: the parsed config.json that the run began from, itself maybe of an export.
        role: that was trained.
        config: of the run; None: not known, and nothing is said.
    """
    kept = {key: value for key, value in hf_config.items() if key not in KEYS}
    return kept if config is None else kept | export_keys(role, config)


def reward_kind(hf_config: Mapping[str, Any]) -> str:
    """``process``: each token's number is a reward (also where a folder does not say).

    ``outcome``: the head was trained at the last token only, its number there is the answer's
    reward, and what it says before is not used.
    """
    return hf_config.get(KIND, PROCESS)


def head_form(hf_config: Mapping[str, Any]) -> Form:
    """The class of transformers that reads a head where its numbers mean something."""
    is_outcome = reward_kind(hf_config) == OUTCOME
    return "sequence-classification" if is_outcome else "token-classification"
