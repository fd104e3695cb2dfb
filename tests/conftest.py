"""Settings of all tests."""

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# How long an example takes says something about the machine, not about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SLURM = "tests/slurm/"


class FilesTogether(LoadScopeScheduling):
    """For several workers: one runs all tests of a file, which share models and runs.

    All of Slurm's are one worker's too: they share a cluster.
    """

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(SLURM) else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> FilesTogether:
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's come first: they take longest and mostly wait."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))
