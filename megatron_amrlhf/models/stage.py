"""One pipeline stage of a model: megatron-core's GPTModel with our attention and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_amrlhf.models.attention import KVCache, Packing
from megatron_amrlhf.models.layers import LmHead, LogitsFunction, Norm, ValueHead, layer_spec
from megatron_amrlhf.models.shape import ModelShape
from megatron_amrlhf.parallel.mesh import Mesh


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes; none of it changes the weights or, but for rounding, the outputs.

    Attributes:
        sequence_parallel: norms and residuals hold 1/TP of the positions. Not for decoding.
        recompute: activations computed again in the backward: none, the attention between its
            linear layers (selective, https://arxiv.org/abs/2205.05198), or whole layers (full).
        logit_positions: positions whose logits exist at a time where the head is read by a
            function; logits of other chunks are computed again in the backward.
    """

    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    logit_positions: int = 2048


PLAIN = StageOptions()


def transformer_config(
    shape: ModelShape, mesh: Mesh, dtype: torch.dtype, sequence_parallel: bool
) -> TransformerConfig:
    """megatron-core's configuration of a model on this mesh; nothing is fused or compiled."""
    interleaved = mesh.cut.virtual > 1
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
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        sequence_parallel=sequence_parallel,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=mesh.cut.virtual if interleaved else None,
        num_layers_in_first_pipeline_stage=mesh.cut.first_layers,
        num_layers_in_last_pipeline_stage=mesh.cut.last_layers,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=mesh.device.type == "cpu",
        perform_initialization=False,  # load_stage fills every parameter
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=False,
        # Interleaved, two neighbours at PP 2 exchange both ways at once, which one batch of
        # operations would mix up; single operations in a fixed order do not.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_sync=False,
        calculate_per_token_loss=True,  # the losses are scaled in losses/reduce.py alone
    )


class StageChunk(GPTModel):
    """Consecutive layers of a model, with the embedding before and the head after if they do.

    Args:
        shape: sizes of the whole model.
        hf_config: the model's ``transformers`` configuration (rotary tables come from it).
        mesh: where this stage stands.
        dtype: of all parameters.
        head_outputs: None for the LM head; else the outputs of a linear head with bias.
        options: how it computes.
        index: which of the rank's chunks it is.
    """

    def __init__(
        self,
        shape: ModelShape,
        hf_config: AutoConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        head_outputs: int | None,
        options: StageOptions,
        index: int,
    ):
        chunk = mesh.cut.chunks(shape.num_layers, mesh.pp_rank)[index]
        # The copies of a tied embedding on two stages are ours to keep equal (engine/).
        shared = shape.tied and mesh.pp_size == 1 and head_outputs is None
        super().__init__(
            config=transformer_config(shape, mesh, dtype, options.sequence_parallel),
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer_spec(shape.qk_norm)] * len(chunk.layers), layer_norm=Norm
            ),
            vocab_size=shape.padded_vocab(mesh.tp_size),
            max_sequence_length=shape.max_positions,
            pre_process=chunk.has_embedding,
            post_process=chunk.has_head,
            share_embeddings_and_output_weights=shared,
            position_embedding_type="none",  # rotated in our attention
            vp_stage=index if mesh.cut.virtual > 1 else None,
        )
        self.shape, self.head_outputs, self.options = shape, head_outputs, options
        self.output_layer: LmHead | ValueHead
        if self.post_process and head_outputs is None:
            self.output_layer = LmHead(self.config, shape, mesh.tp_size, own=not shared)
        elif self.post_process and head_outputs is not None:
            self.output_layer = ValueHead(
                shape.hidden_size, head_outputs, dtype=dtype, device=mesh.device
            )
        for place, layer in enumerate(self.decoder.layers):
            layer.self_attention.cache_index = place
            layer.self_attention.recompute = options.recompute == "selective"
            layer.recompute = options.recompute == "full"
        # In a tuple, so that casting the module (DeepSpeed does, to bfloat16) leaves the
        # frequencies in float32.
        self._rotary = (LlamaRotaryEmbedding(hf_config).to(mesh.device),)

    def rotary_tables(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """``[2, B or 1, T, head_dim]`` cos and sin of ``[B or 1, T]`` positions."""
        # transformers' module takes the dtype of its tables from a tensor.
        probe = torch.empty(0, dtype=dtype, device=positions.device)
        return torch.stack(self._rotary[0](probe, positions))

    def forward(
        self,
        tokens: Tensor,
        *,
        output_index: Tensor | None = None,
        positions: Tensor | None = None,
        rows: KVCache | Packing | None = None,
        targets: Tensor | None = None,
        function: LogitsFunction | None = None,
    ) -> Tensor:
        """Runs the chunk on ``tokens`` or on the activations of the chunk before.

        Args:
            tokens: ``[B, T]`` int64, padded on the right.
            output_index: ``[N]`` int64 into the flattened ``B * T`` positions: where the last
                chunk computes outputs; None means everywhere.
            positions: ``[B, T]`` rotary positions; None means ``0..T-1`` in every row.
            rows: keys and values while decoding, or how rows are packed into one (``B`` 1).
            targets: ``[N]`` token ids that follow, for ``function``.
            function: reads the logits on the last chunk of a language model.

        Returns:
            ``[T, B, H]`` activations (``[T / TP, B, H]`` in sequence parallelism); on the last
            chunk ``[N, V_padded / TP]`` logits, ``[N, ...]`` of ``function``, or
            ``[N, head_outputs]`` head outputs.
        """
        # The decoder of a later chunk takes what set_input_tensor gave it instead.
        hidden_TBH = None
        if self.pre_process:
            hidden_TBH = self.embedding(input_ids=tokens, position_ids=None)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        # megatron-core hands mask and rotary tables on to our attention as they are.
        hidden_TBH = self.decoder(
            hidden_states=hidden_TBH,
            attention_mask=rows,
            rotary_pos_emb=self.rotary_tables(positions, self.config.params_dtype),
        )
        if not self.post_process:
            return hidden_TBH
        if self.options.sequence_parallel:
            # Every tensor rank reads all positions, so the gradient is whole on each.
            hidden_TBH = gather_from_sequence_parallel_region(
                hidden_TBH, tensor_parallel_output_grad=False
            )
        # [T, B, H] to [B * T, H], row by row: as output_index counts.
        hidden_NH = hidden_TBH.transpose(0, 1).reshape(-1, hidden_TBH.shape[-1])
        if output_index is not None:
            # Before the head, so that prompts and padding never have logits.
            hidden_NH = hidden_NH[output_index]
        if self.head_outputs is not None:
            return self.output_layer(hidden_NH)
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return self.output_layer(hidden_NH, weight, targets, function, self.options.logit_positions)


class StageModel(nn.Module):
    """All chunks of a rank; arguments as ``StageChunk``'s."""

    def __init__(
        self,
        shape: ModelShape,
        hf_config: AutoConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        head_outputs: int | None = None,
        *,
        options: StageOptions = PLAIN,
    ):
        super().__init__()
        self.shape = shape
        self.chunks = nn.ModuleList(
            StageChunk(
                shape,
                hf_config,
                mesh,
                dtype=dtype,
                head_outputs=head_outputs,
                options=options,
                index=index,
            )
            for index in range(mesh.cut.virtual)
        )

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    def forward(self, index: int, *args, **kwargs) -> Tensor:
        """Runs chunk ``index``."""
        return self.chunks[index](*args, **kwargs)
