"""metrics.jsonl is strict JSON, appended, and cut where a resumed run goes on."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.report.files import append_jsonl, read_jsonl, truncate_jsonl
from megatron_amrlhf.report.metrics import MetricsWriter
from megatron_amrlhf.run.folder import RunFolder


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


SOUND = b'{"step": 1, "loss/policy": 1.0}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (bytes(4096), "not valid JSON"),
        (bytes(4096) + SOUND, "not valid JSON"),
        (b'{"step": 2, "text": "\xff\xfe"}', "bytes that are no UTF-8"),
        (b'{"loss/policy": 1.0}', "step: Field required"),
        (b'{"step": "2"}', "step: "),
        (b'{"step": 2.5}', "step: "),
        (b'{"step": true}', "step: "),
        (b'{"step": null}', "step: "),
        (b'{"step": -5}', "step: "),
        (b'{"step": 1' + b"0" * 25 + b"}", "out of range"),
        (b'{"step": 2, "step": 3}', "given twice"),
        (b'{"step": 2, "loss/policy": NaN}', "NaN"),
        (b'{"step": 2, "loss/policy": 1e999}', "out of range"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "valid dictionary"),
        (b"7", "valid dictionary"),
        (b'{"step": 2}{"step": 3}', "not valid JSON"),
    ],
)
def test_a_damaged_line_is_left_out_and_told(tmp_path, capsys, line, words):
    path = tmp_path / "metrics.jsonl"
    later = b'{"step": 4}'
    before = b"\n".join([SOUND, line, b"", b'{"step": 3}', later, b'{"cut'])
    path.write_bytes(before)
    assert [x["step"] for x in read_jsonl(path)] == [1, 3, 4]
    truncate_jsonl(path, 3)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "left out: line 2: " in told and words in told
    assert path.read_bytes() == SOUND + b'\n{"step": 3}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    truncate_jsonl(path, 3)
    assert capsys.readouterr().err == ""


def test_sound_lines_stay_as_they_are_byte_by_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = b'{"step":1,"a":1e-5,"b":0.10}\n{"step": 2, "text": "\xe4\xbd\xa0"}\r\n'
    path.write_bytes(lines)
    truncate_jsonl(path, 2)
    assert path.read_bytes() == lines


def test_many_damaged_lines_are_counted(tmp_path, capsys):
    (tmp_path / "m").write_bytes(b"x\n" * 12)
    truncate_jsonl(tmp_path / "m", 2)
    assert "and 7 more lines" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "link to a device"])
def test_what_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if kind == "folder" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="metrics.jsonl: is .*; move it away"):
        truncate_jsonl(path, 2)


def test_a_linked_file_becomes_the_runs_own(tmp_path):
    """Its lines are gone on from, and what it was a link to stays."""
    other, path = tmp_path / "other.jsonl", tmp_path / "metrics.jsonl"
    other.write_bytes(SOUND + b'\n{"step": 2}\n')
    path.symlink_to(other)
    truncate_jsonl(path, 1)
    append_jsonl(path, [{"step": 2}])
    assert path.read_bytes() == SOUND + b'\n{"step": 2}\n' and not path.is_symlink()
    path.unlink()
    path.symlink_to("nowhere")
    truncate_jsonl(path, 1)
    assert path.read_bytes() == b""
