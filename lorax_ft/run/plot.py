"""The plot of a run: losses above, gradient norm and learning rate below."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
"""The lines of a log."""
VALIDATION_COLORS = ("#d94801", "#238b45", "#6a51a3", "#b10026", "#8c6d31")
"""Colors of the validation sets, repeated if there are more."""


def plot_lines(lines: Lines, *, title: str) -> Figure | None:
    """Draw the losses, the gradient norm and the learning rate of a run's log.

    The training loss and the gradient norm are raw and smoothed. Each validation set has a curve.

    Returns:
      The figure, or None if the log has no training loss.
    """
    if not len(_curve(lines, "loss")):
        return None
    # Slow to import. Without pyplot, because its global state would change the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _plot_losses(above, lines)
    above.set_title(title)
    _plot_norms_and_rates(below, lines)
    below.set_xlabel("step")
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """The moving average over a twentieth of the values, at most 21; over fewer at both ends."""
    each_side = min(len(values) // 40, 10)
    window = np.ones(2 * each_side + 1)
    sums = np.convolve(values, window, "same")
    # At the ends the window covers fewer values, so their number is counted the same way.
    counts = np.convolve(np.ones(len(values)), window, "same")
    return sums / counts


def _plot_losses(axes: Axes, lines: Lines) -> None:
    training = _curve(lines, "loss")
    validation = _validation_curves(lines)
    points = np.concatenate([training, *validation.values()])
    log_scale = _is_steep(points[:, 1])
    _plot_raw_and_smooth(axes, training, "training loss", log_scale=log_scale)
    colors = itertools.cycle(VALIDATION_COLORS)
    for label, curve in validation.items():
        steps, losses = curve.T
        axes.plot(
            steps,
            losses,
            "o-",
            label=label,
            color=next(colors),
            markersize=5,
            linewidth=1,
        )
    best = [line["best_step"] for line in lines if "best_step" in line]
    if best:
        step = best[-1]
        axes.axvline(step, color="gray", linestyle=":", label=f"best step, {step}")
    axes.set_ylabel("loss (nats per token)")
    if log_scale:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _is_steep(losses: np.ndarray) -> bool:
    """Whether a linear axis would flatten everything after the first steps of a loss."""
    lowest = losses.min()
    return lowest > 0 and losses.max() > 20 * lowest


def _plot_norms_and_rates(axes: Axes, lines: Lines) -> None:
    """The gradient norm on the left axis, the learning rate on the right one."""
    norms = _curve(lines, "grad_norm")
    # A norm of 0 has no logarithm.
    positive = bool(len(norms)) and norms[:, 1].min() > 0
    _plot_raw_and_smooth(axes, norms, "gradient norm", log_scale=positive)
    if positive:
        axes.set_yscale("log")
    axes.set_ylabel("gradient norm")
    axes.grid(alpha=0.3)
    right = axes.twinx()
    steps, rates = _learning_rates(lines).T
    right.plot(steps, rates, color="#d94801", linewidth=1.5, label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    # One legend for both axes; each would make its own, one above the other.
    of_norms, _ = axes.get_legend_handles_labels()
    of_rates, _ = right.get_legend_handles_labels()
    axes.legend(handles=of_norms + of_rates, frameon=False)


def _plot_raw_and_smooth(axes: Axes, curve: np.ndarray, label: str, *, log_scale: bool) -> None:
    steps, values = curve.T
    axes.plot(steps, values, color="#9ecae1", linewidth=1, label=label)
    if len(values) >= 40:
        smoothed = smooth(values)
        if log_scale:
            # On a logarithmic axis, the mean of the logarithms lies in the middle of the points.
            smoothed = np.exp(smooth(np.log(values)))
        axes.plot(steps, smoothed, color="#08519c", linewidth=2, label=f"{label}, smoothed")


def _validation_curves(lines: Lines) -> dict[str, np.ndarray]:
    """The curve of each validation set, by its label."""
    curves: dict[str, np.ndarray] = {}
    for line in lines:
        for name in line:
            if not name.startswith("validation_loss"):
                continue
            _, _, set_name = name.partition("/")
            label = f"validation loss {set_name}".rstrip()
            if label not in curves:
                curves[label] = _curve(lines, name)
    return curves


def _learning_rates(lines: Lines) -> np.ndarray:
    """Steps and learning rates, `[points, 2]`: the largest of all groups of leaves (LoRA+)."""
    points = []
    for line in lines:
        rates = [value for name, value in line.items() if name.startswith("learning_rate")]
        if rates:
            points.append((line["step"], max(rates)))
    return np.array(points, np.float64).reshape(-1, 2)


def _curve(lines: Lines, name: str) -> np.ndarray:
    """Steps and values of a metric, `[points, 2]`, without those that were not finite."""
    points = []
    for line in lines:
        if line.get(name) is not None:
            points.append((line["step"], line[name]))
    # The shape holds without any points too.
    return np.array(points, np.float64).reshape(-1, 2)
