"""The DeepSpeed configuration: derived values filled in, harmful ones refused."""

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from megatron_amrlhf.config.deepspeed import REPOSITORY, resolve_deepspeed
from megatron_amrlhf.config.deepspeed_keys import BF16, OFFLOADS, ZERO
from megatron_amrlhf.errors import UserError
from tests.unit.config.samples import PPO, make_config

SHIPPED = json.loads((REPOSITORY / "configs/deepspeed/zero3.json").read_text())


def resolve_json(tmp_path, content, dtype="bfloat16", trainable=True):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = make_config(PPO, engine={"deepspeed": str(path)}, model={"dtype": dtype})
    return resolve_deepspeed(config, 4, "actor", trainable)


def test_the_shipped_file_resolves_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"dtype": "bfloat16"}
    config = make_config(PPO, model=model, optimizer={"max_grad_norm": 0.5})
    resolved = resolve_deepspeed(config, 4, "actor", trainable=True)
    assert resolved["train_batch_size"] == 4
    assert resolved["train_micro_batch_size_per_gpu"] == 1
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(resolved)


def test_deepspeed_accepts_the_shipped_file_without_unknown_zero_keys():
    config = make_config(PPO, model={"dtype": "bfloat16"})
    resolved = resolve_deepspeed(config, 1, "actor", trainable=True)
    parsed = DeepSpeedConfig(resolved)
    assert parsed.zero_config.stage == 3
    assert parsed.zero_config.param_persistence_threshold == 0
    assert parsed.zero_config.prefetch_bucket_size == 0
    assert parsed.gradient_clipping == 0.0
    assert parsed.bfloat16_config.enabled
    known = type(parsed.zero_config).model_fields
    names = set(known) | {field.alias for field in known.values() if field.alias}
    assert set(SHIPPED["zero_optimization"]) <= names


@pytest.mark.parametrize(
    ("known", "model"),
    [
        (ZERO, DeepSpeedZeroConfig),
        (BF16, DeepSpeedBF16Config),
        (OFFLOADS["offload_param"], DeepSpeedZeroOffloadParamConfig),
        (OFFLOADS["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
    ],
)
def test_the_known_keys_are_deepspeeds(known, model):
    fields = model.model_fields
    names = {field.alias or name: field.annotation for name, field in fields.items()}
    assert set(known.all) == set(names)
    assert {key for key in names if names[key] in (bool, bool | None)} == set(known.flags)
    assert {key for key in names if names[key] is int} == set(known.counts)
    assert {key for key in names if names[key] is float} == set(known.shares)


def test_float32_switches_bf16_off(tmp_path):
    assert resolve_json(tmp_path, SHIPPED, dtype="float32")["bf16"]["enabled"] is False


def test_frozen_roles_get_no_optimizer_settings(tmp_path):
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    content = SHIPPED | {"zero_optimization": SHIPPED["zero_optimization"] | offload}
    frozen = resolve_json(tmp_path, content, trainable=False)
    assert "optimizer" not in frozen
    assert "offload_optimizer" not in frozen["zero_optimization"]
    assert frozen["zero_optimization"]["offload_param"] == {"device": "cpu"}
    trained = resolve_json(tmp_path, content)
    assert trained["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"gradient_accumulation_steps": 4},
            'gradient_accumulation_steps must be 1 or "auto" (got 4)',
        ),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu must be 1"),
        ({"train_batch_size": 32}, 'train_batch_size must be "auto" or 4'),
        ({"gradient_clipping": 0.3}, "optimizer.max_grad_norm"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage must be 3 (got 2)"),
        ({"zero_optimization": None}, "zero_optimization.stage must be 3 (got None)"),
        ({"fp16": {"enabled": True}}, "remove fp16"),
        ({"fp16": {}}, "remove fp16"),
        ({"optimizer": {"type": "AdamW"}}, "remove optimizer"),
        ({"bf16": {"enabled": False}}, "bf16.enabled contradicts model.dtype: bfloat16"),
        ({"bf16": True}, "bf16 must be an object"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size: "auto" is not derived',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "remove zero_optimization.offload_param: nvme is engine.roles.ROLE.offload_parameters",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
            'zero_optimization.offload_param must be an object such as {"device": "cpu"} '
            "(got 'cpu')",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": None}},
            "zero_optimization.offload_param must be an object",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            'zero_optimization.offload_param.device must be "none" or "cpu" (got \'gpu\')',
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "cpu", "pinmemory": True},
                }
            },
            "zero_optimization.offload_param.pinmemory: unknown key, did you mean pin_memory?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 2}}},
            "zero_optimization.offload_optimizer.ratio must be a number from 0 to 1 (got 2)",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable: unknown key, did you mean enabled?"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled must be true or false (got 1)"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
            "zero_optimization.stage3_max_live_parameter: unknown key, did you mean "
            "stage3_max_live_parameters?",
        ),
        (
            {"zero_optimization": {"stage": 3, "overlap_comm": "no"}},
            "zero_optimization.overlap_comm must be true or false (got 'no')",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": 0.5}},
            "zero_optimization.reduce_bucket_size must be a whole number (got 0.5)",
        ),
    ],
)
def test_what_the_engine_cannot_honour_is_refused(tmp_path, change, expected):
    with pytest.raises(UserError, match="ds.json") as caught:
        resolve_json(tmp_path, SHIPPED | change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_values_equal_to_the_derived_ones_are_accepted(tmp_path):
    change = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "fp16": {"enabled": False}}
    resolved = resolve_json(tmp_path, SHIPPED | change)
    assert "fp16" not in resolved


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n "a": }', "line 2: malformed JSON"),
        ("[1]", "must hold a JSON object"),
        ("[" * 100_000, "malformed JSON"),
    ],
)
def test_malformed_json_names_file_and_line(tmp_path, content, expected):
    with pytest.raises(UserError) as caught:
        resolve_json(tmp_path, content)
    assert expected in str(caught.value) and "ds.json" in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="engine.deepspeed: nowhere.json: no such file"):
        resolve_deepspeed(make_config(PPO, engine={"deepspeed": "nowhere.json"}), 1, "actor", True)
