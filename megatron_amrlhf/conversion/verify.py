"""Logits of converted weights against those of the source, on this machine's CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_amrlhf.conversion.tensors import CheckedWeights
from megatron_amrlhf.models.loading import load_stage
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import read_hf_config
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes

# Largest allowed difference, relative to the largest logit: rounding of two implementations.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1}
NUM_TOKENS = 48


@dataclass(frozen=True)
class Probe:
    """Random tokens ``[1, T]`` at positions ``[1, T]``."""

    tokens: Tensor
    positions: Tensor

    @classmethod
    def of(cls, vocab_size: int, max_positions: int, spread: bool) -> Probe:
        """Consecutive positions, or positions ``spread`` from 0 to the model's last one.

        Spread ones have distances over the whole context, stretched or not. No text has them, so
        that rounding to bfloat16 alone can change a token's logits by as much as they are.
        """
        count = min(NUM_TOKENS, max_positions)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (1, count), generator=random)
        last = max_positions - 1 if spread else count - 1
        positions = torch.linspace(0, last, count).long()[None]
        return cls(tokens, positions)


@dataclass(frozen=True)
class Comparison:
    """Two sets of logits in one dtype.

    Attributes:
        dtype: of weights and activations.
        difference: largest, relative to the largest logit of the source.
        tolerance: what it may be.
        same_top: share of positions with the same largest logit.
    """

    dtype: str
    difference: float
    tolerance: float
    same_top: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (a NaN is not)."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.dtype}: largest difference {self.difference:.1e} of the largest logit "
            f"(tolerance {self.tolerance:.0e}), same top token at {self.same_top:.1%} of positions"
            f": {'passed' if self.passed else 'FAILED'}"
        )


def compare_logits(
    source: CheckedWeights | Path,
    target: CheckedWeights | Path,
    hf_config: Mapping[str, Any],
    casts: bool,
) -> list[Comparison]:
    """Compares in float32 at spread positions and in bfloat16 at consecutive ones.

    Holds one model in memory at a time.

    Args:
        source: a Hugging Face folder, run by transformers, or weights, run by megatron-core.
        target: the same.
        hf_config: the parsed config.json of the model.
        casts: whether the target's weights were rounded to another dtype.
    """
    shape, found = read_shape(hf_config), []
    sizes = shape.vocab_size, shape.max_positions
    for name in TOLERANCES:
        dtype, probe = getattr(torch, name), Probe.of(*sizes, spread=name == "float32")
        before, after = (_logits(x, hf_config, dtype, probe) for x in (source, target))
        tolerance = TOLERANCES["bfloat16" if casts else name]
        difference = float((before - after).abs().max() / before.abs().max())
        same = float((before.argmax(-1) == after.argmax(-1)).float().mean())
        found.append(Comparison(name, difference, tolerance, same))
    return found


def _logits(
    model: CheckedWeights | Path, hf_config: Mapping[str, Any], dtype: torch.dtype, probe: Probe
) -> Tensor:
    if isinstance(model, Path):
        return hugging_face_logits(model, dtype, probe)
    return megatron_logits(model, hf_config, dtype, probe)


@torch.no_grad()
def hugging_face_logits(folder: Path, dtype: torch.dtype, probe: Probe) -> Tensor:
    """``[T, V]`` logits, or ``[T, outputs]`` of a token classification model; float32."""
    name = (read_hf_config(folder).get("architectures") or [""])[0]
    is_classifier = name.endswith("ForTokenClassification")
    auto = AutoModelForTokenClassification if is_classifier else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    # With a mask given, jumps in the positions do not start new rows.
    mask = torch.ones_like(probe.tokens)
    return model(probe.tokens, attention_mask=mask, position_ids=probe.positions).logits[0].float()


@torch.no_grad()
def megatron_logits(
    weights: CheckedWeights, hf_config: Mapping[str, Any], dtype: torch.dtype, probe: Probe
) -> Tensor:
    """As ``hugging_face_logits``, computed by megatron-core in one process."""
    start_processes()
    mesh, shape = build_mesh(1, 1), read_shape(hf_config)
    config = AutoConfig.for_model(**copy.deepcopy(dict(hf_config)))
    model = StageModel(shape, config, mesh, dtype, weights.head_outputs).to(mesh.device)
    load_stage(model.eval(), weights.head_outputs, weights, mesh)
    tokens, positions = probe.tokens.to(mesh.device), probe.positions.to(mesh.device)
    return model(0, tokens, positions=positions).float().cpu()[:, : shape.vocab_size]
