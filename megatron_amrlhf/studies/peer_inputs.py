"""The models, data and configurations that both sides of tools/benchmark_peers.py train with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SHAPES = {  # random Llama shapes with tied embeddings
    "12m": {"hidden": 288, "layers": 8, "heads": 8, "kv": 4, "ffn": 768, "vocab": 16384},
    "125m": {"hidden": 768, "layers": 12, "heads": 12, "kv": 4, "ffn": 2048, "vocab": 49152},
}
POLICY, REWARD_MODEL = "policy", "reward_model"
ROWS = 16  # of a step, whatever is trained; 128 tokens each
SAMPLES, NEW_TOKENS = 8, 64  # grpo's answers a prompt; tokens of an answer of grpo and ppo
PROMPT_WORDS, LONG_PROMPT_WORDS = 42, 59  # and 5 tokens of the template: dpo and prm; grpo and ppo
SENTENCES, SENTENCE_WORDS = 10, 7  # of an answer; a full stop is a token more
KEPT_SENTENCES = 4  # by the scores in the pairs' file
LEARNING_RATE, BETA, KL_COEF = 1e-5, 0.1, 0.05
MASKED = "-masked"
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", ".")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }}"
    " <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def write_models(size: str, folder: Path) -> None:
    """A random policy and a reward model of the same shape, with a tokenizer of whole words.

    Args:
        size: of `SHAPES`.
        folder: gets ``policy``, a causal model, ``reward_model``, with one output a row, and
            ``inputs.json``, what a peer's script is told.
    """
    shape = SHAPES[size]
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        intermediate_size=shape["ffn"],
        vocab_size=shape["vocab"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<unk>"),
        num_labels=1,
    )
    tokenizer = word_tokenizer(shape["vocab"])
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / POLICY)
    LlamaForSequenceClassification(config).save_pretrained(folder / REWARD_MODEL)
    for name in (POLICY, REWARD_MODEL):
        tokenizer.save_pretrained(folder / name)
    inputs = {
        "policy": POLICY,
        "reward_model": REWARD_MODEL,
        "rows": ROWS,
        "samples": SAMPLES,
        "new_tokens": NEW_TOKENS,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "kl_coef": KL_COEF,
    }
    (folder / "inputs.json").write_text(json.dumps(inputs))


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word is a token: ``w6`` is id 6 where the special ones take ids 0 to 5."""
    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(words), vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL[:3]))
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        chat_template=TEMPLATE,
    )


def write_data(size: str, folder: Path, kind: str, scored: bool = False) -> Path:
    """Rows of ``kind`` as JSONL, enough for any number of steps.

    Args:
        size: of `SHAPES`, whose vocabulary the words come from.
        folder: gets the file.
        kind: ``dpo`` (pairs), ``prm`` (steps with labels), ``grpo`` or ``ppo`` (prompts).
        scored: whether each sentence of the pairs has a score, by which 4 of 10 are kept.
    """
    draw = random.Random(1)

    def words(count: int) -> str:
        return " ".join(
            f"w{draw.randrange(len(SPECIAL), SHAPES[size]['vocab'])}" for _ in range(count)
        )

    def answer() -> str:
        return " ".join(f"{words(SENTENCE_WORDS)}." for _ in range(SENTENCES))

    def scores(kept: float, other: float) -> list[float]:
        found = [kept] * KEPT_SENTENCES + [other] * (SENTENCES - KEPT_SENTENCES)
        draw.shuffle(found)
        return found

    def row() -> dict:
        if kind == "dpo":
            answers = {"chosen": answer(), "rejected": answer()}
            marks = {"chosen_scores": scores(4, 1), "rejected_scores": scores(0, 3)}
            return {"prompt": words(PROMPT_WORDS), **answers, **(marks if scored else {})}
        if kind == "prm":
            steps = [words(2 * SENTENCE_WORDS + 1) for _ in range(SENTENCES // 2)]
            labels = [draw.randrange(2) for _ in steps]
            return {"prompt": words(PROMPT_WORDS), "steps": steps, "labels": labels}
        return {"prompt": words(LONG_PROMPT_WORDS)}

    path = folder / f"{work_name(kind, scored)}.jsonl"
    path.write_text("".join(json.dumps(row()) + "\n" for _ in range(40 * ROWS)))
    return path


def write_config(folder: Path, kind: str, masked: bool, steps: int, dtype: str) -> Path:
    """The run of this package, with `write_models` and `write_data` in ``folder``.

    Args:
        kind: of the algorithm.
        masked: whether the pairs' scores decide what is kept (dpo).
        steps: of the run.
        dtype: of all weights.
    """
    name = work_name(kind, masked)
    samples = SAMPLES if kind == "grpo" else 1
    prompts = ROWS // (2 if kind == "dpo" else samples)
    algorithms: dict[str, dict[str, float]] = {
        "dpo": {"beta": BETA},
        "grpo": {"kl_coef": 0.0},
        "ppo": {"kl_coef": KL_COEF},
        "prm": {"batch_size": ROWS},
    }
    config: dict[str, dict] = {
        "run": {"name": name, "folder": str(folder / "runs"), "steps": steps},
        "model": {"path": str(folder / POLICY), "dtype": dtype},
        "algorithm": {"kind": kind, **algorithms[kind]},
        "data": {
            "train": str(folder / f"{name}.jsonl"),
            "format": {"dpo": "pairs", "prm": "steps"}.get(kind, "prompts"),
            "max_prompt_tokens": 128,
            "max_row_tokens": 256,
        },
        "engine": {"micro_batch_size": ROWS},
        "optimizer": {"lr": LEARNING_RATE},
        "checkpoint": {"export": False, "resume": False},
    }
    if kind != "prm":
        config["mask"] = {"kind": "adaptive" if masked else "none"}
        config["rollout"] = {"prompts_per_step": prompts}
    if kind in ("grpo", "ppo"):
        config["reward_model"] = {"orm_path": str(folder / REWARD_MODEL)}
        config["reward"] = {"prm_weight": 0.0, "orm_weight": 1.0, "granularity": "sequence"}
        config["rollout"] |= {
            "samples_per_prompt": samples,
            "max_new_tokens": NEW_TOKENS,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "micro_batch_size": ROWS,
        }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


def work_name(kind: str, masked: bool) -> str:
    """The stem of the work's files."""
    return f"{kind}{MASKED if masked else ''}"
