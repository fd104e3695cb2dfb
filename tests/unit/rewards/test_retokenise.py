"""Scores come back to the policy's tokens by the text that they stand for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_amrlhf.data.chat import encode_prompt, encode_turns
from megatron_amrlhf.data.token_text import decode, token_ends, token_texts
from megatron_amrlhf.experience.translation import read_back, translate
from megatron_amrlhf.rewards.retokenise import align, encode_with_ends
from megatron_amrlhf.types import PromptBatch, RolloutBatch
from tests.helpers import CHATML_TEMPLATE, make_tiny_tokenizer

CHINESE, EMOJI = "\u7b54\u6848\u662f 12\u3002", "ok \U0001f600\U0001f468\u200d\U0001f469 9"
TEXTS = (
    "So 3 x 4 = 12.\nThe answer is 12.",
    CHINESE,
    EMOJI,
    " two  blanks\n\n",
    f"a{CHINESE}{EMOJI}b",
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("policy"), vocab_size=330)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """Byte-level as the policy's, with more merges, other ids, and Qwen's trimmed offsets."""
    tokenizer = make_tiny_tokenizer(tmp_path_factory.mktemp("coarse"), vocab_size=450)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="module")
def fallback():
    """As Llama's: a mark for blanks and before the text, unknown characters as bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXTS[0], TEXTS[3], "ok a b 9"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = CHATML_TEMPLATE
    return wrapped


def every(request, name):
    return request.getfixturevalue(name)


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (that of GPT-2)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(x): x for x in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """What a token of the vocabularies here stands for."""
    if token.startswith("<0x"):
        return bytes([int(token[3:-1], 16)])
    if "\u2581" in token or not set(token) <= BYTES.keys():
        return token.replace("\u2581", " ").encode()
    return bytes(BYTES[character] for character in token)


BYTES = byte_characters()


def ends_by_bytes(tokenizer, ids, text) -> list[int]:
    """Where each token ends, by counting bytes: a character counts from its first byte on."""
    starts = [len(text[:place].encode()) for place in range(len(text))]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    ends, total = [], len(text.encode()) - sum(len(token_bytes(token)) for token in tokens)
    assert total in (0, -1)  # -1: the mark before the text
    for token in tokens:
        total += len(token_bytes(token))
        ends.append(sum(start < total for start in starts))
    assert total == len(text.encode())
    return ends


@pytest.mark.parametrize("name", ["policy", "coarse", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_ends_equal_those_of_counting_bytes(request, name, text):
    tokenizer = every(request, name)
    ids, ends = encode_with_ends(tokenizer, text)
    assert decode(tokenizer, ids) == text
    assert ends == token_ends(tokenizer, ids) == ends_by_bytes(tokenizer, ids, text)
    assert ends[-1] == len(text)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text and [len(x) for x in texts] == [
        end - start for start, end in pairwise([0, *ends])
    ]


@pytest.mark.parametrize("name", ["policy", "coarse", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_cut_off_within_a_character_keeps_its_text(request, name, text):
    tokenizer = every(request, name)
    ids, _ = encode_with_ends(tokenizer, text)
    for count in range(len(ids) + 1):
        assert "".join(token_texts(tokenizer, ids[:count])) == decode(tokenizer, ids[:count])


@pytest.mark.parametrize("name", ["policy", "coarse", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_equal_tokens_meet_each_other(request, name, text):
    """The same tokenizer: each token reads itself, also the bytes of one character."""
    ids, ends = encode_with_ends(every(request, name), text)
    assert len(ids) > len(set(ends)) or text == TEXTS[0] or text == TEXTS[3]
    assert align(ends, ends) == list(range(len(ids)))


@pytest.mark.parametrize(
    ("mine", "other"), [("policy", "coarse"), ("policy", "fallback"), ("fallback", "coarse")]
)
@pytest.mark.parametrize("text", TEXTS)
def test_a_token_reads_the_one_that_holds_its_last_character(request, mine, other, text):
    ids, ends = encode_with_ends(every(request, mine), text)
    _, there = encode_with_ends(every(request, other), text)
    places = align(ends, there)
    assert places == sorted(places) and len(places) == len(ids)
    for end, place in zip(ends, places, strict=True):
        assert there[place] >= end, "it has read this character"
        if end not in there:
            assert there[place] > end and all(x < end or x >= there[place] for x in there)
    assert places[-1] == len(there) - 1


def test_align_by_hand():
    assert align([2, 4, 6], [3, 6]) == [0, 1, 1]
    assert align([1, 2, 3], [3]) == [0, 0, 0]
    assert align([3], [1, 2, 3]) == [2]
    assert align([1, 1, 1, 2], [1, 1, 1, 2]) == [0, 1, 2, 3]
    assert align([1, 1, 2], [1, 1, 1, 1, 2]) == [1, 3, 4]  # two for four bytes
    assert align([1, 1, 1], [1]) == [0, 0, 0]
    assert align([0, 1], [1, 1]) == [0, 1]  # a token without text
    assert align([1, 2], [2, 2, 2]) == [0, 2]  # the first there holds a character and a half


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab 9\n\u7b54\U0001f600e\u0301.", min_size=1, max_size=25))
def test_any_text_comes_back_whole(policy, coarse, text):
    ids, ends = encode_with_ends(policy, text)
    there_ids, there = encode_with_ends(coarse, text)
    assert ends == ends_by_bytes(policy, ids, text)
    places = align(ends, there)
    assert places == sorted(places) and places[-1] == len(there_ids) - 1


def test_sampled_tokens_that_no_tokenizer_would_choose(policy):
    """Half characters, and a word in single bytes."""
    ids = [i for word in ("Th", "e ", "ans") for i in policy.encode(word, add_special_tokens=False)]
    broken = policy.encode(EMOJI, add_special_tokens=False)[:5]
    for sampled in (ids, broken, broken + ids):
        ends = token_ends(policy, sampled)
        assert len(ends) == len(sampled) and ends == sorted(ends)
        assert ends[-1] == len(decode(policy, sampled))


def rollout_of(tokenizer, prompt, answers) -> tuple[RolloutBatch, PromptBatch]:
    head = encode_prompt(tokenizer, prompt, "Be brief.")
    rows, ended = [], []
    for text, is_whole in answers:
        ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(torch.tensor(head + ids + [tokenizer.eos_token_id] * is_whole))
        ended.append(is_whole)
    count = len(rows)
    rollout = RolloutBatch(
        rows=tuple(rows),
        prompt_lengths=torch.full((count,), len(head)),
        group_ids=torch.full((count,), 5),
        sample_ids=torch.arange(count),
        from_reference=torch.zeros(count, dtype=torch.bool),
        ended=torch.tensor(ended),
    )
    prompts = PromptBatch((torch.tensor(head),), torch.tensor([5]), (prompt,), (None,))
    return rollout, prompts


ANSWERS = [(text, whole) for text in TEXTS for whole in (True, False)] + [("", True)]


def score_of_row(row, length):
    """A stand-in for a model: each response position's score depends on all ids up to it."""
    total = torch.cumsum(row.double() * (torch.arange(row.numel()) + 1.7).sqrt(), dim=0)
    return total[length:]


def scores_of(rollout) -> torch.Tensor:
    scores = torch.zeros(rollout.response_mask.shape, dtype=torch.float64)
    for place, (row, length) in enumerate(
        zip(rollout.rows, rollout.prompt_lengths.tolist(), strict=True)
    ):
        found = score_of_row(row, length)
        scores[place, : found.numel()] = found
    return scores


@pytest.mark.parametrize("name", ["policy", "fallback"])
def test_with_the_same_tokenizer_it_is_the_direct_path(request, name):
    tokenizer = every(request, name)
    rollout, prompts = rollout_of(tokenizer, "How many?", ANSWERS)
    there = translate(rollout, prompts, tokenizer, tokenizer, system_prompt="Be brief.")
    for row, same in zip(rollout.rows, there.rollout.rows, strict=True):
        assert torch.equal(row, same)
    assert torch.equal(read_back(scores_of(there.rollout), there, rollout), scores_of(rollout))


def test_another_tokenizer_gets_the_same_text_and_its_own_template(policy, fallback):
    rollout, prompts = rollout_of(policy, "How many?", ANSWERS)
    there = translate(rollout, prompts, policy, fallback, system_prompt="Be brief.")
    found = read_back(scores_of(there.rollout), there, rollout)
    assert found.shape == rollout.response_mask.shape
    for place, (text, whole) in enumerate(ANSWERS):
        length = int(there.rollout.prompt_lengths[place])
        ids = there.rollout.rows[place].tolist()
        assert ids[:length] == encode_prompt(fallback, "How many?", "Be brief.")
        assert decode(fallback, ids[length:]) == text + "</s>" * whole
        last = int(rollout.response_lengths[place]) - 1
        assert found[place, last] == scores_of(there.rollout)[place, len(ids) - length - 1]
        assert (found[place, last + 1 :] == 0).all()


def test_another_tokenizer_gets_a_prompts_own_system_message_and_history(policy, fallback):
    rollout, prompts = rollout_of(policy, "How many?", [("Two.", True)])
    earlier = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    system = {"role": "system", "content": "Be kind."}
    asked = {"role": "user", "content": "How many?"}
    for before, expected in (((system, *earlier), "Be kind."), (tuple(earlier), "Be brief.")):
        there = translate(
            rollout,
            replace(prompts, earlier=(before,)),
            policy,
            fallback,
            system_prompt="Be brief.",
        )
        head = encode_turns(fallback, [*earlier, asked], expected)
        assert there.rollout.rows[0][: len(head)].tolist() == head
        assert there.rollout.prompt_lengths.tolist() == [len(head)]
