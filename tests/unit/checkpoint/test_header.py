"""state.json: a value that no run can have saved is named, whatever the file's hash says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_amrlhf.checkpoint.header import check_layout, read_header
from megatron_amrlhf.errors import UserError

LAYOUT = {"tensor": 2, "pipeline": 1, "data": 1, "virtual_stages": 1}
HEADER = {
    "format": 2,
    "step": 7,
    "layout": LAYOUT | {"first_stage_layers": None, "last_stage_layers": None},
    "roles": {
        "actor": {
            "dtype": "float32",
            "model": {"num_layers": 4, "head_outputs": None},
            "optimizer_step": 7.0,
            "schedule": {"last_epoch": 7, "step_count": 8, "lr": [0.1]},
            "deepspeed": {"global_steps": 7},
        }
    },
    "engine": {"skipped_steps": 0, "in_a_row": {}},
    "state": {"anything": float("nan")},
}
FILES = {"state.json", "actor-tp00-pp00-dp0000.safetensors", "actor-tp01-pp00-dp0000.safetensors"}


def write(folder: Path, header) -> Path:
    place = folder / "step-7"
    place.mkdir()
    (place / "state.json").write_text(json.dumps(header))
    return place


def changed(key: str, value):
    """The header with one value, by its dotted key, another one; None at the end: without it."""
    header = json.loads(json.dumps(HEADER))
    *parents, last = key.split(".")
    node = header
    for parent in parents:
        node = node[parent]
    node[last] = value
    return header


def test_a_sound_header_is_read_as_it_was_written(tmp_path):
    header = read_header(write(tmp_path, HEADER))
    role = HEADER["roles"]["actor"]
    assert header.roles["actor"].counters() == {
        key: role[key] for key in ("optimizer_step", "schedule", "deepspeed")
    }
    assert header.engine.model_dump() == HEADER["engine"]
    assert header.saved_layout.as_json() == HEADER["layout"] and header.step == 7
    check_layout(tmp_path, header, 4, FILES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -5),
        ("step", 7.5),
        ("step", "7"),
        ("step", None),
        ("step", True),
        ("layout", []),
        ("layout.data", 0),
        ("layout.data", 10**9),
        ("layout.tensor", -1),
        ("layout.virtual_stages", 0),
        ("layout.first_stage_layers", -1),
        ("roles", {}),
        ("roles", ["actor"]),
        ("roles.actor", None),
        ("roles.actor.dtype", "float64"),
        ("roles.actor.model", None),
        ("roles.actor.model.head_outputs", 0),
        ("roles.actor.model.head_outputs", "1"),
        ("roles.actor.optimizer_step", -1.0),
        ("roles.actor.optimizer_step", 0.5),
        ("roles.actor.optimizer_step", float("nan")),
        ("roles.actor.optimizer_step", 1e300),
        ("roles.actor.schedule", {}),
        ("roles.actor.schedule.last_epoch", -1),
        ("roles.actor.schedule.step_count", "8"),
        ("roles.actor.schedule.lr", 0.1),
        ("roles.actor.schedule.lr", [float("inf")]),
        ("roles.actor.deepspeed", {"optimizer": 3}),
        ("roles.actor.deepspeed", {"global_steps": -3}),
        ("engine", {}),
        ("engine.skipped_steps", -1),
        ("engine.in_a_row", {"actor": None}),
        ("state", []),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path, key, value):
    place = write(tmp_path, changed(key, value))
    with pytest.raises(UserError, match=r"step-7/state.json is damaged: ") as caught:
        read_header(place)
    assert key.split(".")[-1] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", bytes(99), b"\xff", b"[" * 100_000, b"[]", b"null", b"{}"])
def test_what_is_no_header_is_damaged(tmp_path, text):
    place = write(tmp_path, HEADER)
    (place / "state.json").write_bytes(text)
    with pytest.raises(UserError, match="state.json is damaged"):
        read_header(place)


def test_a_header_of_another_step_or_format_is_told(tmp_path):
    place = write(tmp_path, changed("step", 9))
    with pytest.raises(UserError, match="is of step 9"):
        read_header(place)
    (place / "state.json").write_text(json.dumps(changed("format", 3)))
    with pytest.raises(UserError, match="has format 3, this version reads 2"):
        read_header(place)
    (place / "state.json").unlink()
    with pytest.raises(UserError, match="state.json is missing"):
        read_header(place)
    (place / "state.json").mkdir()
    with pytest.raises(UserError, match="state.json is damaged: is a folder"):
        read_header(place)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": 1 << 20}, "has 2097152 parts, the manifest 2"),
        ({"virtual_stages": 3}, "none of 4 layers"),
        ({"tensor": 1, "pipeline": 2, "first_stage_layers": 9}, "none of 4 layers"),
    ],
)
def test_a_layout_that_the_files_are_not_of_is_told(tmp_path, change, words):
    """Before a list of so many names is made."""
    header = read_header(write(tmp_path, HEADER | {"layout": HEADER["layout"] | change}))
    with pytest.raises(UserError, match=words):
        check_layout(tmp_path, header, 4, FILES)
