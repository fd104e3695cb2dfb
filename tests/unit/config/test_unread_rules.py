"""A key that nothing reads is refused, the same key passes where something does."""

import pytest

from megatron_amrlhf.config.checks import check_run
from megatron_amrlhf.errors import UserError
from tests.unit.config.samples import OFFLINE, PPO, make_config

OFFLINE_FILE = {"threshold": "offline", "offline_file": "statistics.json"}
# (key, sections with the key set, sections with which it is read)
CASES = [
    ("mask.fixed_value", {"mask": {"fixed_value": 0.5}}, {"mask": {"threshold": "fixed"}}),
    (
        "mask.running_decay",
        {"mask": {"running_decay": 0.5}, "reward": {"normalise": "none"}},
        {"mask": {"threshold": "running"}},
    ),
    (
        "mask.offline_statistic",
        {"mask": {"offline_statistic": "median"}, "reward": {"normalise": "none"}},
        {"mask": OFFLINE_FILE},
    ),
    (
        "mask.offline_quantile",
        {"mask": {"offline_quantile": 0.2}, "reward": {"normalise": "none"}},
        {"mask": OFFLINE_FILE | {"offline_statistic": "quantile"}},
    ),
    ("mask.label", {"mask": {"label": "batch"}}, {"algorithm": {"kind": "kto"}}),
    (
        "loss.denominator",
        {"loss": {"denominator": "kept"}},
        {"algorithm": {"kind": "rejection_sampling"}},
    ),
    ("reward.placement", {"reward": {"placement": "spread"}}, {"algorithm": {"kind": "ppo"}}),
    (
        "reward.step_boundary",
        {"reward": {"step_boundary": "sentence"}},
        {"reward": {"granularity": "step"}},
    ),
    (
        "reward.step_boundary",
        {"reward": {"step_boundary": "sentence"}},
        {"reward": {"outcome": "min"}},
    ),
    ("optimizer.critic_lr", {"optimizer": {"critic_lr": 1e-5}}, {"algorithm": {"kind": "ppo"}}),
    (
        "rollout.truncated_penalty",
        {"rollout": {"truncated_penalty": 2.0}},
        {"rollout": {"truncated": "penalise"}},
    ),
    (
        "algorithm.bootstrap_truncated",
        {
            "algorithm": {"kind": "ppo", "bootstrap_truncated": True},
            "rollout": {"truncated": "mask"},
        },
        {"rollout": {"truncated": "penalise"}},
    ),
]


def merged(*parts: dict) -> dict:
    """Sections of several dictionaries, key by key."""
    whole: dict = {}
    for part in parts:
        for section, keys in part.items():
            whole[section] = whole.get(section, {}) | keys
    return whole


@pytest.mark.parametrize(("key", "sections", "read_with"), CASES)
def test_a_key_that_nothing_reads_is_refused(key, sections, read_with):
    unread = merged({"algorithm": {"kind": "dpo"}}, sections)
    with pytest.raises(UserError, match=f"^{key}: is read by [^;]* only [^;]*$"):
        check_run(make_config(PPO, **unread), 1)
    check_run(make_config(PPO, **merged(unread, read_with)), 1)
    check_run(make_config(PPO, algorithm={"kind": "dpo"}), 1)  # left out


@pytest.mark.parametrize(
    ("base", "sections", "key"),
    [
        (
            OFFLINE,
            {"rollout": {"reference_samples_per_prompt": 1}},
            "rollout.reference_samples_per_prompt",
        ),
        (OFFLINE, {"rollout": {"truncated": "mask"}}, "rollout.truncated"),
        (PPO, {"reward": {"prm_weight": 0, "orm_weight": 1, "outcome": "min"}}, "reward.outcome"),
        (
            PPO,
            {
                "reward": {"prm_weight": 0, "orm_weight": 1},
                "reward_model": {"attribute_weights": (1.0,)},
            },
            "reward_model.attribute_weights",
        ),
        (
            PPO,
            {"algorithm": {"kind": "kto", "desirable_weight": 0, "undesirable_weight": 0}},
            "algorithm.desirable_weight, algorithm.undesirable_weight",
        ),
        (OFFLINE, {"reward": {"outcome": "min"}, "reward_model": {"path": None}}, "reward.outcome"),
    ],
)
def test_what_would_do_nothing_is_refused(base, sections, key):
    if "reward" in sections and "orm_weight" in sections["reward"]:
        models = {"path": None, "orm_path": "orm"} | sections.get("reward_model", {})
        sections = sections | {"reward_model": models}
    with pytest.raises(UserError, match=f"^{key}: "):
        check_run(make_config(base, **sections), 1)
