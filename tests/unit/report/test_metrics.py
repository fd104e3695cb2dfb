"""metrics.jsonl is strict JSON, appended, and cut where a resumed run goes on."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.report.files import append_jsonl, read_jsonl, truncate_jsonl
from megatron_amrlhf.report.metrics import MetricsWriter
from megatron_amrlhf.report.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, 1, True)


def strict_lines(path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_each_step_is_on_disk_at_once_as_strict_json(folder):
    writer = MetricsWriter(folder)
    writer.write(1, {"loss/policy": float("nan"), "engine/skipped_steps": 1, "kl/ref_nats": None})
    line = strict_lines(folder.metrics)[0]
    assert line["step"] == 1 and line["time"]
    assert line["loss/policy"] is None and line["kl/ref_nats"] is None
    assert line["engine/skipped_steps"] == 1 and isinstance(line["engine/skipped_steps"], int)
    writer.close()


def test_tensorboard_has_the_finite_values(folder):
    writer = MetricsWriter(folder)
    writer.write(1, {"loss/policy": 0.5, "reward/mean": float("inf")})
    writer.write(2, {"loss/policy": 0.25, "reward/mean": 2.0})
    writer.close()
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/policy")] == [(1, 0.5), (2, 0.25)]
    assert [e.step for e in events.Scalars("reward/mean")] == [2]


def test_a_resumed_run_forgets_later_steps(folder):
    first = MetricsWriter(folder)
    for step in (1, 2, 3):
        first.write(step, {"loss/policy": float(step)})
    first.close()
    second = MetricsWriter(folder)
    second.truncate_after(1)
    second.write(2, {"loss/policy": 20.0})
    second.close()
    values = [(line["step"], line["loss/policy"]) for line in strict_lines(folder.metrics)]
    assert values == [(1, 1.0), (2, 20.0)]
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/policy")] == [(1, 1.0), (2, 20.0)]


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(RunFolder(tmp_path, 0, False))
    writer.truncate_after(0)
    writer.write(1, {"loss/policy": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 1}, {"step": 2}])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    truncate_jsonl(path, 5)
    append_jsonl(path, [{"step": 3, "text": "\u2028 \u4e2d"}])
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]


def test_truncating_a_missing_file_is_nothing(tmp_path):
    truncate_jsonl(tmp_path / "none.jsonl", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
