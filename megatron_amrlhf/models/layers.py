"""What a stage is made of: norms and layers that recompute, and a head read in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_amrlhf.models.attention import NO_DROPOUT, RotarySdpaAttention
from megatron_amrlhf.models.shape import ModelShape

# ([n, V_padded / TP] logits, [n] int64 token ids that follow) -> [n, ...] float32
LogitsFunction = Callable[[Tensor, Tensor], Tensor]


class Norm:
    """Builds torch's RMSNorm; megatron-core's own wrapper refuses sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float, **_unused):
        norm = nn.RMSNorm(hidden_size, eps, dtype=config.params_dtype)
        # Each tensor rank sees a part of the positions: engine/gradients.py sums over them.
        weight: Any = norm.weight  # megatron-core's mark on it
        weight.sequence_parallel = config.sequence_parallel
        return norm


class Layer(TransformerLayer):
    """A layer that can throw its activations away and compute them again in the backward."""

    recompute: bool = False

    def forward(self, *args, **kwargs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, **kwargs, **NO_DROPOUT)
        return super().forward(*args, **kwargs)


def layer_spec(qk_norm: bool) -> ModuleSpec:
    """A Llama-style layer without Transformer Engine, the same on CPU and GPU.

    Args:
        qk_norm: whether query and key heads go through a norm each, before they are rotated.
    """
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=RotarySdpaAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=IdentityOp,
                    linear_proj=RowParallelLinear,
                    q_layernorm=Norm if qk_norm else None,
                    k_layernorm=Norm if qk_norm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class ValueHead(nn.Linear):
    """The head of a critic or a reward model; float32, whatever the dtype of its weights.

    Values of size 1 lie 2^-7 apart in bfloat16, more than a token changes them: differences of
    neighbouring values, which advantages are made of, would be rounding.
    """

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """``[N, outputs]`` float32 (float64 for float64 weights)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(hidden_NH.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


FEW_ROWS = 64  # of a decoding micro-batch, as a rule


class LmHead(ColumnParallelLinear):
    """The vocabulary-parallel head; its input holds all positions on every tensor rank."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, tp_size: int, own: bool):
        super().__init__(
            config.hidden_size,
            shape.padded_vocab(tp_size),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=not own,
        )
        # The stage has gathered the positions already. Each rank's columns give a part of the
        # input's gradient: the sum makes it whole, as the gather expects it.
        self.sequence_parallel, self.allreduce_dgrad = False, tp_size > 1

    def _forward_impl(self, input, weight, *args, **kwargs) -> Tensor:
        """megatron-core's product, or, of few rows on several cores, the same from the other side.

        Libraries cut a product along the rows of its left factor. A token a row leaves the cores
        little to share there; the vocabulary is long (1.3 to 3.5 times as fast on two).
        """
        rows = input.numel() // input.shape[-1]
        is_decoding = rows <= FEW_ROWS and not torch.is_grad_enabled()
        if is_decoding and input.device.type == "cpu" and torch.get_num_threads() > 1:
            product = weight @ input.reshape(rows, -1).t()
            return product.t().reshape(*input.shape[:-1], -1)
        return super()._forward_impl(input, weight, *args, **kwargs)

    def forward(
        self,
        hidden_NH: Tensor,
        weight: Tensor | None = None,
        targets: Tensor | None = None,
        function: LogitsFunction | None = None,
        positions: int = 0,
    ) -> Tensor:
        """``[N, V_padded / TP]`` logits, or what ``function`` makes of them.

        Args:
            hidden_NH: ``[N, H]``.
            weight: the embedding's, where it is tied and on this stage.
            targets: ``[N]``, the function's second argument.
            function: reads the logits, ``positions`` at a time.
            positions: how many positions' logits exist at a time.
        """

        def logits(hidden: Tensor) -> Tensor:
            # megatron-core wants [positions, batch, H] and gives (output, bias).
            return super(LmHead, self).forward(hidden[:, None], weight=weight)[0][:, 0]

        if function is None:
            return logits(hidden_NH)
        assert targets is not None, "the function's second argument"

        def read(hidden: Tensor, following: Tensor) -> Tensor:
            return function(logits(hidden), following)

        if hidden_NH.shape[0] <= positions:
            return read(hidden_NH, targets)
        # Nearly equal chunks: products of few rows round otherwise than those of many.
        count = -(-hidden_NH.shape[0] // positions)
        chunks = zip(hidden_NH.tensor_split(count), targets.tensor_split(count), strict=True)
        # Checkpointed, so that between forward and backward no chunk's logits are held.
        return torch.cat([checkpoint(read, *chunk, **NO_DROPOUT) for chunk in chunks])
