"""Parameter names and arguments as Megatron-LM saves them."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import AutoConfig

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.models.shape import ModelShape

Spec = Literal["te", "local"]
RELEASE = "release"  # in place of an iteration: weights without a training state
# Norms that Transformer Engine's layers fuse with the linear layer behind them.
FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


# What megatron-core's RotaryEmbedding takes for these numbers of a llama3 rope, and no others.
FIXED_LLAMA3 = {
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def section_and_name(local: str, virtual: int) -> tuple[str, str]:
    """The dictionary of a checkpoint that holds our local parameter, and its name in it.

    Our names are megatron-core's own after ``chunks.N.``; with several chunks a rank Megatron-LM
    has a dictionary for each.
    """
    _, index, name = local.split(".", 2)
    return ("model" if virtual == 1 else f"model{index}"), name


def te_name(name: str) -> str:
    """The name in Transformer Engine's layer spec of a parameter of the local spec."""
    for plain, fused in FUSED.items():
        if name.endswith(plain):
            return name.removesuffix(plain) + fused
    return name


@dataclasses.dataclass(frozen=True)
class MegatronTarget:
    """How a Megatron-LM folder is to lie.

    Attributes:
        tensor: tensor-parallel size.
        cut: the pipeline axis.
        vocab_multiple: Megatron-LM's ``--make-vocab-size-divisible-by``.
        spec: layer spec whose parameter names are used (``--transformer-impl``).
        iteration: of ``iter_NNNNNNN``; 0 for ``release``.
    """

    tensor: int
    cut: PipelineCut
    vocab_multiple: int
    spec: Spec
    iteration: int

    @property
    def iteration_name(self) -> str:
        """Name of the iteration's folder."""
        return f"iter_{self.iteration:07d}" if self.iteration else RELEASE

    def padded(self, shape: ModelShape) -> ModelShape:
        """The model with its vocabulary padded as Megatron-LM does."""
        return dataclasses.replace(shape, vocab_multiple=self.vocab_multiple)


def megatron_args(
    shape: ModelShape, hf_config: Mapping[str, Any], target: MegatronTarget, dtype: torch.dtype
) -> argparse.Namespace:
    """Megatron-LM's arguments for a model, as ``--use-checkpoint-args`` reads them."""
    cut, rope = target.cut, _rope_of(hf_config)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=True,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        seq_length=shape.max_positions,
        max_position_embeddings=shape.max_positions,
        padded_vocab_size=target.padded(shape).padded_vocab(target.tensor),
        make_vocab_size_divisible_by=target.vocab_multiple,
        untie_embeddings_and_output_weights=not shape.tied,
        add_position_embedding=False,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        rotary_base=int(theta) if theta == int(theta) else theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=kind == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0) if kind == "llama3" else 8.0,
        rotary_seq_len_interpolation_factor=rope["factor"] if kind == "linear" else None,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=target.tensor,
        pipeline_model_parallel_size=cut.stages,
        decoder_first_pipeline_num_layers=cut.first_layers,
        decoder_last_pipeline_num_layers=cut.last_layers,
        num_layers_per_virtual_pipeline_stage=(
            shape.num_layers // cut.stages // cut.virtual if cut.virtual > 1 else None
        ),
        transformer_impl="transformer_engine" if target.spec == "te" else "local",
        use_mcore_models=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        iteration=target.iteration,
    )


def _rope_of(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    own = copy.deepcopy(dict(hf_config))  # transformers writes into it
    return AutoConfig.for_model(**own).rope_parameters


def lost_in_megatron(shape: ModelShape, hf_config: Mapping[str, Any]) -> list[str]:
    """What a model computes and ``megatron_args`` cannot say: a line for each."""
    rope, found = _rope_of(hf_config), []
    if rope["rope_type"] == "llama3":
        others = {
            key: rope[key]
            for key, fixed in FIXED_LLAMA3.items()
            if key in rope and rope[key] != fixed
        }
        if others:
            has = ", ".join(f"{key} {value:g}" for key, value in others.items())
            takes = ", ".join(f"{FIXED_LLAMA3[key]:g}" for key in others)
            found.append(
                f"the model's llama3 rope has {has}, where Megatron-LM always takes {takes}: it "
                "would turn positions otherwise"
            )
    if rope["rope_type"] == "yarn":
        found.append(
            "the model's yarn rope is not among the arguments that are written: Megatron-LM would "
            "take a plain one"
        )
    if shape.window is not None and shape.window < shape.max_positions:
        found.append(
            f"the model's sliding_window of {shape.window} tokens is not among the arguments that "
            "are written: Megatron-LM would attend to all tokens before"
        )
    return found
