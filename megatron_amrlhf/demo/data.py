"""The demonstration data that the quick start runs on: made here, nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Literal

from megatron_amrlhf.data.jsonl import dump_jsonl, fingerprint
from megatron_amrlhf.demo.arithmetic import generate_problems
from megatron_amrlhf.demo.general_prompts import general_prompts
from megatron_amrlhf.demo.sums import Split, generate_sums
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.reading import Record, Unreadable, read_record

PRM_TRAIN = "prm_train.jsonl"
PRM_HELDOUT = "prm_heldout.jsonl"
PAIRS_TRAIN = "pairs_train.jsonl"
PAIRS_HELDOUT = "pairs_heldout.jsonl"
PROMPTS_TRAIN = "prompts_train.jsonl"
PROMPTS_HELDOUT = "prompts_heldout.jsonl"
MANIFEST = "demo.json"

Problems = Literal["sums", "words"]
COUNTS: dict[Problems, tuple[int, int]] = {"sums": (320, 90), "words": (600, 120)}
"""Problems for training and held out, by kind."""

_VERSION = 3  # raise it when the same parameters give other data


def write_demo_data(
    folder: str | Path,
    seed: int,
    num_problems: int | None = None,
    num_heldout: int | None = None,
    problems: Problems = "sums",
) -> bool:
    """Write step-labelled problems and prompts, or leave the folder alone if they are there.

    Files: ``prm_{train,heldout}.jsonl`` (``prompt, steps, labels, answer``);
    ``pairs_{train,heldout}.jsonl`` (``prompt, chosen, rejected``), a right and a wrong solution of
    each of those problems; ``prompts_{train,heldout}.jsonl``, the problems (``prompt, answer``),
    word problems mixed with general prompts in English and Chinese (``prompt``); and ``demo.json``
    (parameters, sha256 of each). Rows of sums also have ``system`` and ``history``, an example.
    No prompt of a train file is in a held-out file. Each file is renamed into place whole,
    ``demo.json`` last.

    Args:
        folder: made if it is not there.
        seed: of problems, errors and mixing.
        num_problems: problems in ``prm_train.jsonl``; None: as in ``COUNTS``.
        num_heldout: problems in ``prm_heldout.jsonl``; None: as in ``COUNTS``.
        problems: ``sums`` of small numbers, which a small model can learn in minutes, or ``words``,
            longer word problems.

    Returns:
        True if files were written, False if all were there with the same parameters.

    Raises:
        UserError: counts under 1, more problems than there are, a folder that cannot be written,
            or one with a file of these names that this function did not write.
    """
    num_problems = COUNTS[problems][0] if num_problems is None else num_problems
    num_heldout = COUNTS[problems][1] if num_heldout is None else num_heldout
    if min(num_problems, num_heldout) < 1 or seed < 0:
        raise UserError("demo data needs a seed >= 0 and at least 1 problem and 1 held-out one")
    folder = Path(folder)
    parameters = {"version": _VERSION, "seed": seed, "problems": problems}
    parameters |= {"num_problems": num_problems, "num_heldout": num_heldout}
    previous = _read_manifest(folder / MANIFEST)
    hashes = {name: fingerprint(folder / name) for name in _names() if (folder / name).exists()}
    if previous == {"parameters": parameters, "sha256": hashes}:
        return False
    contents = _make_contents(problems, seed, num_problems, num_heldout)
    new_hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, found in hashes.items():
        if found not in (previous.get("sha256", {}).get(name), new_hashes[name]):
            message = f"{folder / name}: this file is not (or no longer) as the demo wrote it"
            raise UserError(f"{message}; move it away or choose another folder")
    manifest = {"parameters": parameters, "sha256": new_hashes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomic(folder / name, content)
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot write the demo data: {error.strerror}") from error
    return True


def _names() -> tuple[str, ...]:
    return (PRM_TRAIN, PRM_HELDOUT, PAIRS_TRAIN, PAIRS_HELDOUT, PROMPTS_TRAIN, PROMPTS_HELDOUT)


def _make_contents(
    problems: Problems, seed: int, num_problems: int, num_heldout: int
) -> dict[str, bytes]:
    generate = generate_sums if problems == "sums" else generate_problems
    mixed, pairs, prompts = [], [], []
    splits: dict[Split, int] = {"train": num_problems, "heldout": num_heldout}
    for split, count in splits.items():
        mixed.append(generate(count, seed, split))
        right, wrong = (generate(count, seed, split, error_rate=rate) for rate in (0.0, 1.0))
        pairs.append(_make_pairs(right, wrong))
        rows = [_without_solution(row) for row in mixed[-1]]
        if problems == "words":
            rows = _mix_prompts(rows, general_prompts(split), seed)
        prompts.append(rows)
    records = (*mixed, *pairs, *prompts)
    return {name: dump_jsonl(rows) for name, rows in zip(_names(), records, strict=True)}


def _without_solution(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("steps", "labels")}


def _make_pairs(right: list[dict], wrong: list[dict]) -> list[dict]:
    """A right solution of each problem against one with an error in it."""
    pairs = []
    for good, bad in zip(right, wrong, strict=True):
        answers = {"chosen": "\n".join(good["steps"]), "rejected": "\n".join(bad["steps"])}
        row = _without_solution(good)
        del row["answer"]
        pairs.append(row | answers)
    return pairs


def _mix_prompts(problems: list[dict], general: list[str], seed: int) -> list[dict]:
    rows = [*problems, *({"prompt": text} for text in general)]
    rng = Random(f"mixture/{seed}")
    keys = [rng.random() for _ in rows]
    return [rows[index] for index in sorted(range(len(rows)), key=keys.__getitem__)]


class _Manifest(Record):
    parameters: dict[str, int | str]
    sha256: dict[str, str]


def _read_manifest(path: Path) -> dict[str, dict]:
    """The manifest of an earlier call; empty if there is none.

    Raises:
        UserError: the file is none of ours, or damaged.
    """
    try:
        return read_record(path, _Manifest).model_dump()
    except FileNotFoundError:
        return {}
    except Unreadable as error:
        message = f"{path}: this file is not as the demo wrote it ({error})"
        raise UserError(f"{message}; move it away or choose another folder") from None
