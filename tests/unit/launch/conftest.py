"""A run's configuration that the launch scripts take without a model."""

from pathlib import Path

import pytest

CONFIG = """\
run: {{name: demo, folder: {folder}}}
model: {{path: some/model}}
algorithm: {{kind: prm}}
data: {{train: {folder}/steps.jsonl, format: steps}}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    """``run.yaml`` in the test's folder; the run's folder is ``demo`` beside it."""
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "steps.jsonl").touch()
    return tmp_path / "run.yaml"
