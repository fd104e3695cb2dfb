"""What megatron-core itself makes of the folders that are written for Megatron-LM."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.conversion.megatron_names import MegatronTarget, megatron_args
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from tests.helpers import load_tool
from tests.helpers_models import make_tiny_model

tool = load_tool("convert_checkpoint")


def run(*arguments) -> int:
    return tool.main([str(x) for x in arguments])


def megatron_model(folder: Path) -> GPTModel:
    """megatron-core's own model, without Transformer Engine, by the arguments in a folder."""
    told = torch.load(folder / "common.pt", weights_only=False)["args"]
    config = TransformerConfig(
        num_layers=told.num_layers,
        hidden_size=told.hidden_size,
        num_attention_heads=told.num_attention_heads,
        num_query_groups=told.num_query_groups,
        kv_channels=told.kv_channels,
        ffn_hidden_size=told.ffn_hidden_size,
        normalization=told.normalization,
        add_bias_linear=told.add_bias_linear,
        add_qkv_bias=told.add_qkv_bias,
        gated_linear_unit=told.swiglu,
        activation_func=torch.nn.functional.silu,
        qk_layernorm=told.qk_layernorm,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=told.qk_layernorm, normalization="RMSNorm"),
        vocab_size=told.padded_vocab_size,
        max_sequence_length=told.max_position_embeddings,
        position_embedding_type="none",
        share_embeddings_and_output_weights=not told.untie_embeddings_and_output_weights,
    )


@pytest.mark.parametrize(
    ("family", "tied", "spec", "strict"),
    [
        ("qwen3", True, "te", "assume_ok_unexpected"),
        ("qwen3", False, "te", "raise_unexpected"),
        ("qwen2", True, "local", "raise_all"),
        ("llama", False, "local", "raise_all"),
    ],
)
def test_megatron_core_takes_a_torch_dist_folder_as_strictly_as_it_can(
    tmp_path, family, tied, spec, strict
):
    source = tmp_path / "model"
    make_tiny_model(source, family, tied, layers=5)
    assert run(source, tmp_path / "mid", "--to", "torch_dist", "--layer-spec", spec) == 0
    place = tmp_path / "mid" / "iter_0000001"
    start_processes()
    try:
        build_mesh(1, 1)
        model = megatron_model(place)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        wanted = model.sharded_state_dict(metadata={"dp_cp_group": replicas})
        found = dist_checkpointing.load({"model": wanted}, str(place), strict=strict)
        model.load_state_dict(found["model"])
    finally:
        stop_processes()
    weights = load_file(source / "model.safetensors")
    up = model.decoder.layers[4].mlp.linear_fc1.weight[80:]
    assert torch.equal(up, weights["model.layers.4.mlp.up_proj.weight"])


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (LLAMA3 | {"original_max_position_embeddings": 8192}, ""),
        (LLAMA3, "original_max_position_embeddings 64, where Megatron-LM always takes 8192"),
        (
            LLAMA3 | {"original_max_position_embeddings": 8192, "high_freq_factor": 8.0},
            "high_freq_factor 8, where Megatron-LM always takes 4",
        ),
        (
            LLAMA3 | {"original_max_position_embeddings": 8192, "low_freq_factor": 2.0},
            "low_freq_factor 2, where Megatron-LM always takes 1",
        ),
        ({"rope_type": "linear", "factor": 2.0}, ""),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, "yarn"),
        ({"rope_type": "default"}, ""),
    ],
)
def test_what_megatron_lm_would_compute_otherwise_is_told(tmp_path, capsys, rope, words, spelling):
    source = tmp_path / "changed"
    make_tiny_model(source, "llama", True, layers=2, max_positions=256)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    theta = {"rope_theta": 10000.5}
    config |= (
        {spelling: rope | theta} if spelling == "rope_parameters" else {spelling: rope, **theta}
    )
    (source / "config.json").write_text(json.dumps(config))
    for form in ("megatron", "torch_dist", "hf"):
        capsys.readouterr()
        assert run(source, tmp_path / "x", "--to", form, "--dry-run") == 0
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
        wanted = [words] if words and form != "hf" else []
        assert len(told) == len(wanted) and all(map(str.__contains__, told, wanted)), told
    shape = read_shape(config)
    target = MegatronTarget(1, PipelineCut(), 1, "te", 1)
    arguments = megatron_args(shape, config, target, torch.float32)
    assert arguments.rotary_base == 10000.5
    if rope["rope_type"] == "llama3" and not words:
        own = RotaryEmbedding(
            8,
            1.0,
            rotary_base=arguments.rotary_base,
            rope_scaling=True,
            rope_scaling_factor=arguments.rope_scaling_factor,
            use_cpu_initialization=True,
        )
        wanted = LlamaRotaryEmbedding(AutoConfig.for_model(**copy.deepcopy(config))).inv_freq
        torch.testing.assert_close(own.inv_freq, wanted)
