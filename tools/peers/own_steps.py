"""``PYTHON tools/peers/own_steps.py CONFIG.yaml RECORD.json``

Trains as the configuration says, in one process, and records the seconds between the ends of its
steps, as `trl_steps.py` does of TRL.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from megatron_amrlhf.algorithms.contract import Algorithm
from megatron_amrlhf.commands.train import ALGORITHMS, run
from megatron_amrlhf.config.load import load_config


def main(config_path: str, record: str) -> None:
    """Writes ``{"ends": [[wall, CPU] seconds], "peak_bytes": of the process}``."""
    config = load_config(config_path, [])
    ends: list[tuple[float, float]] = []
    make = ALGORITHMS[config.algorithm.kind]

    def make_timed(*arguments) -> Algorithm:
        algorithm = make(*arguments)
        own_step = algorithm.step

        def timed_step(step: int) -> dict[str, float]:
            metrics = own_step(step)
            ends.append((time.perf_counter(), time.process_time()))
            return metrics

        algorithm.step = timed_step  # type: ignore[method-assign]
        return algorithm

    ALGORITHMS[config.algorithm.kind] = make_timed
    run(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(record).write_text(json.dumps({"ends": ends, "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
