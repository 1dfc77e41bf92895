"""The report of a comparison as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.comparison.design import Design
from lorax_ft.comparison.intervals import Interval
from lorax_ft.comparison.runs import MethodRuns
from lorax_ft.comparison.table import Row

RATES_PLOT, CURVES_PLOT = "rates.png", "curves.png"


def markdown(
    methods: Mapping[str, MethodRuns],
    common: Sequence[Row],
    best: Sequence[Row],
    design: Design,
    *,
    title: str,
    command: str | None,
    notes: Sequence[str],
) -> str:
    """The report: what was done, both tables, the costs, and the plots.

    Args:
      methods: the runs of each method.
      common: the rows at the common rate.
      best: the rows at each method's best rate.
      design: rates and seeds.
      title: the heading.
      command: the command line that made it.
      notes: facts about model, data and machine.
    """
    seeds = ", ".join(map(str, design.seeds))
    rates = ", ".join(f"{rate:g}" for rate in design.rates)
    parts = [f"# {title}\n"]
    # From Python there is no command.
    if command:
        parts.append(f"```\n{command}\n```\n")
    parts += [f"- {note}" for note in notes]
    # Each part ends with an empty line, a list's items excepted.
    parts += [
        "",
        f"Seeds {seeds}: every method sees the same rows in the same order. Losses are nats per "
        "labeled token on rows that neither trained a run nor chose a rate. ± and brackets are "
        "95 % intervals over seeds (Student's t); differences are paired by seed. A difference is "
        "noise if its interval contains 0.\n",
        f"## At one common rate, {design.common_rate:g}\n",
        _table(common),
        "## Each method at its own best rate\n",
        f"Chosen by the mean loss of {_seeds(design.search_seeds)} on rows of their own, among "
        f"{rates} and beyond where the best was at the edge.\n",
        _table(best),
        f"![Loss against learning rate]({RATES_PLOT})\n",
        f"![Training loss]({CURVES_PLOT})\n",
        "## Cost of a run of its own\n",
        _costs(methods),
    ]
    return "\n".join(parts)


def as_json(methods: Mapping[str, MethodRuns], common: Sequence[Row], best: Sequence[Row]) -> str:
    """All figures: the rows of both tables, every run, and the costs."""
    tables = {
        "common_rate": [_row(row) for row in common],
        "best_rate": [_row(row) for row in best],
    }
    runs = {}
    for name, its in methods.items():
        runs[name] = {
            "best_rate": its.best_rate,
            "cost": dataclasses.asdict(its.cost),
            "runs": [dataclasses.asdict(run) for run in its.runs],
        }
    # JSON has no infinity.
    figures = _finite({"tables": tables, "methods": runs})
    return json.dumps(figures, indent=1) + "\n"


def table_cells(row: Row) -> list[str]:
    """A row of the tables in words: method, rate, loss, difference, verdict."""
    rate = f"{row.rate:g}" + (" (edge)" if row.at_edge else "")
    return [row.label, rate, _loss(row.loss), describe_difference(row.difference), row.verdict]


HEADERS = ("method", "rate", "loss", "difference to LoRA", "")


def describe_difference(difference: Interval | None) -> str:
    """A difference and its interval, such as "−0.0123 [−0.0200, −0.0046]"."""
    if difference is None:
        return ""
    mean, half = difference
    if not math.isfinite(mean):
        return ""
    text = f"{mean:+.4f}"
    # A single seed has no interval.
    if not math.isinf(half):
        text += f" [{mean - half:+.4f}, {mean + half:+.4f}]"
    # A minus is as wide as a plus, so that figures align; a hyphen is not.
    return text.replace("-", "−")


def _table(rows: Sequence[Row]) -> str:
    """A Markdown table; further sets have a column with the change of their loss."""
    others = list(rows[0].others)
    headers = [*HEADERS, *(f"change of the loss on {name}" for name in others)]
    lines = [_line(headers), _line(["---"] * len(headers))]
    for row in rows:
        changes = [_change(row.others[name]) for name in others]
        lines.append(_line([*table_cells(row), *changes]))
    return "\n".join(lines) + "\n"


def _costs(methods: Mapping[str, MethodRuns]) -> str:
    lines = [_line(["method", "parameters that train", "step", "memory of the step"])]
    lines.append(_line(["---"] * 4))
    for its in methods.values():
        cost = its.cost
        cells = [its.method.label, f"{cost.parameters:,}", f"{cost.seconds_per_step:.3f} s"]
        # Not every backend of XLA analyzes its memory.
        cells.append("" if cost.memory is None else f"{cost.memory / 1e6:,.0f} MB")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _loss(interval: Interval) -> str:
    return str(interval) if math.isfinite(interval.mean) else "diverged"


def _change(interval: Interval) -> str:
    mean, half = interval
    if not math.isfinite(mean):
        return "diverged"
    sign = "+" if mean >= 0 else "−"
    text = f"{sign}{abs(mean):.4f}"
    if math.isinf(half):
        return text
    return f"{text} ± {half:.4f}"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _row(row: Row) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    return {**values, "verdict": row.verdict}


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
