"""One Slurm for all tests of this folder, and one folder of models, data and undisturbed runs."""

from __future__ import annotations

import pytest

from tests.distributed.runs import make_models, write_config
from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(f"no real Slurm: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_models(folder)
    write_config(folder, "ppo")
    write_config(folder, "prm")
    return folder
