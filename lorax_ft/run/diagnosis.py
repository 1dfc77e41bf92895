"""What the log of a finished run says went wrong, in a sentence with what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TOLERANCE = 0.01
"""A loss that rises by less than this fraction counts as level."""
NOISE = 3.0
"""A rise of the training loss by more than so many standard errors is no noise."""


def diagnose(
    lines: Sequence[Mapping[str, Any]],
    *,
    before: float | None,
    after: float | None,
    learning_rate: float,
) -> list[str]:
    """The warnings about a finished run, each a sentence with what to do; empty if all went well.

    Args:
      lines: the log, with the metrics of single steps.
      before: the validation loss before training; None without validation rows.
      after: the validation loss of the weights that were saved.
      learning_rate: the peak learning rate.
    """
    losses = _values(lines, "loss")
    norms = _values(lines, "grad_norm")
    warnings = []
    training_rose = _rises(losses)
    if training_rose:
        first, last = _ends(losses)
        warnings.append(
            f"the training loss rose, from {first:.2f} to {last:.2f}, instead of falling; lower "
            f"optim.learning_rate (it was {learning_rate:g})"
        )
    if before is not None and after is not None and after > (1 + TOLERANCE) * before:
        advice = f"lower optim.learning_rate (it was {learning_rate:g})"
        if len(losses) and np.greater(*_ends(losses)):
            advice = (
                "the training loss fell, so the model has overfitted: train for fewer steps, give "
                f"train.load_best, or lower optim.learning_rate (it was {learning_rate:g})"
            )
        warnings.append(
            f"the validation loss rose, from {before:.2f} to {after:.2f}, so the result is worse "
            f"than the model before training; {advice}"
        )
    if len(norms) and not norms[-_window(norms) :].any():
        warnings.append(
            f"the gradient norm was 0.0 at the last {_window(norms)} steps, so nothing was learned "
            f"there; lower optim.learning_rate (it was {learning_rate:g})"
        )
    return warnings


def _rises(losses: np.ndarray) -> bool:
    """Whether the losses at the end are higher than at the start, by more than their noise."""
    if len(losses) < 3:
        return False
    first, last = _ends(losses)
    # Differences of neighbors show the noise of single batches, whatever the trend.
    noise = np.std(np.diff(losses)) / np.sqrt(2)
    error = noise * np.sqrt(2 / _window(losses))
    return last - first > max(TOLERANCE * first, NOISE * error)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The means over the first and the last tenth."""
    window = _window(values)
    return float(values[:window].mean()), float(values[-window:].mean())


def _window(values: np.ndarray) -> int:
    return max(len(values) // 10, 1)


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines if line.get(name) is not None], np.float64)
