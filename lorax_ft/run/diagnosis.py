"""What the log of a finished run says went wrong, in a sentence with what to do."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 0.01
"""A loss that rises by less than this fraction counts as level."""
NOISE = 3.0
"""A change of the training loss by more than so many standard errors is no noise."""
SPIKE_WINDOW = 50
"""Losses that the next one is compared with."""
SPIKE_FEWEST = 20
"""With fewer earlier losses none is a spike: the loss still falls fast."""
SPIKE_NOISE = 6.0
"""A spike exceeds the median of the earlier losses by more than so many standard deviations."""
SPIKE_RISE = 0.5
"""And by more than this fraction of it."""


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
    spikes = find_spikes(lines)
    if spikes:
        step, loss, usual = max(spikes, key=lambda spike: spike.loss - spike.usual)
        times = "once" if len(spikes) == 1 else f"{len(spikes)} times"
        findings.append(
            f"the training loss spiked {times}, the most at step {step}, from {usual:.2f} to "
            f"{loss:.2f}"
        )
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


class Spike(NamedTuple):
    """A training loss that stands out from those before it."""

    step: int
    loss: float
    usual: float
    """The median of those before it."""


def find_spikes(lines: Sequence[Mapping[str, Any]]) -> list[Spike]:
    """The spikes of the training loss in a log."""
    spikes = []
    earlier: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
    for line in lines:
        loss = line.get("loss")
        if loss is None:
            continue
        usual = is_spike(earlier, loss)
        if usual is not None:
            spikes.append(Spike(line["step"], loss, usual))
        earlier.append(loss)
    return spikes


def is_spike(earlier: Sequence[float], loss: float) -> float | None:
    """The median of the losses before this one, if this one stands out from them; else None."""
    if len(earlier) < SPIKE_FEWEST:
        return None
    usual = float(np.median(earlier))
    rise = loss - usual
    smallest = max(SPIKE_RISE * usual, SPIKE_NOISE * _noise(np.array(earlier)))
    return usual if rise > smallest else None


def _noise(losses: np.ndarray) -> float:
    """The standard deviation of losses around their trend.

    Differences of neighbors show the noise of single batches, whatever the trend. Their median is
    not moved by a few steps that exploded. 1.48 and √2 make it a standard deviation.
    """
    differences = np.abs(np.diff(losses))
    return float(1.48 * np.median(differences) / np.sqrt(2))


def _rose(before: float, after: float) -> bool:
    """Whether a loss rose by more than what counts as level."""
    level = (1 + TOLERANCE) * before
    return after > level


def _change(losses: np.ndarray) -> int:
    """Whether the training loss rose (1), fell (-1) or did neither, as far as its noise shows."""
    if len(losses) < 3:
        return 0
    # Of a difference between one loss and the mean of several.
    several = len(_last_tenth(losses))
    error = _noise(losses) * np.sqrt(1 + 1 / several)
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
