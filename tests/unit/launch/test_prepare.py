"""What is done before any process of a run is started."""

import yaml

from megatron_amrlhf.launching import prepare
from megatron_amrlhf.report.run_folder import RunFolder
from tests.unit.config.samples import PPO, make_config


def test_a_refused_start_leaves_another_runs_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "check_files", lambda config: None)
    config = make_config(PPO, run={"folder": str(tmp_path)})
    folder = RunFolder.create(config, rank=0)
    folder.stop.touch()
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    other = make_config(PPO, run={"folder": str(tmp_path)}, model={"path": "other"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(other.model_dump(mode="json")))
    assert prepare.main(["--", "train", str(tmp_path / "run.yaml")]) == 2
    assert "choose another run.name" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before
