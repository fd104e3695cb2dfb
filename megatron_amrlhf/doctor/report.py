"""The doctor's report: lines and a table for a person, one JSON file for a program."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from megatron_amrlhf.doctor.judge_ranks import limit_text
from megatron_amrlhf.doctor.records import Finding, RankFacts, listed, ranks_by_host
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.report.console import stdout_console
from megatron_amrlhf.report.files import strict

EXIT_OK, EXIT_FOUND_ERROR = 0, 1
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
COLUMNS = ("host", "ranks", "devices", "cores", "memory", "open files", "processes", "/dev/shm")


@dataclass
class Report:
    """What rank 0 has found so far.

    Attributes:
        findings: in the order of the checks.
        values: measured values by name, JSON-able.
        facts: of each rank, once they are known.
    """

    findings: list[Finding] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    facts: list[RankFacts] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where a check has found an error."""
        has_error = any(finding.level == "error" for finding in self.findings)
        return EXIT_FOUND_ERROR if has_error else EXIT_OK

    def show(self) -> None:
        """Prints a line for each finding and a table of the hosts."""
        console = stdout_console(soft_wrap=True, highlight=False)
        for finding in self.findings:
            fix = f" -> {finding.fix}" if finding.fix else ""
            console.print(f"{finding.level:<7}", style=STYLES[finding.level], end=" ")
            console.print(f"{finding.check:<12} {finding.message}{fix}", markup=False)
        if self.facts:
            stdout_console(highlight=False).print(hosts_table(self.facts))
        counts = Counter(finding.level for finding in self.findings)
        errors, warnings = counts["error"], counts["warning"]
        console.print(
            f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        )

    def write(self, path: Path) -> None:
        """Writes all findings and values as one JSON object.

        Raises:
            OSError: it cannot be written.
        """
        record = {
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings],
            "ranks": [asdict(each) for each in self.facts],
            **self.values,
        }
        write_atomic(path, json.dumps(strict(record), indent=2) + "\n")


def hosts_table(facts: Sequence[RankFacts]) -> Table:
    """A row for each kind of host; hosts that are alike share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for host, ranks in ranks_by_host(facts).items():
        rows.setdefault(_row([facts[rank] for rank in ranks]), []).append(host)
    table = Table(*COLUMNS, box=SIMPLE, pad_edge=False)
    for row, hosts in rows.items():
        count = f"{len(hosts)} hosts: " if len(hosts) > 1 else ""
        table.add_row(f"{count}{listed(hosts)}", *row)
    return table


def _row(there: Sequence[RankFacts]) -> tuple[str, ...]:
    first = there[0]
    gpus = Counter((gpu.name, round(gpu.memory_gib)) for each in there for gpu in each.gpus)
    devices = [f"{count} x {name} {gib} GiB" for (name, gib), count in gpus.items()]
    limits = [limit_text(name, first.limits[name]) for name in ("open files", "processes")]
    return (
        str(len(there)),
        ", ".join(devices) or "CPU",
        str(len({core for each in there for core in each.cores})),
        f"{first.memory_gib:.0f} GiB",
        *limits,
        f"{first.shm_gib:.1f} GiB",
    )
