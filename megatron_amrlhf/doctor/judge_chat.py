"""How the models of a run write prompts and answers, as its start would say."""

from __future__ import annotations

from pathlib import Path

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.chat import (
    chat_notes,
    check_system_prompt,
    end_token_ids,
)
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.data.vocabulary import check_vocabulary
from megatron_amrlhf.doctor.records import Finding
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import read_hf_config


def judge_chat(config: Config) -> list[Finding]:
    """Tokenizer and chat template of each model that is a folder on this machine."""
    section = config.reward_model
    paths = [config.model.path]
    if not config.algorithm.trains_reward_model:
        paths += [
            path
            for path, weight in (
                (section.path, config.reward.prm_weight),
                (section.orm_path, config.reward.orm_weight),
            )
            if path and weight
        ]
    folders = [expanded(path) for path in dict.fromkeys(paths)]
    return [
        finding
        for folder in folders
        if folder.is_dir()
        for finding in _judge_folder(folder, config.data.system_prompt)
    ]


def _judge_folder(folder: Path, system_prompt: str | None) -> list[Finding]:
    try:
        vocab_size = read_shape(read_hf_config(folder)).vocab_size
        tokenizer = load_tokenizer(folder)
        end_ids = end_token_ids(tokenizer, folder)
        check_vocabulary(tokenizer, end_ids, vocab_size, folder)
        check_system_prompt(tokenizer, system_prompt, folder)
        notes = chat_notes(tokenizer, folder, system_prompt)
    except UserError as error:
        return [Finding("chat", "error", str(error), "the run does not start with this folder")]
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(end_ids)))
    if not notes:
        return [Finding("chat", "ok", f"{folder}: answers end with {ends}")]
    fix = "nothing, if that is meant"
    return [Finding("chat", "warning", f"{folder}: {note}", fix) for note in notes]
