"""Families: what is refused, and that our table agrees with transformers."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.families import FAMILIES
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
    wanted, shape = AutoConfig.for_model(family, **SIZES), read_shape(config_of(family))
    assert AutoModelForCausalLM._model_mapping[type(wanted)].__name__ == (
        FAMILIES[family].architecture
    )
    heads = wanted.num_attention_heads
    assert shape.num_kv_heads == wanted.num_key_value_heads
    assert shape.head_dim == (getattr(wanted, "head_dim", None) or wanted.hidden_size // heads)
    assert shape.window == wanted.sliding_window if family != "llama" else shape.window is None
    assert shape.tied == wanted.tie_word_embeddings


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("found", [None, "4", -1, True, [2]])
def test_a_size_that_is_missing_or_no_count_is_named(key, found):
    config = config_of("qwen2") | {key: found}
    with pytest.raises(UserError, match=rf"config.json: {key} must be a .* \(got "):
        read_shape(config)
    del config[key]
    with pytest.raises(UserError, match=rf"{key} must be .* \(got None\)"):
        read_shape(config)


def test_every_layer_needs_a_type():
    read_shape(config_of("qwen2", layer_types=["full_attention"] * 2))
    with pytest.raises(UserError, match="layer_types has 3 entries for 2 layers"):
        read_shape(config_of("qwen2", layer_types=["full_attention"] * 3))


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match=r"'gpt2' \(GPT2LMHeadModel\) is not supported: use one of"):
        read_shape({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "su"])
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
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
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
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, 100),
        ("qwen3", {"sliding_window": 100, "use_sliding_window": True}, 100),
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
