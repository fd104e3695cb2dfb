"""Ranks whose clocks, files or versions differ would train on different prompts."""

import pytest

from megatron_amrlhf.commands.train import check_same_prompts
from megatron_amrlhf.errors import UserError


def test_a_rank_that_writes_another_prompt_is_named():
    check_same_prompts([[1, 2]] * 3)
    with pytest.raises(UserError, match="rank 2 writes a prompt otherwise than rank 0: the time"):
        check_same_prompts([[1, 2], [1, 2], [1, 3], [1, 4]])
