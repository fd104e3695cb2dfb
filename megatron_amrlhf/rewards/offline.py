"""Statistics of a data set's token scores: written by tools/score_tokens.py, read by runs.

A folder has ``scores.safetensors`` (``scores`` [N] float32, of all answers one after the other,
``offsets`` [answers + 1] int64) and ``statistics.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.reading import Record, checked, read_json

SCORES_NAME, STATISTICS_NAME = "scores.safetensors", "statistics.json"
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class ScoreStatistics(Record):
    """Statistics over all scored tokens, raw reward units.

    Attributes:
        count: tokens.
        num_answers: answers they are of.
        mean: arithmetic mean.
        std: population standard deviation.
        median: quantile 0.5.
        quantiles: level, as text, to the largest score that at most that share is below
            (linear between scores).
        prm: fingerprint of the PRM's weights.
        attribute_weights: of the scalar reward; None: the mean of the attributes.
        data: sha256 of the file of answers.
    """

    count: PositiveInt
    num_answers: PositiveInt
    mean: float
    std: NonNegativeFloat
    median: float
    quantiles: dict[str, float]
    prm: str
    attribute_weights: list[float] | None
    data: str

    def as_json(self) -> str:
        """The content of ``statistics.json``."""
        return json.dumps(self.model_dump(), indent=1) + "\n"


def score_statistics(
    scores: np.ndarray, num_answers: int, prm: str, attribute_weights: Any, data: str
) -> ScoreStatistics:
    """Statistics of ``[N]`` finite scores, N > 0, computed in float64."""
    assert scores.size and np.isfinite(scores).all()
    wide = scores.astype(np.float64)
    return ScoreStatistics(
        count=int(wide.size),
        num_answers=num_answers,
        mean=float(wide.mean()),
        std=float(wide.std()),
        median=float(np.median(wide)),
        quantiles={f"{level:g}": float(np.quantile(wide, level)) for level in LEVELS},
        prm=prm,
        attribute_weights=None if attribute_weights is None else list(attribute_weights),
        data=data,
    )


@dataclass(frozen=True)
class OfflineScores:
    """What a run takes from a statistics file.

    Attributes:
        baseline: the configured statistic, raw reward units.
        mean: for normalisation.
        std: for normalisation and for delta in deviations.
    """

    baseline: float
    mean: float
    std: float

    def state_dict(self) -> dict[str, float]:
        """The numbers that a checkpoint keeps; which statistic is b is configuration."""
        return {"mean": self.mean, "std": self.std}

    def check_same(self, state: dict[str, float] | None, path: str) -> None:
        """Whether a checkpoint was made with these scores; None: with none.

        Raises:
            UserError: it was made with others.
        """
        if state is not None and state != self.state_dict():
            raise UserError(
                f"mask.offline_file: {path} is not what the checkpoint was trained with (mean "
                f"{self.mean:.6g}, then {state['mean']:.6g}; deviation {self.std:.6g}, then "
                f"{state['std']:.6g}); put it back, set checkpoint.accept_changed_data: true to go "
                "on all the same, or use another run.name"
            )


def load_offline(
    path: str | Path,
    statistic: str,
    quantile: float,
    prm: str,
    attribute_weights: tuple[float, ...] | None,
) -> OfflineScores:
    """Reads and checks a statistics file.

    Args:
        path: ``statistics.json`` with its scores beside it.
        statistic: ``mean``, ``median`` or ``quantile``.
        quantile: the level for ``quantile``, in [0, 1].
        prm: fingerprint of this run's PRM.
        attribute_weights: of this run.

    Raises:
        UserError: the file is missing, malformed, or from another PRM or other weights.
    """
    file = expanded(path)
    found = _read(file)
    if found.prm != prm:
        raise UserError(
            f"mask.offline_file: {file} has scores of another PRM ({_short(found.prm)}, this run's "
            f"is {_short(prm)}): score the data with this one by tools/score_tokens.py"
        )
    wanted = None if attribute_weights is None else list(attribute_weights)
    if found.attribute_weights != wanted:
        raise UserError(
            f"mask.offline_file: {file} was made with reward_model.attribute_weights "
            f"{found.attribute_weights}, this run has {wanted}: use the same"
        )
    baseline = {"mean": found.mean, "median": found.median}.get(statistic)
    if baseline is None:
        assert statistic == "quantile", statistic
        scores = _scores(file, found.count)
        baseline = float(np.quantile(scores.astype(np.float64), quantile))
    return OfflineScores(baseline=baseline, mean=found.mean, std=found.std)


def _read(file: Path) -> ScoreStatistics:
    try:
        return checked(ScoreStatistics, _checked_keys(read_json(file)))
    except FileNotFoundError as error:
        raise UserError(f"mask.offline_file: {file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(
            f"mask.offline_file: {file}: no statistics file of tools/score_tokens.py: {error}"
        ) from None


def _checked_keys(content: Any) -> dict[str, Any]:
    """A JSON file's content, which must be an object with the keys of ``ScoreStatistics``."""
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    known, found = ScoreStatistics.model_fields.keys(), content.keys()
    wrong = {"lacks": known - found, "has unknown": found - known}
    if texts := [f"{what} {', '.join(sorted(keys))}" for what, keys in wrong.items() if keys]:
        raise ValueError(f"it {' and '.join(texts)}")
    return content


def _short(fingerprint: str) -> str:
    """Enough of a fingerprint: of its weights the beginning, of marker and separator all."""
    weights, space, rows = fingerprint.partition(" ")
    return weights[:12] + space + rows


def _scores(file: Path, count: int) -> np.ndarray:
    """The ``count`` scores beside a statistics file."""
    beside = file.with_name(SCORES_NAME)
    try:
        scores = load_file(beside)["scores"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"mask.offline_file: quantiles are read from {beside}, which cannot be ({error})"
        ) from None
    if scores.shape != (count,) or not count or not np.isfinite(scores).all():
        raise UserError(
            f"mask.offline_file: {beside} has not the {count} finite scores that {file} is about: "
            "score the data again"
        )
    return scores
