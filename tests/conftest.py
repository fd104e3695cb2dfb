"""Settings of all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says something about the machine, not about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For several workers (``-n``): a file's tests stay together, all of Slurm's come first.

    Files share models and runs among their tests; Slurm's share one cluster and mostly wait.
    """
    items.sort(key=lambda item: not is_slurms(item.path))
    for item in items:
        group = "slurm" if is_slurms(item.path) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def is_slurms(file: Path) -> bool:
    return file.parent.name == "slurm"
