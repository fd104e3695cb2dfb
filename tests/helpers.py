"""Small things that several tests need and no download gives."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = (
    "Solve it step by step. Write one short step with one calculation on each line.",
    'End with "The answer is" and the number. The answer is 12.',
    "First, Ann buys 3 x 4 = 12 apples. Then, Ann gives 12 - 5 = 7 apples to a friend.",
    "Finally, the train costs 40 + 6 = 46 dollars and each friend gets 46 / 2 = 23 dollars.",
    "A garden is 15 meters long and 8 meters wide. How many square meters does it have?",
    "Ben drives for 3 hours at 60 km per hour and then cycles for 2 hours at 15 km per hour.",
    "A book has 240 pages. Grace reads 20 pages a day. How many days does she need to finish?",
    "Explain how a refrigerator keeps food cold. Describe a busy morning at the market.",
    "user assistant system Step 1: Step 2: Step 3: There are passengers, trees, crates, liters.",
)


def load_tool(name: str) -> ModuleType:
    """A program of ``tools/`` as a module."""
    file = Path(__file__).parents[1] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tiny_tokenizer(
    folder: str | Path, vocab_size: int = 320, chat_template: str | None = CHATML_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, save it as a Hugging Face folder, return it.

    Args:
        folder: made if missing.
        vocab_size: exact size, 259 (bytes and special tokens) to about 500.
        chat_template: None for a tokenizer without one.

    Returns:
        A tokenizer with eos ``<|im_end|>`` and pad ``<|endoftext|>``; it adds no BOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, (tokenizer.get_vocab_size(), vocab_size)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(str(folder))
    return wrapped
