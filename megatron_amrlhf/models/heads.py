"""A linear head in a Hugging Face folder: the class of transformers that has one, and its config.

A process reward model is a token classifier, whose ``score`` has a weight and a bias. An outcome
reward model is a sequence classifier, which has no bias: it is kept in ``config.json``, for us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_amrlhf.models.families import family_of
from megatron_amrlhf.models.source import CLASSIFIER_NAMES, read_hf_config

Form = Literal["token-classification", "sequence-classification"]
CLASSES: dict[Form, str] = {
    "token-classification": "ForTokenClassification",
    "sequence-classification": "ForSequenceClassification",
}
BIAS_KEY = "score_bias"
HEAD_KEYS = ("id2label", "label2id", "num_labels", "classifier_dropout", BIAS_KEY)
STORED_NAMES = {ours: stored for stored, ours in CLASSIFIER_NAMES.items()}


def with_form(
    hf_config: Mapping[str, Any], form: Form | None, outputs: int | None, bias: Sequence[float] = ()
) -> dict[str, Any]:
    """A model's ``config.json`` with the class that opens its folder.

    Args:
        hf_config: the parsed config.json that the model began from, maybe of another class.
        form: of the folder; None for a language model.
        outputs: of the head; None for a language model.
        bias: of a sequence classifier's head, which its class has not.
    """
    config = {key: value for key, value in hf_config.items() if key not in HEAD_KEYS}
    architecture = family_of(hf_config).architecture
    if form is not None:
        assert outputs is not None, f"a model of the form {form} has a linear head"
        architecture = architecture.replace("ForCausalLM", CLASSES[form])
        # transformers counts the outputs by these: num_labels is their number.
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(outputs)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(outputs)}
        # Where it is missing, a token classifier drops 0.1 in training.
        config["classifier_dropout"] = 0.0
    if form == "sequence-classification":
        if any(bias):
            config[BIAS_KEY] = list(bias)
        ends = config.get("eos_token_id")
        if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
            config["pad_token_id"] = None  # transformers reads the last token that is none
    config["architectures"] = [architecture]
    return config


def bias_beside(folder: Path, outputs: int) -> Tensor:
    """``[outputs]`` bias of a head whose weights have none: of ``config.json``, or zero."""
    file = folder / "config.json"
    found = read_hf_config(folder).get(BIAS_KEY) if file.is_file() else None
    return torch.zeros(outputs) if found is None else torch.tensor(found, dtype=torch.float32)
