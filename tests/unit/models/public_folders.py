"""Public shapes of model folders: those that compute what transformers does, and refused ones."""

import torch

from tests.unit.models.folder_shapes import (
    FolderShape,
    added,
    as_bin,
    cast,
    config,
    dropped,
    file,
    frequencies,
    index_of_other_files,
    linked,
    older_shards,
    packed,
    quantized,
    renamed,
    resized,
    shards,
    tensors,
    transformers_4,
)

TIED, NO_GROUPS = {"tied": True}, {"kv_heads": 6}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FP8, FLOAT, INT, BYTE = torch.float8_e4m3fn, torch.float32, torch.int32, torch.uint8
CODE = {"AutoConfig": "a.B", "AutoModelForCausalLM": "modeling_a.C"}
EMBED, HEAD, INDEX = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors.index.json"
S = FolderShape
SAME = [
    *(
        S(f"{family} of transformers 5", family)
        for family in ("llama", "mistral", "qwen2", "qwen3")
    ),
    *(
        S(f"{family} of transformers 4", family, (transformers_4,))
        for family in ("llama", "mistral", "qwen2", "qwen3")
    ),
    *(S(f"{family} tied", family, options=TIED) for family in ("llama", "qwen2", "qwen3")),
    *(
        S(f"old {rope['rope_type']} rope", "llama", (transformers_4,), options={"rope": rope})
        for rope in (LINEAR, YARN, LLAMA3)
    ),
    S("yarn of qwen", "qwen2", (transformers_4,), options={"rope": YARN}),
    S("sharded", "qwen2", (shards(),)),
    S("an index that names wrong files", "qwen2", (index_of_other_files,)),
    S("links", "llama", (linked,)),
    S("links to shards", "llama", (shards(), linked)),
    S("older shards beside", "qwen2", (older_shards,), left=f"{INDEX}, which names other files"),
    S("bin beside", "llama", (as_bin(True),), left="1 file (pytorch_model.bin)"),
    S(
        "consolidated beside",
        "mistral",
        (shards(), file("consolidated.safetensors", "x")),
        left="not read: 1 file (consolidated.safetensors)",
    ),
    S("float16", "llama", (cast(torch.float16), config(torch_dtype="float16", dtype=...))),
    S("bfloat16", "qwen2", (cast(torch.bfloat16), config(dtype="bfloat16"))),
    S("float32 said to be bfloat16", "qwen3", (config(dtype="bfloat16"),)),
    S("two dtypes", "qwen2", (cast(torch.bfloat16, "proj.weight"),), left="(bfloat16, float32)"),
    S("both dtype keys", "llama", (config(torch_dtype="float16", dtype="float32"),)),
    S(
        "a copy of the embedding",
        "llama",
        (tensors(lambda w: w | {HEAD: w[EMBED]}),),
        options=TIED,
        left="1 tensor (lm_head.weight)",
    ),
    S("a tied embedding saved as the head", "llama", (renamed(EMBED, HEAD),), options=TIED),
    S("saved without its head", "qwen2", (renamed("model.", ""),), options=TIED),
    S("bare names and a head", "llama", (renamed("model.", ""),)),
    S("old frequencies", "llama", (tensors(frequencies),), left="2 tensors (model.layers.0."),
    S(
        "a value head",
        "qwen2",
        (added(v_head__summary__weight=(1, 48), v_head__summary__bias=(1,)),),
        left="2 tensors (v_head.summary.bias, v_head.summary.weight)",
    ),
    S("a score beside", "qwen2", (added(score__weight=(1, 48)),), left="1 tensor (score.weight)"),
    S("more rows", "llama", (resized(136), config(vocab_size=136))),
    S("more rows tied", "qwen2", (resized(136), config(vocab_size=136)), options=TIED),
    S("padding -1", "llama", (config(pad_token_id=-1),)),
    S("no padding", "llama", (config(pad_token_id=None, eos_token_id=[2, 3], bos_token_id=1),)),
    *(
        S(f"{family} large heads", family, options={"head_dim": 16})
        for family in ("llama", "qwen3")
    ),
    S("large heads of mistral 4", "mistral", (transformers_4,), options={"head_dim": 16}),
    S("head_dim null", "llama", (config(head_dim=None),)),
    S("qwen2 without head_dim", "qwen2", (config(head_dim=...),)),
    S("biases off", "llama", (config(attention_bias=False, mlp_bias=False, pretraining_tp=2),)),
    S("one group", "qwen2", options={"kv_heads": 1}),
    S("no groups said", "llama", (config(num_key_value_heads=...),), options=NO_GROUPS),
    S("no groups null", "llama", (config(num_key_value_heads=None),), options=NO_GROUPS),
    S(
        "few keys",
        "llama",
        (
            config(
                rms_norm_eps=...,
                hidden_act=...,
                max_position_embeddings=...,
                tie_word_embeddings=...,
                rope_parameters=...,
                use_cache=...,
            ),
        ),
    ),
    S("no epsilon", "qwen3", (transformers_4, config(rms_norm_eps=...))),
    S("swish", "llama", (config(hidden_act="swish"),)),
    S("no window", "mistral", (transformers_4, config(sliding_window=None))),
    S("mistral's first window", "mistral", (transformers_4, config(sliding_window=4096))),
    S("no word of a window", "mistral", (config(sliding_window=...),)),
    S(
        "window off",
        "qwen2",
        (transformers_4, config(use_sliding_window=False, sliding_window=4, max_window_layers=2)),
    ),
    S("window of a llama", "llama", (config(use_sliding_window=True, sliding_window=4),)),
    S(
        "window from layer 28",
        "qwen2",
        (config(use_sliding_window=True, sliding_window=4, max_window_layers=28, layer_types=...),),
    ),
    S("theta twice", "llama", (config(rope_theta=5e5),)),
    S("two rope keys", "llama", (config(rope_scaling=LINEAR, rope_parameters=YARN),)),
    S(
        "type and rope_type",
        "llama",
        (
            config(
                rope_parameters=...,
                rope_scaling={"type": "dynamic", "rope_type": "linear", "factor": 2.0},
            ),
        ),
    ),
    S(
        "another generation config",
        "qwen2",
        (file("generation_config.json", '{"eos_token_id": 5}'),),
    ),
    S("dropout", "llama", (config(attention_dropout=0.1),), left="not read: attention_dropout 0.1"),
    S("no architectures", "qwen2", (config(architectures=...),)),
    S("architecture of the base", "llama", (config(architectures=["LlamaModel"]),)),
    S(
        "unknown keys",
        "llama",
        (config(unsloth_version="1", _name_or_path="x", quantization_config=None),),
    ),
    S(
        "code beside",
        "qwen2",
        (file("modeling_x.py", "raise SystemExit"),),
        left="1 file (modeling_x.py)",
    ),
    S("code of a tokenizer", "qwen2", (config(auto_map={"AutoTokenizer": ["a.B", None]}),)),
    S("adapters below", "llama", (lambda folder: (folder / "checkpoint-1").mkdir(),)),
]
REFUSED = [
    S(
        "bin alone",
        "llama",
        (as_bin(False),),
        "no .*safetensors file, only pytorch_model.bin: save it",
    ),
    S(
        "block fp8",
        "qwen3",
        (
            quantized(FP8, weight_scale_inv=FLOAT),
            config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ),
        r"quantization_config \(fp8\): quantized models are not supported",
    ),
    S(
        "block fp8 unsaid",
        "qwen3",
        (quantized(FP8, weight_scale_inv=FLOAT),),
        r"14 tensors of F8_E4M3, 14 scales or other parts: ",
    ),
    S(
        "tensor fp8",
        "llama",
        (quantized(FP8, weight_scale=FLOAT, input_scale=FLOAT),),
        "14 tensors of F8_E4M3, 28 scales",
    ),
    S("fp8 alone", "llama", (quantized(FP8),), "14 tensors of F8_E4M3, 0 scales"),
    S(
        "gptq",
        "llama",
        (
            packed(qweight=INT, qzeros=INT, scales=FLOAT, g_idx=INT),
            config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ),
        r"quantization_config \(gptq\)",
    ),
    S(
        "gptq unsaid",
        "llama",
        (packed(qweight=INT, qzeros=INT, scales=FLOAT, g_idx=INT),),
        "0 tensors of another form, 56 scales or other parts",
    ),
    S("awq unsaid", "qwen2", (packed(qweight=INT, qzeros=INT, scales=FLOAT),), "quantized weights"),
    S(
        "bitsandbytes 4",
        "llama",
        (
            quantized(
                BYTE,
                **{
                    "weight.absmax": FLOAT,
                    "weight.quant_map": FLOAT,
                    "weight.quant_state.bitsandbytes__nf4": BYTE,
                },
            ),
        ),
        "28 tensors of U8, 28 scales",
    ),
    S(
        "bitsandbytes 8",
        "llama",
        (quantized(torch.int8, SCB=FLOAT),),
        "14 tensors of I8, 14 scales",
    ),
    S(
        "compressed",
        "llama",
        (
            packed(weight_packed=INT, weight_scale=FLOAT, weight_shape=INT),
            config(compression_config={"quant_method": "compressed-tensors"}),
        ),
        r"quantization_config \(compressed-tensors\)",
    ),
    S("compressed unsaid", "llama", (packed(weight_packed=INT, weight_scale=FLOAT),), "28 scales"),
    S(
        "mlx",
        "qwen2",
        (packed(weight=torch.uint32, scales=FLOAT, biases=FLOAT),),
        "14 tensors of U32",
    ),
    S("cache scales", "llama", (added(model__layers__0__self_attn__k_scale=(1,)),), "1 scales"),
    S(
        "adapter beside",
        "llama",
        (file("adapter_config.json"),),
        r"holds an adapter \(adapter_config.json\), which would not be applied: merge it",
    ),
    S(
        "adapter alone",
        "llama",
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),),
        "holds an adapter",
    ),
    S(
        "a tied model's own head",
        "llama",
        (added(lm_head__weight=(131, 48)),),
        "tie_word_embeddings: true, but lm_head.weight is not model.embed_tokens.weight: set it to",
        options=TIED,
    ),
    S("untied without a head", "qwen2", (dropped(HEAD),), "no tensor 'lm_head.weight'"),
    S(
        "untied base model",
        "qwen2",
        (renamed("model.", ""), dropped(HEAD)),
        "no tensor 'lm_head.weight'",
    ),
    S(
        "untied without an embedding",
        "llama",
        (dropped(EMBED),),
        "no tensor 'model.embed_tokens.weight'",
    ),
    S(
        "dynamic rope",
        "llama",
        (config(rope_scaling={"type": "dynamic", "factor": 2.0}),),
        "rope type 'dynamic' is not supported",
    ),
    S(
        "biases on",
        "llama",
        (config(attention_bias=True),),
        "attention_bias: true is not supported",
    ),
    S(
        "biases unsaid",
        "llama",
        (added(model__layers__0__self_attn__q_proj__bias=(48,)),),
        "1 of 22 tensors that are no part of .*q_proj.bias",
    ),
    S(
        "norms unsaid",
        "qwen2",
        (added(model__layers__0__self_attn__q_norm__weight=(8,)),),
        "q_norm",
    ),
    S(
        "fewer layers said",
        "qwen2",
        (config(num_hidden_layers=1, layer_types=...),),
        "12 of 27 tensors that",
    ),
    S(
        "more layers said",
        "qwen2",
        (config(num_hidden_layers=3, layer_types=...),),
        "no tensor 'model.layers.2",
    ),
    S("layers unsaid", "llama", (config(num_hidden_layers=...),), "no tensor 'model.layers.2"),
    S(
        "an image tower",
        "qwen2",
        (added(visual__patch_embed__weight=(4, 4)),),
        "visual.patch_embed.weight",
    ),
    S("code of its own", "qwen2", (config(auto_map=CODE),), "auto_map names code of its own"),
    S(
        "a shard missing",
        "qwen2",
        (shards(), lambda folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        "lacks the file model-00002-of",
    ),
    S(
        "two copies without an index",
        "llama",
        (
            shards(False, True),
            lambda folder: (folder / "model.safetensors").rename(folder / "a.safetensors"),
        ),
        " is in a.safetensors and in model-",
    ),
    S(
        "rows not said",
        "llama",
        (resized(136),),
        r"shape \(136, 48\), but config.json and this run need",
    ),
    S("rows too many said", "llama", (config(vocab_size=136),), r"need \(136, 48\)"),
    S("both ways", "llama", (config(is_causal=False),), "is_causal: false"),
    S("experts", "qwen2", (config(model_type="qwen2_moe"),), "model_type 'qwen2_moe'"),
    S(
        "mistral's own names",
        "mistral",
        (
            renamed("model.layers.0.", "layers.7."),
            lambda folder: (folder / "model.safetensors").rename(
                folder / "consolidated.safetensors"
            ),
        ),
        "no tensor",
    ),
    S("nonsense", "llama", (config(rms_norm_eps=float("nan")),), "rms_norm_eps must be"),
    S("no theta", "llama", (config(rope_parameters={"rope_theta": 0}),), "rope_theta must be"),
]
