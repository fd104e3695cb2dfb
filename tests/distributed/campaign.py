"""Faults planted in whole runs of a tiny model, each followed by a start that has to go on from it.

``nice python -m tests.distributed.campaign RESULTS.jsonl --table docs/reliability.md`` runs what
RESULTS does not hold yet, one cell after the other, and can be stopped and started again. It needs
root (small file systems are mounted) and takes about an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.distributed.campaign_commands import CASES, interrupt
from tests.distributed.campaign_faults import FAULTS
from tests.distributed.campaign_load import LOADS, carry
from tests.distributed.campaign_runs import PHASES, RANKS, Cell, Stage

HEAD = "| group | cells run | as they should | seconds |"
GROUPS = ("faults", "kills", "saves", "commands", "load")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="campaign", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSONL that is written and gone on with")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--minutes", type=float, default=1e9, help="no new cell after so long")
    parser.add_argument("--table", type=Path, help="Markdown file whose last part is the counts")
    options = parser.parse_args()
    options.results.touch()
    done = {record["cell"] for record in read(options.results)}
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        stage = Stage(Path(folder))
        for group, name, run in cells(stage, options.groups):
            if name in done or options.only not in name or time.monotonic() > end:
                continue
            start = time.monotonic()
            try:
                record = run()
            except Exception:
                record = {"ok": False, "what": traceback.format_exc()[-1500:]}
            seconds = round(time.monotonic() - start, 1)
            record = {"group": group, "cell": name, "seconds": seconds} | record
            with options.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{'ok  ' if record['ok'] else 'FAIL'} {name} ({seconds} s): {record['what']}")
            sys.stdout.flush()
    records = read(options.results)
    if options.table:
        text = options.table.read_text() if options.table.exists() else ""
        options.table.write_text(text.partition(HEAD)[0].rstrip("\n") + "\n\n" + table(records))
    print(table(records))
    return 0 if all(record["ok"] for record in records) else 1


def cells(stage: Stage, groups: tuple[str, ...]) -> Iterator[tuple]:
    """Group, name and what to run; all phases come before the second rank of a phase."""
    if "faults" in groups:
        for name in FAULTS:
            yield "faults", name, lambda n=name: FAULTS[n](stage)
    if "kills" in groups:
        for turn in range(RANKS):
            for number, phase in enumerate(PHASES):
                cell = Cell(phase, (number + turn) % RANKS)
                yield "kills", f"kill rank {cell.rank} in {phase}", lambda c=cell: stage.kill(c)
    if "saves" in groups:
        for number in range(2 * RANKS):
            cell = Cell("save", number % RANKS, delay=0.02 * number, asynchronous=True)
            name = f"kill rank {cell.rank} {cell.delay:.2f} s into an asynchronous save"
            yield "saves", name, lambda c=cell: stage.kill(c)
    if "commands" in groups:
        for name in CASES:
            yield "commands", f"Ctrl-C in {name}", lambda n=name: interrupt(n, stage)
    if "load" in groups:
        for name in LOADS:
            yield "load", name, lambda n=name: carry(n, stage)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(records: list[dict]) -> str:
    """Counts a group, and the cells that failed."""
    lines = [HEAD, "|---|---|---|---|"]
    for group in GROUPS:
        mine = [record for record in records if record["group"] == group]
        good, seconds = sum(x["ok"] for x in mine), sum(x["seconds"] for x in mine)
        lines.append(f"| {group} | {len(mine)} | {good} | {seconds:.0f} |")
    for record in records:
        if not record["ok"]:
            lines.append(f"\nNot as it should: {record['cell']}: {record['what'].strip()}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
