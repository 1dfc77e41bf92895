"""The plots of a comparison: the loss against the rate, and the training loss at the best rates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorax_ft.comparison.design import Design
from lorax_ft.comparison.runs import MethodRuns, Run
from lorax_ft.comparison.table import judged_set
from lorax_ft.run.plot import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    *("#525252", "#08519c", "#d94801", "#238b45", "#6a51a3", "#b10026", "#8c6d31", "#c51b8a"),
    *("#1d91c0", "#41ab5d", "#807dba", "#fd8d3c"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def plot_rates(methods: Mapping[str, MethodRuns], design: Design, file: Path) -> None:
    """The loss against the rate: a line for each method, the mean over seeds and their range."""
    figure, axes = _figure()
    for its, (color, marker) in zip(methods.values(), _styles(), strict=False):
        losses: dict[float, list[float]] = {}
        for run in its.runs:
            losses.setdefault(run.rate, []).append(run.losses[judged_set(run)])
        rates, means, low, high = [], [], [], []
        for rate, of_seeds in sorted(losses.items()):
            # A line ends where runs diverge.
            if not np.isfinite(of_seeds).all():
                continue
            rates.append(rate)
            means.append(float(np.mean(of_seeds)))
            low.append(min(of_seeds))
            high.append(max(of_seeds))
        axes.plot(rates, means, color=color, marker=marker, markersize=4, label=its.method.label)
        # Where a single seed was tried, the range is a point.
        axes.vlines(rates, low, high, color=color, linewidth=1)
    axes.axvline(design.common_rate, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    # The loss of a rate that is too high would flatten everything else.
    axes.set_yscale("log")
    axes.set_xlabel("learning rate (dotted: the common rate)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def plot_curves(methods: Mapping[str, MethodRuns], design: Design, file: Path) -> None:
    """The training loss of each method at its best rate, smoothed, the mean over seeds."""
    figure, axes = _figure()
    for its, (color, _) in zip(methods.values(), _styles(), strict=False):
        curve = _mean_curve(its.at(its.best_rate, design.seeds))
        if len(curve):
            label = f"{its.method.label} ({its.best_rate:g})"
            axes.plot(curve[:, 0], smooth(curve[:, 1]), color=color, linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss at the best rate (nats per token)")
    # What methods differ by at the end is small beside the fall at the start.
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def _mean_curve(runs: list[Run]) -> np.ndarray:
    """Steps and the mean training loss over the runs, `[N, 2]`."""
    # Of equal length: all runs log the same steps.
    curves = [np.array(run.curve) for run in runs if len(run.curve)]
    if not curves:
        return np.zeros((0, 2))
    return np.mean(curves, axis=0)


def _styles() -> Iterator[tuple[str, str]]:
    return itertools.cycle(zip(COLORS, MARKERS, strict=True))


def _figure() -> tuple[Figure, Axes]:
    # Slow to import. Without pyplot, because its global state would change the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
