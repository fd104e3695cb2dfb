"""The DeepSpeed configuration of a role: the user's JSON with its 'auto' values filled in.

One JSON serves all roles. Micro-batches and loss scaling are ours, so DeepSpeed always sees one
micro-batch of one row a step: with ``gradient_accumulation_steps`` above 1 it would divide the
gradients again at every stage's output.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from megatron_amrlhf.config.deepspeed_models import section_problems
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded, why_no_file

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "configs/deepspeed/zero3.json"  # right, as a test says
ZERO_STAGE = 3
# Derived from the run's YAML, so the JSON may only say "auto" (or the same value).
_ONE = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OURS = {
    "optimizer": "the optimizer comes from the run's YAML (optimizer.lr, optimizer.betas, ...)",
    "scheduler": "the schedule comes from the run's YAML (optimizer.schedule, .warmup_steps)",
    "fp16": "fp16 is not supported, use model.dtype: bfloat16 or float32",
    "amp": "amp is not supported, use model.dtype: bfloat16 or float32",
}


def resolve_deepspeed(
    config: Config, data_parallel_size: int | None, role: str, trainable: bool
) -> dict[str, Any]:
    """Fills in a role's DeepSpeed configuration.

    Args:
        config: the run; ``config.engine.deepspeed`` names the JSON file, relative to the working
            directory or else to the repository.
        data_parallel_size: number of replicas of a stage (DP); None: not known, for a check.
        role: the role's name, whose offloading ``config.engine.roles`` gives.
        trainable: False for a frozen role (reference, reward model), which gets no optimizer
            settings: no gradient clipping and no optimizer offload.

    Returns:
        A new dict without any "auto", ready for ``deepspeed.initialize(config=...)``.

    Raises:
        UserError: the file is missing or malformed, or sets what the engine cannot honour.
    """
    path, template = read_deepspeed(config.engine.deepspeed)
    problems = _problems(template, config, data_parallel_size, config.dtype_of(role))
    if path.resolve() != SHIPPED:
        problems += section_problems(template)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    resolved = copy.deepcopy(template)
    resolved |= {
        "train_batch_size": data_parallel_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the engine clips, by a norm that counts right
    }
    bf16 = resolved.setdefault("bf16", {})
    bf16["enabled"] = config.dtype_of(role) == "bfloat16"
    for key in _OURS:
        resolved.pop(key, None)  # only a disabled section gets here
    zero, section = resolved["zero_optimization"], config.engine.of_role(role)
    for key, device in (
        ("offload_param", section.offload_parameters),
        ("offload_optimizer", section.offload_optimizer),
    ):
        if device != "none":  # files are the host's memory to DeepSpeed (engine/disk.py)
            zero[key] = (zero.get(key) or {}) | {"device": "cpu"}
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        # torch's AdamW steps on the CPU too, without a compiled op.
        resolved["zero_force_ds_cpu_optimizer"] = False
    if not trainable:
        zero.pop("offload_optimizer", None)
    _refuse_left_auto(resolved, path)
    return resolved


def read_deepspeed(name: str) -> tuple[Path, dict[str, Any]]:
    """Finds and parses the DeepSpeed JSON.

    Returns:
        The file's path and its content, "auto" values still in it.

    Raises:
        UserError: no such file, or it is not a JSON object.
    """
    given = expanded(name)
    path = next((each for each in (given, REPOSITORY / given) if each.is_file()), None)
    if path is None:
        raise UserError(
            f"engine.deepspeed: {name}: {why_no_file(given)}, here or in {REPOSITORY} "
            "(the default is configs/deepspeed/zero3.json)"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: malformed JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return path, content


def _problems(
    template: dict[str, Any], config: Config, data_parallel_size: int | None, dtype: str
) -> list[str]:
    problems = []
    for key in _ONE:
        if template.get(key, "auto") not in ("auto", 1):
            problems.append(
                f'{key} must be 1 or "auto" (got {template[key]!r}): '
                "micro-batches are engine.micro_batch_size in the run's YAML"
            )
    derived = {"gradient_clipping": (config.optimizer.max_grad_norm, "optimizer.max_grad_norm")}
    if data_parallel_size is not None:
        derived["train_batch_size"] = (data_parallel_size, "the data-parallel size")
    for key, (value, source) in derived.items():
        if template.get(key, "auto") not in ("auto", value):
            problems.append(f'{key} must be "auto" or {value} ({source}), got {template[key]!r}')
    for key, reason in _OURS.items():
        section = template.get(key)
        disabled = isinstance(section, dict) and section.get("enabled") is False
        if section is not None and not disabled:
            problems.append(f"remove {key}: {reason}")
    zero = template.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("stage") != ZERO_STAGE:
        problems.append(
            f"zero_optimization.stage must be {ZERO_STAGE} (got {zero.get('stage')!r}): other "
            "stages are engine.zero_stage in the run's YAML and need no JSON"
        )
    for key, ours in (
        ("offload_param", "offload_parameters"),
        ("offload_optimizer", "offload_optimizer"),
    ):
        section = zero.get(key)
        if isinstance(section, dict) and section.get("device") == "nvme":
            problems.append(f"remove zero_optimization.{key}: nvme is engine.roles.ROLE.{ours}")
    bf16 = template.get("bf16", {})
    if not isinstance(bf16, dict):
        problems.append(f"bf16 must be an object (got {bf16!r})")
    elif dtype != "auto" and bf16.get("enabled", "auto") is (dtype != "bfloat16"):
        problems.append(f'bf16.enabled contradicts model.dtype: {dtype}, set it to "auto"')
    return problems


def _refuse_left_auto(node: Any, path: Path, key: str = "") -> None:
    """Refuses "auto" where this package derives nothing, rather than handing it on."""
    if node == "auto":
        raise UserError(f'{path}: {key}: "auto" is not derived for this key, give a value')
    if isinstance(node, dict):
        for name, value in node.items():
            _refuse_left_auto(value, path, f"{key}.{name}" if key else name)
