"""The DeepSpeed configuration: derived values filled in, harmful ones refused."""

import json
import subprocess
import sys

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from megatron_amrlhf.config.deepspeed import REPOSITORY, resolve_deepspeed
from megatron_amrlhf.config.deepspeed_models import section_problems
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


def test_deepspeeds_models_find_the_shipped_file_right():
    """So that it is not judged again at every start, which would import DeepSpeed."""
    assert section_problems(SHIPPED) == []


def test_the_shipped_file_is_read_without_deepspeed():
    program = (
        "import sys; from megatron_amrlhf.config.deepspeed import resolve_deepspeed\n"
        "from tests.unit.config.samples import PPO, make_config\n"
        "resolve_deepspeed(make_config(PPO), 1, 'actor', True)\n"
        "print('deepspeed' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


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
            "zero_optimization.offload_param: must be a section of keys (got 'cpu')",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}},
            "zero_optimization.offload_param.device: must be 'none', 'cpu' or 'nvme' (got 'gpu')",
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
            "zero_optimization.offload_optimizer.ratio: must be <= 1 (got 2)",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable: unknown key, did you mean enabled?"),
        ({"bf16": {"enabled": 2}}, "bf16.enabled: must be true or false (got 2)"),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
            "zero_optimization.stage3_max_live_parameter: unknown key, did you mean "
            "stage3_max_live_parameters?",
        ),
        (
            {"zero_optimization": {"stage": 3, "overlap_comm": "maybe"}},
            "zero_optimization.overlap_comm: must be true or false (got 'maybe')",
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": 0.5}},
            "zero_optimization.reduce_bucket_size: must be a whole number (got 0.5)",
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload": True}},
            "zero_optimization.cpu_offload: is deprecated, use offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
            "zero_optimization: Value error, compute_grad_norm=false is supported only with",
        ),
    ],
)
def test_what_the_engine_cannot_honour_is_refused(tmp_path, change, expected):
    with pytest.raises(UserError, match="ds.json") as caught:
        resolve_json(tmp_path, SHIPPED | change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_deepspeed_takes_is_taken(tmp_path):
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5e8,
        "overlap_comm": "no",
        "offload_param": None,
        "leaf_module": {"classes": ["X"]},
    }
    resolved = resolve_json(tmp_path, SHIPPED | {"zero_optimization": zero})
    parsed = DeepSpeedConfig(resolved | {"train_batch_size": 1}).zero_config
    assert parsed.reduce_bucket_size == 500_000_000 and parsed.overlap_comm is False


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
