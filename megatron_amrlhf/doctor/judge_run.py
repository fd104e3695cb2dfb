"""What is wrong with the run's keys and files, as its start would say."""

from __future__ import annotations

from megatron_amrlhf.config.checks import check_files, check_run
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor.records import Finding
from megatron_amrlhf.errors import UserError


def judge_run(config: Config, world_size: int) -> list[Finding]:
    """Files and the rules between keys, and on several ranks the layout.

    Args:
        config: the run.
        world_size: number of ranks; one may be a doctor who is alone, whatever the run will be:
            then the layout is judged for one replica.
    """
    findings, ranks = [], world_size if world_size > 1 else None
    parallel = config.parallel
    try:
        check_run(config, ranks or parallel.tensor * parallel.pipeline)
    except UserError as error:
        findings.append(Finding("run", "error", str(error), "change CONFIG.yaml or use --set"))
    try:
        check_files(config, ranks)
    except UserError as error:
        fix = "make the files or name others, the run does not start without"
        findings.append(Finding("run", "error", str(error), fix))
    what = "files and keys" if ranks is None else f"files, keys and the layout of {ranks} ranks"
    return findings or [Finding("run", "ok", f"{what} are as the run wants them")]
