"""The doctor on real gloo ranks: planted faults are named, and every rank ends with one code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_amrlhf.ports import free_port
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted_doctor"
WORLD_SIZE = 4
# What ranks that never come cost; the others have to import torch meanwhile, on a busy machine.
MISSING_SECONDS, STUCK_SECONDS = 20, 40


def start(
    folder: Path, rank: int, port: int, plant: str, plant_rank: int, seconds: float
) -> subprocess.Popen:
    """A rank of the job; rank 3 in a folder of its own if that is the plant."""
    variables = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": WORLD_SIZE}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    variables |= {"PLANT": plant, "PLANT_RANK": plant_rank, "PYTHONPATH": f"{PLANTED}:{ROOT}"}
    variables |= {"AMRLHF_HOSTS": "node1,node2", "TORCH_EXTENSIONS_DIR": folder}
    place = folder / ("elsewhere" if plant == "blind" and rank == plant_rank else "here")
    place.mkdir(exist_ok=True)
    options = ["--timeout", str(seconds), "--json", str(folder / "doctor.json")]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_amrlhf", "doctor", *options],
        cwd=place,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def examine(
    folder: Path,
    plant: str = "",
    plant_rank: int = -1,
    ranks: int = WORLD_SIZE,
    seconds: float = PATIENCE_SECONDS,
):
    """Exit codes and outputs of the ranks, and findings by check without the healthy ones."""
    port = free_port()
    processes = [start(folder, rank, port, plant, plant_rank, seconds) for rank in range(ranks)]
    try:
        outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    record = json.loads((folder / "doctor.json").read_text())
    found = [x for x in record["findings"] if x["level"] != "ok" and x["check"] != "devices"]
    assert outputs[0][0].count("errors, ") + outputs[0][0].count("1 error, ") == 1
    codes = [process.returncode for process in processes]
    return codes, outputs, found, record


def only(found: list[dict], check: str) -> str:
    messages = [x["message"] for x in found if x["check"] == check]
    assert len(messages) == 1, found
    return messages[0]


def assert_silent(outputs: list, ranks: range) -> None:
    for rank in ranks:
        assert outputs[rank][0] == "" and "Traceback" not in outputs[rank][1], outputs[rank]


def test_a_slow_link_and_a_skewed_clock_are_named(tmp_path):
    codes, outputs, found, record = examine(tmp_path, "slow", plant_rank=2)
    assert codes == [0] * WORLD_SIZE
    assert_silent(outputs, range(1, WORLD_SIZE))
    inside, between = (x["message"] for x in found if x["check"] == "network")
    assert "1 of 2 links within hosts" in inside and "node2 rank 2 - node2 rank 3" in inside
    assert "1 of 2 links between hosts" in between and "node1 rank 0 - node2 rank 2" in between
    assert re.search(r"node2 is (5.0|4.999)\d* s ahead of", only(found, "clocks")), found
    assert {(x["low"], x["high"]) for x in record["links"]} == {(0, 1), (2, 3), (0, 2), (1, 3)}
    assert len(found) == 3
    assert list((tmp_path / "here").iterdir()) == []


def test_a_rank_in_another_folder_is_named(tmp_path):
    codes, outputs, found, _ = examine(tmp_path, "blind", plant_rank=3)
    assert codes == [1] * WORLD_SIZE
    assert_silent(outputs, range(1, WORLD_SIZE))
    message = only(found, "shared files")
    assert message.startswith("node2 (rank 3) does not see") and "elsewhere" in message
    assert [list(path.iterdir()) for path in tmp_path.glob("*e*e*/")] == [[], []]


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        ("stuck", "node2 (rank 3) came no further than the start of the process group"),
        ("die", "did not answer any more within 10 s: node2 (rank 3)"),
    ],
)
def test_a_rank_that_the_others_wait_for_is_named(tmp_path, plant, words):
    codes, outputs, found, _ = examine(tmp_path, plant, plant_rank=3, seconds=STUCK_SECONDS)
    assert codes == ([1, 1, 1, 9] if plant == "die" else [1] * WORLD_SIZE)
    assert_silent(outputs, range(1, WORLD_SIZE))
    assert words in only(found, "network")


def test_ranks_that_never_come_are_named(tmp_path):
    codes, outputs, found, _ = examine(tmp_path, ranks=2, seconds=MISSING_SECONDS)
    assert codes == [1, 1]
    assert_silent(outputs, range(1, 2))
    assert only(found, "arrival").startswith(
        f"2 of 4 ranks did not come within {MISSING_SECONDS} s: ranks 2-3 (nobody came from node2)"
    )
