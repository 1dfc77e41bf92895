"""The plot of a plan for several topologies: how the estimate of a step grows with the chips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorax_ft.plan.chips import Topology
from lorax_ft.plan.search import Candidate


def plot_scaling(planned: Sequence[tuple[Topology, Candidate]], file: Path) -> None:
    """The parts of a step's time, and the share of it in which a chip computes."""
    # Slow to import. Without pyplot, because its global state would change the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compiled = []
    for topology, candidate in planned:
        if candidate.estimate is not None:
            compiled.append((topology.devices, candidate.estimate))
    chips = [devices for devices, _ in compiled]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, color in (("compute", "#08519c"), ("memory", "#238b45"), ("network", "#d94801")):
        seconds = [getattr(each, name) for _, each in compiled]
        axes.plot(chips, seconds, marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(chips, [str(count) for count in chips])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("chips, as many rows on each")
    axes.set_ylabel("seconds of a step at peak speed (estimate)")
    right = axes.twinx()
    shares = [100 * each.efficiency for _, each in compiled]
    right.plot(chips, shares, color="black", linestyle=":", label="efficiency")
    right.set_ylim(0, 105)
    right.set_ylabel("share of the step in which a chip computes, in % (dotted)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)
