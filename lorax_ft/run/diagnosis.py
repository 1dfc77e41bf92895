"""What the log of a finished run says went wrong, in a sentence with what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TOLERANCE = 0.01
"""A loss that rises by less than this fraction counts as level."""
NOISE = 3.0
"""A change of the training loss by more than so many standard errors is no noise."""


def diagnose(
    lines: Sequence[Mapping[str, Any]],
    *,
    before: float | None,
    after: float | None,
    learning_rate: float,
) -> list[str]:
    """The warnings about a finished run, each with what to do; empty if all went well.

    The loss of the first step is that of the model before training.

    Args:
      lines: the log, with the metrics of single steps.
      before: the validation loss before training; None without validation rows.
      after: the validation loss of the weights that were saved.
      learning_rate: the peak learning rate.
    """
    losses = _values(lines, "loss")
    norms = _values(lines, "grad_norm")
    findings = []
    training = _change(losses)
    if training > 0:
        findings.append(f"the training loss rose {_from_to(losses[0], _end(losses))}")
    overfitted = False
    if before is not None and after is not None and _rose(before, after):
        findings.append(f"the validation loss rose {_from_to(before, after)}")
        overfitted = training < 0
    last = _last_tenth(norms)
    if len(last) and not last.any():
        findings.append(f"the gradient norm was 0.0 at the last {len(last)} steps")
    if not findings:
        return []
    advice = f"lower optim.learning_rate (it was {learning_rate:g})"
    if overfitted:
        advice = f"the training loss fell: train for fewer steps, give train.load_best, or {advice}"
    found = ", and ".join(findings)
    return [f"{found}; {advice}"]


def _rose(before: float, after: float) -> bool:
    """Whether a loss rose by more than what counts as level."""
    level = (1 + TOLERANCE) * before
    return after > level


def _change(losses: np.ndarray) -> int:
    """Whether the training loss rose (1), fell (-1) or did neither, as far as its noise shows."""
    if len(losses) < 3:
        return 0
    # Differences of neighbors show the noise of single batches, whatever the trend. Their median
    # is not moved by a few steps that exploded. 1.48 and √2 make it a standard deviation.
    differences = np.abs(np.diff(losses))
    noise = 1.48 * np.median(differences) / np.sqrt(2)
    # Of a difference between one loss and the mean of several.
    several = len(_last_tenth(losses))
    error = noise * np.sqrt(1 + 1 / several)
    change = _end(losses) - losses[0]
    smallest = max(TOLERANCE * losses[0], NOISE * error)
    if abs(change) <= smallest:
        return 0
    if change > 0:
        return 1
    return -1


def _from_to(before: float, after: float) -> str:
    """Both values with as many decimals as it takes to tell them apart, at least two."""
    decimals = 2
    while decimals < 8 and f"{before:.{decimals}f}" == f"{after:.{decimals}f}":
        decimals += 2
    return f"from {before:.{decimals}f} to {after:.{decimals}f}"


def _end(values: np.ndarray) -> float:
    """The mean over the last tenth."""
    return float(_last_tenth(values).mean())


def _last_tenth(values: np.ndarray) -> np.ndarray:
    """At least one of them, if there are any."""
    count = max(len(values) // 10, 1)
    return values[-count:]


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A metric's values, without those that were not finite, which the log has as null."""
    values = []
    for line in lines:
        if line.get(name) is not None:
            values.append(line[name])
    return np.array(values, np.float64)
