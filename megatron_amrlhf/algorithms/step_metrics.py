"""How well a PRM tells right steps from wrong ones."""

from __future__ import annotations

import math

import numpy as np


def step_metrics(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    """Accuracy and area under the ROC curve over labelled steps.

    Args:
        scores: ``[S]`` head outputs.
        labels: ``[S]`` in [0, 1]; a step is right from 0.5 on.
        threshold: a score above it says "right" (0 for a logit, 0.5 for a value in [0, 1]).

    Returns:
        ``eval/step_accuracy`` and ``eval/step_auc``; the AUC is nan if only one class is present.
    """
    right = labels >= 0.5
    if not scores.size:
        return {"eval/step_accuracy": math.nan, "eval/step_auc": math.nan}
    both = right.any() and not right.all()
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - heavy

    return {
        "eval/step_accuracy": float(((scores > threshold) == right).mean()),
        "eval/step_auc": float(roc_auc_score(right, scores)) if both else math.nan,
    }
