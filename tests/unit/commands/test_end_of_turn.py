"""Given answers, and those in a reward model's rows, end as the model's template ends turns."""

import json

import torch

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.pairs import load_pairs
from megatron_amrlhf.experience.translation import translate
from megatron_amrlhf.rewards.marking import AnswerSteps, StepMarker, mark_answer
from megatron_amrlhf.types import PromptBatch, RolloutBatch
from tests.unit.data.chat_templates import SHAPES, chat_tokenizer

BASE = SHAPES["chatml of a base folder"]


def test_pairs_end_with_the_end_of_turn(tmp_path):
    file, tokenizer = tmp_path / "pairs.jsonl", chat_tokenizer(BASE.template, BASE.eos)
    file.write_text(json.dumps({"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}))
    ((pair,), _) = load_pairs(file, tokenizer, DataSection(train="unused", format="pairs"))
    assert tokenizer.decode(pair.chosen) == f"{BASE.prompt}Yes.<|im_end|>"
    assert tokenizer.decode(pair.rejected) == f"{BASE.prompt}No.<|im_end|>"


def test_answers_in_a_reward_models_rows_end_with_its_end_of_turn():
    policy = chat_tokenizer(SHAPES["zephyr"].template)
    other = chat_tokenizer(BASE.template, BASE.eos)
    rows = [policy.encode(f"Q?{answer}</s>") for answer in ("Yes.", "")]
    rollout = RolloutBatch(
        rows=tuple(torch.tensor(row) for row in rows),
        prompt_lengths=torch.tensor([2, 2]),
        group_ids=torch.tensor([0, 0]),
        sample_ids=torch.tensor([0, 1]),
        from_reference=torch.zeros(2, dtype=torch.bool),
        ended=torch.ones(2, dtype=torch.bool),
    )
    prompts = PromptBatch(
        rows=(torch.tensor(rows[0][:2]),), group_ids=torch.tensor([0]), texts=("Q?",), answers=("",)
    )
    there = translate(rollout, prompts, policy, other, system_prompt=None)
    texts = [other.decode(row) for row in there.rollout.rows]
    assert texts == [f"{BASE.prompt}Yes.<|im_end|>", f"{BASE.prompt}<|im_end|>"]


def test_marked_answers_end_with_the_end_of_turn():
    tokenizer = chat_tokenizer(BASE.template, BASE.eos)
    marker = StepMarker("<think>", tokenizer.convert_tokens_to_ids("<think>"), "\n")
    for texts, expected in (
        ((), "<think><|im_end|>"),
        (("a", "b"), "a<think>\nb<think><|im_end|>"),
    ):
        steps = AnswerSteps(texts, (0,))
        assert tokenizer.decode(mark_answer(steps, True, tokenizer, marker)[0]) == expected
