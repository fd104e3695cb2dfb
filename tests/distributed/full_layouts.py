"""The whole product of layouts against the reference, and a table of the worst errors.

``python -m tests.distributed.full_layouts RESULTS.jsonl [--table TABLE.md]`` runs what RESULTS does
not hold yet, one launch a layout, and can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from rich.progress import track

from tests.distributed.layouts import FIRST_MASKED, MODELS, ROWS_A_STEP, Choice, everything
from tests.distributed.parity_world import TOLERANCES, World

CASES_A_LAUNCH = 48


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="JSONL that is written and gone on with")
    parser.add_argument("--table", type=Path, help="Markdown table of the worst errors")
    options = parser.parse_args()
    done = set()
    if options.results.exists():
        done = {json.loads(line)["name"] for line in options.results.read_text().splitlines()}
    by_layout: dict[str, list[Choice]] = defaultdict(list)
    for choice in everything():
        if name_of(choice) not in done:
            by_layout[choice.layout_name].append(choice)
    launches = [
        choices[start : start + CASES_A_LAUNCH]
        for choices in by_layout.values()
        for start in range(0, len(choices), CASES_A_LAUNCH)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, choices in enumerate(track(launches, description="layouts")):
            run(choices, Path(folder) / str(number), options.results)
    if options.table:
        options.table.write_text(table(options.results))
    failed = [x for x in read(options.results) if x["error"] or not within(x)]
    print(f"{len(read(options.results))} cases, {len(failed)} beyond their tolerance")
    return 1 if failed else 0


def name_of(choice: Choice) -> str:
    return f"{choice.layout_name}/{choice.case.name}"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def within(record: dict) -> bool:
    return all(record["worst"][kind] <= limit for kind, limit in TOLERANCES.items())


def run(choices: list[Choice], folder: Path, results: Path) -> None:
    """One launch; appends a line a case."""
    folder.mkdir()
    layout = choices[0].layout_name
    cases = sorted({choice.case for choice in choices}, key=lambda x: (str(x.cut), x.name))
    world = World(
        folder, MODELS, ROWS_A_STEP, FIRST_MASKED, {layout: choices[0].layout}, lambda _: cases
    )
    start = time.perf_counter()
    for choice in choices:
        record = {"name": name_of(choice), "worst": {}, "error": None} | vars(choice)
        try:
            found = world.differences(layout, choice.case)
            for kind in TOLERANCES:
                record["worst"][kind] = max(off for its, _, off in found if its == kind)
        except AssertionError as error:
            record["error"] = str(error)[-2000:]
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
    seconds = time.perf_counter() - start
    print(f"{layout}: {len(choices)} cases in {seconds:.0f} s", file=sys.stderr, flush=True)


def table(results: Path) -> str:
    """Worst relative errors by layout, and by each value of the other factors."""
    records = read(results)
    lines = [
        "| layout or choice | cases | loss | norm | gradient | weight | change |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        groups[f"{record['tensor']} {record['pipeline']} dp{record['data']}"].append(record)
    for factor in ("weights", "reduce", "recompute", "model", "num_blocks", "loss"):
        for record in records:
            groups[f"{factor}: {record[factor]}"].append(record)
    for name, members in groups.items():
        worst = [max(m["worst"].get(kind, float("nan")) for m in members) for kind in TOLERANCES]
        numbers = " | ".join(f"{x:.1e}" for x in worst)
        lines.append(f"| {name} | {len(members)} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
