"""What an algorithm's section tells everyone else."""

import pytest

from megatron_amrlhf.algorithms.contract import Algorithm
from megatron_amrlhf.commands.train import ALGORITHMS
from megatron_amrlhf.config.algorithms import algorithm_models, kinds_that
from tests.unit.config.samples import make_config

KINDS = list(algorithm_models())


def config_of(kind: str, **algorithm):
    return make_config(algorithm={"kind": kind, **algorithm})


def test_every_kind_of_the_configuration_has_its_algorithm():
    assert set(ALGORITHMS) == set(KINDS)
    methods = [x for x, value in vars(Algorithm).items() if callable(value) and x[0] != "_"]
    assert {"build", "step", "evaluate"} < set(methods)
    for algorithm in ALGORITHMS.values():
        assert [name for name in methods if not hasattr(algorithm, name)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_of_models_that_the_run_has(kind):
    config = config_of(kind)
    roles = config.algorithm.roles(config)
    names = {role.name for role in roles} | set(config.reward_folders)
    passes = list(config.algorithm.passes(config, 2))
    assert {each.role for each in passes} == names
    updated = {each.role for each in passes if each.phase == "update"}
    assert updated == {role.name for role in roles if role.trainable}
    assert all(each.rows > 0 and each.rows % each.together == 0 for each in passes)
    times = {each.times for each in passes if each.phase == "update"}
    assert times == {config.algorithm.updates_per_step}


def test_roles_by_hand():
    def roles(kind: str, **algorithm) -> list[tuple]:
        config = config_of(kind, **algorithm)
        found = config.algorithm.roles(config)
        return [(role.name, role.trainable, role.head_outputs) for role in found]

    assert roles("prm", num_attributes=5) == [("prm", True, 5)]
    assert roles("orm") == [("orm", True, 1)]
    policy = [("actor", True, None), ("reference", False, None)]
    assert roles("grpo") == roles("dpo") == roles("kto") == roles("rejection_sampling") == policy
    assert roles("ppo") == [policy[0], ("critic", True, 1), policy[1]]


def test_kinds_are_named_by_what_they_do():
    assert kinds_that("labels_answers") == "ppo, grpo or kto"
    assert kinds_that("counts_tokens") == "ppo, grpo or rejection_sampling"
    assert kinds_that("has_critic") == "ppo"
