"""Which tensors a model must have, and whether weights have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.expected import HEAD_NAMES, LM_HEAD, check_tied, expected_shapes
from megatron_amrlhf.models.heads import bias_beside
from megatron_amrlhf.models.shards import NamedWeights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CheckedWeights:
    """Weights that have what their model needs, in one dtype.

    Attributes:
        weights: read from here.
        shapes: of each tensor by Hugging Face name, in the model's order.
        dtype: all tensors are given in it.
        head_outputs: None for a language model, else outputs of its linear head.
        casts: whether tensors of another dtype are cast; else they are an error.
    """

    weights: NamedWeights
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    head_outputs: int | None
    casts: bool

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        return self.weights.folder

    def nbytes(self, name: str) -> int:
        """Size of a tensor."""
        return prod(self.shapes[name]) * self.dtype.itemsize

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.nbytes, self.shapes))

    def names(self) -> list[str]:
        """Names of all tensors, in the model's order."""
        return list(self.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def get(self, name: str) -> Tensor:
        """The tensor ``name`` in ``dtype``, read now.

        Raises:
            UserError: it has another shape, or another dtype and none was asked for.
        """
        if name == HEAD_NAMES[1] and name not in self.weights:
            assert self.head_outputs is not None, "only a linear head has a bias"
            return bias_beside(self.folder, self.head_outputs).to(self.dtype)
        tensor = self.weights.get(name)
        if tuple(tensor.shape) != self.shapes[name]:
            raise UserError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, the model's config.json "
                f"needs {self.shapes[name]}"
            )
        if tensor.dtype != self.dtype and not self.casts:
            raise UserError(
                f"{self.folder}: {name} is {tensor.dtype}, other tensors are {self.dtype}: choose "
                "one by --dtype"
            )
        return tensor.to(self.dtype)


def checked(
    weights: NamedWeights, hf_config: Mapping[str, Any], dtype: str | None
) -> CheckedWeights:
    """Compares the names with what the model needs; shapes and dtypes are checked when read.

    Args:
        weights: any.
        hf_config: the parsed config.json.
        dtype: name of the dtype that is wanted; None: as the weights are.

    Raises:
        UserError: tensors are missing, or are not of this model.
    """
    has_head = HEAD_NAMES[0] in weights
    head_outputs = int(weights.get(HEAD_NAMES[0]).shape[0]) if has_head else None
    shapes = expected_shapes(hf_config, head_outputs)
    # Old Llama folders have what is computed from the configuration.
    found = {name for name in weights.names() if not name.endswith("rotary_emb.inv_freq")}
    if hf_config.get("tie_word_embeddings") or has_head:
        found.discard(LM_HEAD)  # a copy of the embedding, or not used
    if has_head:
        found.add(HEAD_NAMES[1])  # where it is missing there is one beside, or it is zero
    for what, names in (("lacks", shapes.keys() - found), ("has unknown", found - shapes.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{weights.folder} {what} {len(names)} tensors of its config.json's model: {listed}"
            )
    if not has_head:
        check_tied(weights, hf_config)
    own = weights.get("model.norm.weight").dtype
    chosen = DTYPES.get(dtype or "", own)
    return CheckedWeights(weights, shapes, chosen, head_outputs, dtype is not None)
