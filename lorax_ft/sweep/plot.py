"""The plot of a sweep: the final validation loss against one axis, with a line for each other.

Points that differ in their seed only are one: their mean, with their range as a band.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorax_ft.sweep.agree import SEED
from lorax_ft.sweep.axes import describe, describe_value
from lorax_ft.sweep.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_CHOICE = "optim.learning_rate"
"""The field on the horizontal axis, where it varies."""
COLORS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#b10026", "#8c6d31", "#525252", "#c51b8a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Curve = dict[Any, list[float]]
"""The losses of all seeds by the value on the horizontal axis."""


def plot_sweep(results: Results, file: Path, *, steps: int, title: str) -> None:
    """Draw the loss at the step `steps` of all points that reached it, and save it as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = _horizontal(results)
    curves, diverged = _curves(results, across, steps)
    # Without pyplot, because its global state would change the caller's figures.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = _values(curves, diverged)
    is_number = all(isinstance(value, int | float) for value in values)
    # Names stand side by side.
    places = dict(zip(values, values if is_number else range(len(values)), strict=True))
    styles = itertools.cycle(zip(COLORS, MARKERS, strict=True))
    for (label, curve), (color, marker) in zip(curves.items(), styles, strict=False):
        _plot_curve(axes, curve, places, label=label, color=color, marker=marker)
    _plot_diverged(axes, [places[value] for value in diverged])
    _set_axes(axes, across, places, is_number=is_number)
    axes.set_ylabel(f"validation loss after {steps} steps (nats per token)")
    axes.set_title(title)
    if any(curves) or diverged:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def _horizontal(results: Results) -> str:
    """The field on the horizontal axis: the rate, or the first one that varies."""
    varied = _varied(results)
    if FIRST_CHOICE in varied:
        return FIRST_CHOICE
    fields = [field for field in varied if field != SEED]
    # A sweep of seeds alone, or of one point.
    fields += results.points[0].settings
    return fields[0]


def _varied(results: Results) -> list[str]:
    """The fields that have several values."""
    varied = []
    for field in results.points[0].settings:
        values = {point.settings[field] for point in results.points}
        if len(values) > 1:
            varied.append(field)
    return varied


def _curves(results: Results, across: str, steps: int) -> tuple[dict[str, Curve], list[Any]]:
    """The curves by label, and the horizontal values of the points that diverged."""
    shown = [field for field in _varied(results) if field not in (across, SEED)]
    has_seeds = SEED in results.points[0].settings
    curves: dict[str, Curve] = {}
    diverged = []
    for k, point in enumerate(results.points):
        loss = results.score(k, steps)
        label = describe({field: point.settings[field] for field in shown})
        label = label or ("mean and range over seeds" if has_seeds else "validation loss")
        if k in results.diverged:
            diverged.append(point.settings[across])
        elif math.isfinite(loss):
            curve = curves.setdefault(label, {})
            curve.setdefault(point.settings[across], []).append(loss)
    return curves, diverged


def _values(curves: Mapping[str, Curve], diverged: Sequence[Any]) -> list[Any]:
    """All horizontal values, numbers in their order."""
    found = dict.fromkeys([*itertools.chain(*curves.values()), *diverged])
    if all(isinstance(value, int | float) for value in found):
        return sorted(found)
    return list(found)


def _plot_curve(
    axes: Axes, curve: Curve, places: Mapping[Any, float], *, label: str, color: str, marker: str
) -> None:
    """The mean over seeds at each value, and the range over them."""
    values = sorted(curve, key=lambda value: places[value])
    x = [places[value] for value in values]
    # Seeds may be missing at a value where one diverged, so the losses are no matrix.
    losses = [curve[value] for value in values]
    mean = list(map(np.mean, losses))
    low = list(map(min, losses))
    high = list(map(max, losses))
    axes.plot(x, mean, color=color, marker=marker, markersize=5, label=label)
    if low != high:
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.vlines(x, low, high, color=color, linewidth=1)


def _plot_diverged(axes: Axes, x: Sequence[float]) -> None:
    """A cross at the upper edge for each point that diverged."""
    if x:
        # x in values, y as a share of the axis.
        transform = axes.get_xaxis_transform()
        axes.plot(x, [0.97] * len(x), "rx", transform=transform, label="diverged")


def _set_axes(axes: Axes, across: str, places: Mapping[Any, float], *, is_number: bool) -> None:
    """A logarithmic axis for positive numbers that span more than a factor of 4."""
    axes.set_xlabel(across)
    axes.grid(alpha=0.3)
    # Zero and negative numbers have no logarithm.
    if not is_number:
        axes.set_xticks(list(places.values()), list(map(describe_value, places)))
    elif min(places) > 0 and max(places) > 4 * min(places):
        axes.set_xscale("log")
