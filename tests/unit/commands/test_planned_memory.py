"""The memory line of a run's log: no algorithm's passes can end a run by it."""

from types import SimpleNamespace

from megatron_amrlhf.commands.planned_memory import memory_line
from megatron_amrlhf.config.algorithms import RejectionSamplingAlgorithm
from tests.unit.config.samples import make_config


def test_passes_that_cannot_be_planned_are_told_and_end_nothing(monkeypatch):
    def fail(section, config, replicas):
        raise KeyError("of a role that nobody has")

    monkeypatch.setattr(RejectionSamplingAlgorithm, "passes", fail)
    context = SimpleNamespace(
        config=make_config(algorithm={"kind": "rejection_sampling"}),
        mesh=SimpleNamespace(dp_size=1),
        engine=SimpleNamespace(roles={}),
    )
    line = memory_line(context, 1.5)
    assert line.startswith("memory: measured peak 1.5 GiB, not planned (KeyError: ")
    assert "of a role that nobody has" in line
