"""What is scored and where it goes: parts that another start goes on from, then the whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from megatron_amrlhf.checkpoint.files import write_tensors, write_text
from megatron_amrlhf.commands.precision import MODEL_KEY, REWARD_KEY
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.answers import GivenAnswer
from megatron_amrlhf.data.jsonl import dump_jsonl
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.engine.role import DTYPES
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.reward_models import RewardModel
from megatron_amrlhf.reading import Unreadable, read_object
from megatron_amrlhf.rewards.offline import SCORES_NAME, STATISTICS_NAME, score_statistics
from megatron_amrlhf.rewards.outcome import step_probabilities

PARTS, KEY_NAME, ANSWERS_NAME = "parts", "key.json", "answers.jsonl"


@dataclass(frozen=True)
class Job:
    """What is scored, by what, and where it goes.

    Attributes:
        config: the run whose PRM, tokenizer and layout are used.
        answers: the answers, in the file's order.
        selection: what became of the file's rows.
        models: the reward models with a weight.
        folder: where the results go.
        part_size: answers scored between two saves.
        key: what the parts depend on; scores of another key are not mixed with these.
    """

    config: Config
    answers: list[GivenAnswer]
    selection: Selection
    models: tuple[RewardModel, ...]
    folder: Path
    part_size: int
    key: dict

    @property
    def num_without_steps(self) -> int:
        """Answers that are not given in steps: with one of them no steps' scores are written."""
        return sum(not answer.step_ends for answer in self.answers)

    @property
    def num_parts(self) -> int:
        return -(-len(self.answers) // self.part_size)

    def part(self, number: int) -> range:
        """The answers of a part."""
        start = number * self.part_size
        return range(start, min(start + self.part_size, len(self.answers)))


def read_key(file: Path) -> dict | None:
    """What the scores that are there depend on; None: there are none.

    Raises:
        UserError: it cannot be read, or there are files that would be written over.
    """
    try:
        return read_object(file)
    except FileNotFoundError:
        names = (SCORES_NAME, STATISTICS_NAME, ANSWERS_NAME, PARTS)
        if there := [name for name in names if (file.parent / name).exists()]:
            raise UserError(
                f"--out: {file.parent} has {', '.join(there)}, which would be written over: "
                "choose another folder"
            ) from None
        return None
    except Unreadable as error:
        raise UserError(f"--out: {file}: {error}; choose another folder") from None


def check_key(file: Path, key: dict) -> None:
    """Checks that the scores that are there, if any, are those that would be made.

    Raises:
        UserError: they are others, or `read_key`'s errors.
    """
    found = read_key(file)
    if found is None:
        return
    other = [name for name, value in key.items() if found.get(name) != value]
    if other:
        raise UserError(
            f"--out: {file.parent} holds scores with other {', '.join(other)}: choose another "
            "folder or delete it"
        )


def kept_dtypes(job: Job) -> dict[str, str]:
    """The dtype of the scores that are there, as this goes on with them."""
    dtype = (read_key(job.folder / KEY_NAME) or {}).get("dtype")
    return dict.fromkeys((MODEL_KEY, REWARD_KEY), dtype) if dtype in DTYPES else {}


def parts_done(job: Job) -> set[int]:
    """Parts that are there, whole."""
    done = set()
    for number in range(job.num_parts):
        try:
            counts = load_file(_part_file(job, number))["counts"]
        except (OSError, SafetensorError, KeyError):
            continue
        if counts.size == len(job.part(number)):
            done.add(number)
    return done


def _part_file(job: Job, number: int) -> Path:
    return job.folder / PARTS / f"{number:06d}.safetensors"


def save_part(job: Job, number: int, tensors: dict[str, Tensor] | None) -> None:
    """Writes a part's scores; None: this rank has none of them.

    Raises:
        UserError: a score is not finite.
    """
    if tensors is None:
        return
    for place, row in enumerate(tensors["scores"].split(tensors["counts"].tolist())):
        whole = tensors["orm"][place] if "orm" in tensors else row
        if not (row.isfinite().all() and whole.isfinite().all()):
            where = job.answers[job.part(number)[place]].where
            raise UserError(f"{where}: a score of this answer is not finite")
    write_tensors(_part_file(job, number), tensors, {"format": "pt"})


def finish(job: Job) -> None:
    """Puts the parts together: scores, statistics, and the steps' scores where steps are given."""
    parts = [load_file(_part_file(job, number)) for number in range(job.num_parts)]
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    offsets = np.concatenate([[0], np.cumsum(merged.pop("counts"))])
    tensors = {name: torch.from_numpy(values) for name, values in merged.items()}
    tensors["offsets"] = torch.from_numpy(offsets)
    write_tensors(job.folder / SCORES_NAME, tensors, {"format": "pt"})
    statistics = score_statistics(
        merged["scores"],
        len(job.answers),
        job.key["models"]["prm"],
        job.key["attribute_weights"],
        job.key["data"],
    )
    write_text(job.folder / STATISTICS_NAME, statistics.as_json())
    if not job.num_without_steps:
        lines = dump_jsonl(_step_lines(job, merged, offsets.tolist())).decode()
        write_text(job.folder / ANSWERS_NAME, lines)


def _step_lines(job: Job, merged: dict[str, np.ndarray], offsets: list[int]) -> list[dict]:
    """One line an answer, as tools/compare_supervision.py reads them."""
    lines, outputs = [], torch.from_numpy(merged["scores"])
    scores = step_probabilities(outputs, job.config.reward_model.output).numpy()
    for number, answer in enumerate(job.answers):
        ends = offsets[number] + np.array(answer.step_ends)
        line = {**answer.extra, "step_scores": [round(float(x), 6) for x in scores[ends]]}
        if "orm" in merged:
            line["orm"] = float(merged["orm"][number])
        lines.append(line)
    return lines
