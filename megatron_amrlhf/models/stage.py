"""One pipeline stage of a model: megatron-core's GPTModel with our attention and heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_amrlhf.models.attention import KVCache, RotarySdpaAttention
from megatron_amrlhf.models.shape import ModelShape
from megatron_amrlhf.parallel.mesh import Mesh


def layer_spec() -> ModuleSpec:
    """A Llama-style layer without Transformer Engine, the same on CPU and GPU."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(
                module=RotarySdpaAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=IdentityOp,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def transformer_config(shape: ModelShape, mesh: Mesh, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of a model on this mesh; nothing is fused or compiled."""
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=mesh.device.type == "cpu",
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_sync=False,
        calculate_per_token_loss=True,  # the losses are scaled in losses/reduce.py alone
    )


class StageModel(GPTModel):
    """The layers of one pipeline stage, with the LM head or a linear head on the last.

    Args:
        shape: sizes of the whole model.
        hf_config: the model's ``transformers`` configuration (rotary tables come from it).
        mesh: where this stage stands.
        dtype: of all parameters.
        head_outputs: None for the LM head; else the outputs of a linear head with bias.
    """

    def __init__(
        self,
        shape: ModelShape,
        hf_config: AutoConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        head_outputs: int | None = None,
    ):
        super().__init__(
            config=transformer_config(shape, mesh, dtype),
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec()] * (shape.num_layers // mesh.pp_size),
                layer_norm=WrappedTorchNorm,
            ),
            vocab_size=shape.padded_vocab(mesh.tp_size),
            max_sequence_length=shape.max_positions,
            pre_process=mesh.is_first_stage,
            post_process=mesh.is_last_stage,
            # The copies of a tied embedding on two stages are ours to keep equal (engine/tied.py).
            share_embeddings_and_output_weights=(
                shape.tied and mesh.pp_size == 1 and head_outputs is None
            ),
            position_embedding_type="none",
        )
        self.shape = shape
        self.head_outputs = head_outputs
        if head_outputs is not None and self.post_process:
            self.output_layer = nn.Linear(
                shape.hidden_size, head_outputs, dtype=dtype, device=mesh.device
            )
        for index, layer in enumerate(self.decoder.layers):
            layer.self_attention.cache_index = index
        # In a tuple, so that casting the module (DeepSpeed does, to bfloat16) leaves the
        # frequencies in float32.
        self._rotary = (LlamaRotaryEmbedding(hf_config).to(mesh.device),)

    def rotary_tables(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """``[2, B or 1, T, head_dim]`` cos and sin of ``[B or 1, T]`` positions."""
        probe = torch.empty(0, dtype=dtype, device=positions.device)
        return torch.stack(self._rotary[0](probe, positions))

    def forward(
        self,
        tokens: Tensor,
        output_index: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Runs the stage on ``tokens`` or on the activations of the stage before.

        Args:
            tokens: ``[B, T]`` int64, padded on the right.
            output_index: ``[N]`` int64 into the flattened ``B * T`` positions: where the last
                stage computes outputs; None means everywhere.
            positions: ``[B, T]`` rotary positions; None means ``0..T-1`` in every row.
            cache: keys and values while decoding.

        Returns:
            ``[T, B, H]`` activations; on the last stage ``[N, V_padded / TP]`` logits or
            ``[N, head_outputs]`` head outputs.
        """
        hidden_TBH = None
        if self.pre_process:
            hidden_TBH = self.embedding(input_ids=tokens, position_ids=None)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden_TBH = self.decoder(
            hidden_states=hidden_TBH,
            attention_mask=cache,
            rotary_pos_emb=self.rotary_tables(positions, self.config.params_dtype),
        )
        if not self.post_process:
            return hidden_TBH
        hidden_NH = hidden_TBH.transpose(0, 1).reshape(-1, hidden_TBH.shape[-1])
        if output_index is not None:
            hidden_NH = hidden_NH[output_index]
        if self.head_outputs is not None:
            return self.output_layer(hidden_NH)
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(hidden_NH[:, None], weight=weight)
        return logits[:, 0]
