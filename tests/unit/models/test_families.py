"""Families: what is refused, and that our table agrees with transformers."""

import json
import math

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.families import FAMILIES, config_object
from megatron_amrlhf.models.shape import check_shape, read_shape
from tests.unit.config.samples import PPO, make_config

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


def config_of(family: str, **keys) -> dict:
    return {"model_type": family, **SIZES, **keys}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_a_config_lacks_are_what_transformers_takes(family):
    sizes = {"num_attention_heads": 32, "hidden_size": 64}  # a multiple of all their groups
    wanted, shape = (
        AutoConfig.for_model(family, **sizes),
        read_shape({"model_type": family} | sizes),
    )
    assert AutoModelForCausalLM._model_mapping[type(wanted)].__name__ == (
        FAMILIES[family].architecture
    )
    heads = wanted.num_attention_heads
    assert shape.num_kv_heads == wanted.num_key_value_heads
    assert shape.head_dim == (getattr(wanted, "head_dim", None) or wanted.hidden_size // heads)
    assert shape.window == wanted.sliding_window if family != "llama" else shape.window is None
    assert shape.tied == wanted.tie_word_embeddings
    assert shape.norm_eps == wanted.rms_norm_eps
    assert shape.max_positions == wanted.max_position_embeddings
    assert (shape.num_layers, shape.ffn_size) == (
        wanted.num_hidden_layers,
        wanted.intermediate_size,
    )
    assert shape.vocab_size == wanted.vocab_size


@pytest.mark.parametrize("key", sorted(set(SIZES) - {"rms_norm_eps"}))
@pytest.mark.parametrize("found", [None, "4", -1, 0, True, [2], 10**26, 2.0])
def test_a_size_that_is_no_count_is_named(key, found):
    with pytest.raises(UserError, match=rf"config.json: {key} must be a .* \(got "):
        read_shape(config_of("qwen2", num_key_value_heads=2) | {key: found})


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rms_norm_eps": math.nan}, r"rms_norm_eps must be .* \(got nan\)"),
        ({"rms_norm_eps": math.inf}, r"rms_norm_eps must be .* \(got inf\)"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps must be .* \(got -1e-06\)"),
        ({"rms_norm_eps": "1e-6"}, "transformers refuses it .*rms_norm_eps"),
        ({"rms_norm_eps": None}, "transformers refuses it .*rms_norm_eps"),
        ({"rope_theta": 0}, r"rope_theta must be a finite number above 1 \(got 0\)"),
        ({"rope_theta": math.nan}, "rope_theta must be"),
        ({"rope_theta": -1e4}, "rope_theta must be"),
        ({"rope_theta": None}, "rope_theta must be"),
        ({"rope_theta": True}, "rope_theta must be"),
        ({"rope_theta": "10000"}, "rope_theta must be"),
        ({"rope_parameters": ROPE | {"factor": 0.0}}, "factor must be a finite number of at least"),
        ({"rope_parameters": ROPE | {"factor": math.nan}}, "factor must be a finite number"),
        ({"rope_parameters": ROPE | {"factor": math.inf}}, "factor must be a finite number"),
        ({"rope_scaling": {"type": "linear"}}, "transformers refuses it .*'factor'"),
        ({"rope_scaling": {"factor": 8.0}}, "factor 8.0 without a rope_type that reads it"),
        ({"rope_parameters": YARN | {"beta_fast": math.nan}}, "beta_fast must be"),
        ({"rope_parameters": YARN | {"attention_factor": -1.0}}, "attention_factor must be"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor 4.0 must be below",
        ),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple"),
        ({"head_dim": 0}, "head_dim must be a whole number"),
        ({"head_dim": 3}, r"head_dim must be even \(got 3\)"),
        ({"head_dim": 7}, "transformers refuses it .*even rotary dimension"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(keys, message):
    with pytest.raises(UserError, match=message) as told:
        read_shape(config_of("llama", **keys))
    assert "\n" not in str(told.value)


def test_two_keys_for_the_rope_mean_what_they_mean_to_transformers():
    new = {"rope_type": "linear", "factor": 2.0}
    config = config_of("llama", rope_scaling=new | {"rope_type": "dynamic"}, rope_parameters=new)
    with pytest.raises(UserError, match="rope type 'dynamic' is not supported"):
        read_shape(config)
    written_into = {"rope_theta"} & {*config["rope_scaling"], *new}
    assert not written_into, "exports copy the keys of config.json as they are"
    config = config_of("llama", rope_scaling=new | {"factor": 4.0}, rope_parameters=new)
    assert config_object(config).rope_parameters["factor"] == 4.0
    assert AutoConfig.for_model(**config).rope_parameters["factor"] == 4.0


def test_a_config_that_says_more_than_we_do_is_refused():
    for keys, message in (
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantization_config \(unnamed\)"),
        ({"compression_config": {"quant_method": "x"}}, r"quantization_config \(x\)"),
        (
            {"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "modeling_a.C"}},
            r"auto_map names code of its own for AutoModelForCausalLM \(modeling_a.C\)",
        ),
        ({"is_causal": False}, "is_causal: false"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config is not supported"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is not supported"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types: 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention without a sliding_window"),
    ):
        with pytest.raises(UserError, match=message):
            read_shape(config_of("qwen2", num_key_value_heads=2, **keys))


def test_every_layer_needs_a_type():
    config = config_of("qwen2", num_key_value_heads=2)
    read_shape(config | {"layer_types": ["full_attention"] * 2})
    with pytest.raises(UserError, match="layer_types has 3 entries for 2 layers|num_hidden_layers"):
        read_shape(config | {"layer_types": ["full_attention"] * 3})


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match=r"'gpt2' \(GPT2LMHeadModel\) is not supported: use one of"):
        read_shape({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize("kind", ["dynamic", "proportional", "su"])
@pytest.mark.parametrize(
    "write",
    [
        lambda kind: {"rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}},
        lambda kind: {"rope_scaling": {"rope_type": kind, "factor": 2.0}, "rope_theta": 1e4},
        lambda kind: {"rope_scaling": {"type": kind, "factor": 2.0}, "rope_theta": 1e4},
    ],
)
def test_an_unknown_rope_type_is_named_in_every_form(kind, write):
    with pytest.raises(UserError, match=f"rope type '{kind}' is not supported"):
        read_shape(config_of("llama", **write(kind)))


def test_a_rope_type_that_depends_on_the_batch_is_named():
    rope = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4}
    with pytest.raises(UserError, match="'longrope' is not supported: its frequencies depend on"):
        read_shape(config_of("llama", rope_scaling=rope | {"long_factor": [1.5] * 4}))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias: true"),
        ("llama", {"mlp_bias": True}, "mlp_bias: true"),
        ("qwen3", {"attention_bias": True}, "attention_bias: true"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (
            "qwen3",
            {"num_key_value_heads": 2, "rope_parameters": {"full_attention": {"factor": 2.0}}},
            "one set of numbers",
        ),
    ],
)
def test_parts_that_we_do_not_have_are_named(family, keys, message):
    with pytest.raises(UserError, match=message):
        read_shape(config_of(family, **keys))


@pytest.mark.parametrize(
    ("family", "keys", "window"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 100}, 100),
        ("qwen2", {"sliding_window": 100}, None),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 0}, 100),
        ("qwen3", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}, 100),
        ("qwen3", {"sliding_window": 100, "use_sliding_window": True}, None),  # from layer 28 on
        ("llama", {"sliding_window": 100, "use_sliding_window": True}, None),  # not read there
    ],
)
def test_a_window_shorter_than_the_rows_is_refused(tmp_path, family, keys, window):
    hf_config = config_of(family, num_key_value_heads=2, **keys)
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    lengths = {"max_prompt_tokens": 10, "max_row_tokens": 101}
    config = make_config(PPO, data=lengths, rollout={"max_new_tokens": 10})
    if window is None:
        check_shape(config, tmp_path)
        return
    with pytest.raises(UserError, match="sliding_window of 100 tokens is shorter .* = 101"):
        check_shape(config, tmp_path)
    lengths["max_row_tokens"] = 100
    check_shape(make_config(PPO, data=lengths, rollout={"max_new_tokens": 10}), tmp_path)
