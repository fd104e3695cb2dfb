"""Ranks started through torch's launcher."""

import subprocess

import pytest

from megatron_amrlhf.studies.start_ranks import start_ranks


def test_a_failing_rank_raises_with_what_it_said(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        start_ranks(1, "json.tool", [str(tmp_path / "absent")], "example", tmp_path / "log.txt")
    assert caught.value.cmd == "example"
    assert "absent" in caught.value.output
    assert "torch/distributed/elastic" not in caught.value.output


def test_ranks_that_succeed_leave_their_words_in_the_log(tmp_path):
    start_ranks(1, "this", [], "example", tmp_path / "log.txt")
    assert "Zen of Python" in (tmp_path / "log.txt").read_text()
