"""What a run's start would say about its models and data, by the functions that the start calls."""

from __future__ import annotations

from megatron_amrlhf.checkpoint.folders import find_latest
from megatron_amrlhf.commands.train import prepare
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor.records import Finding
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.source import is_to_be_fetched
from megatron_amrlhf.run.folder import refuse_other_run
from megatron_amrlhf.run.way import CHECKPOINTS_NAME

FIX = "the run does not start before this is mended"


def judge_start(config: Config) -> list[Finding]:
    """Models, tokenizers, templates, data, reward models, DeepSpeed's settings, and what is there.

    Reads all of the data; a GGUF file is converted. A model is not fetched from the hub.

    Args:
        config: the run, whose keys and files are right.
    """
    findings = []
    try:
        refuse_other_run(config.run.path, config)
        if config.checkpoint.resume:
            find_latest(config.run.path / CHECKPOINTS_NAME)
    except UserError as error:
        findings.append(Finding("start", "error", str(error), FIX))
    if is_to_be_fetched(config.model.path):
        message = (
            f"model.path {config.model.path} is not on this machine: it would be fetched from the "
            "hub; model, data and reward models are not judged"
        )
        return [*findings, Finding("start", "warning", message, "fetch it and call doctor again")]
    try:
        prepare(config)
    except UserError as error:
        findings.append(Finding("start", "error", str(error), FIX))
    return findings or [Finding("start", "ok", "models, tokenizers and data are as the run wants")]
