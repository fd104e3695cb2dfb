"""The folder of scores: another one's files are not written over, and its key is looked at."""

import json

import pytest

from megatron_amrlhf.commands.score_job import ANSWERS_NAME, KEY_NAME, PARTS, check_key
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.rewards.offline import SCORES_NAME, STATISTICS_NAME

KEY = {"data": "abc", "part_size": 8}


@pytest.mark.parametrize("name", [ANSWERS_NAME, SCORES_NAME, STATISTICS_NAME, PARTS])
def test_files_of_others_are_not_written_over(tmp_path, name):
    """Such as the answers themselves, where they lie in the folder of the scores."""
    check_key(tmp_path / KEY_NAME, KEY)
    (tmp_path / "notes.txt").touch()
    check_key(tmp_path / KEY_NAME, KEY)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"--out: .* has {name}, which would be written over"):
        check_key(tmp_path / KEY_NAME, KEY)
    (tmp_path / KEY_NAME).write_text(json.dumps(KEY))
    check_key(tmp_path / KEY_NAME, KEY)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"data": NaN}', '{"data": 1, "data": 2}']
)
def test_a_key_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / KEY_NAME).write_text(text)
    with pytest.raises(UserError, match="key.json: .*choose another folder"):
        check_key(tmp_path / KEY_NAME, KEY)
