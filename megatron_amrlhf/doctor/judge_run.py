"""What is wrong with the run itself, as its start would say."""

from __future__ import annotations

from megatron_amrlhf.config.checks import check_files, check_run
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor.records import Finding
from megatron_amrlhf.errors import UserError


def judge_run(config: Config, world_size: int) -> list[Finding]:
    """Files, and on several ranks also the rules between keys and the layout.

    Args:
        config: the run.
        world_size: number of ranks; one may be a doctor who is alone, whatever the run will be.
    """
    findings, ranks = [], world_size if world_size > 1 else None
    try:
        if ranks is not None:
            check_run(config, ranks)
    except UserError as error:
        findings.append(Finding("run", "error", str(error), "change CONFIG.yaml or use --set"))
    try:
        check_files(config, ranks)
    except UserError as error:
        fix = "make the files or name others, the run does not start without"
        findings.append(Finding("run", "error", str(error), fix))
    what = "files" if ranks is None else f"files, keys and the layout of {ranks} ranks"
    return findings or [Finding("run", "ok", f"{what} are as the run wants them")]
