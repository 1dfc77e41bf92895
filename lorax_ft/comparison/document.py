"""The report of a comparison as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft.comparison.accuracy import AccuracyRow
from lorax_ft.comparison.design import Design
from lorax_ft.comparison.intervals import Interval
from lorax_ft.comparison.runs import MethodRuns
from lorax_ft.comparison.table import Row

RATES_PLOT, CURVES_PLOT = "rates.png", "curves.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """The methods at some rates: their losses, and their answers to a benchmark's questions."""

    losses: Sequence[Row]
    accuracies: Sequence[AccuracyRow] = ()
    """Empty without a benchmark."""


def markdown(
    methods: Mapping[str, MethodRuns],
    common: Tables,
    best: Tables,
    design: Design,
    *,
    title: str,
    command: str | None,
    notes: Sequence[str],
) -> str:
    """The report: what was done, both tables, the costs, and the plots.

    Args:
      methods: the runs of each method.
      common: the tables at the common rate.
      best: the tables at each method's best rate.
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
        *_tables(common),
        "## Each method at its own best rate\n",
        f"Chosen by the mean loss of {_seeds(design.search_seeds)} on rows of their own, among "
        f"{rates} and beyond where the best was at the edge.\n",
        *_tables(best),
        f"![Loss against learning rate]({RATES_PLOT})\n",
        f"![Training loss]({CURVES_PLOT})\n",
        "## Cost of a run of its own\n",
        _costs(methods),
    ]
    return "\n".join(parts)


def as_json(methods: Mapping[str, MethodRuns], common: Tables, best: Tables) -> str:
    """All figures: the rows of all tables, every run, and the costs."""
    tables: dict[str, Any] = {
        "common_rate": [_row(row) for row in common.losses],
        "best_rate": [_row(row) for row in best.losses],
    }
    if common.accuracies:
        tables["accuracy_at_common_rate"] = [_row(row) for row in common.accuracies]
        tables["accuracy_at_best_rate"] = [_row(row) for row in best.accuracies]
    runs = {}
    for name, its in methods.items():
        runs[name] = {
            "settings": its.method.settings,
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


def headers(rows: Sequence[Row]) -> list[str]:
    """The headers of a table of `table_cells`."""
    (reference,) = [row.label for row in rows if row.difference is None]
    return ["method", "rate", "loss", f"difference to {reference}", "verdict"]


def accuracy_cells(row: AccuracyRow) -> list[str]:
    """A row of a table of accuracies, in percent."""
    cells = [row.label, "" if row.rate is None else f"{row.rate:g}"]
    for share in row.categories.values():
        cells.append(f"{100 * share.mean:.1f}")
    for difference in (row.over_seeds, row.over_questions):
        cells.append(describe_difference(_percent(difference), digits=1))
    return [*cells, row.verdict]


def accuracy_headers(rows: Sequence[AccuracyRow]) -> list[str]:
    """The headers of a table of `accuracy_cells`."""
    categories = rows[0].categories
    return [
        *("method", "rate"),
        *categories,
        *("difference, seeds", "difference, questions", "verdict"),
    ]


def describe_difference(difference: Interval | None, *, digits: int = 4) -> str:
    """A difference and its interval, such as "−0.0123 [−0.0200, −0.0046]"."""
    if difference is None:
        return ""
    mean, half = difference
    if not math.isfinite(mean):
        return ""
    text = f"{mean:+.{digits}f}"
    # A single seed has no interval.
    if not math.isinf(half):
        text += f" [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"
    # A minus is as wide as a plus, so that figures align; a hyphen is not.
    return text.replace("-", "−")


def _tables(tables: Tables) -> list[str]:
    """The Markdown of the tables at some rates."""
    parts = [_losses(tables.losses)]
    if tables.accuracies:
        parts.append(_accuracies(tables.accuracies))
    return parts


def _losses(rows: Sequence[Row]) -> str:
    """The table of losses; further sets have a column with the change of their loss."""
    others = list(rows[0].others)
    changes = [f"change of the loss on {name}" for name in others]
    lines = []
    for row in rows:
        cells = [_change(row.others[name]) for name in others]
        lines.append([*table_cells(row), *cells])
    return _table([*headers(rows), *changes], lines)


def _accuracies(rows: Sequence[AccuracyRow]) -> str:
    """The table of accuracies."""
    note = (
        "Correct answers to the questions that nothing was trained on, in percent. The first "
        "interval is over seeds, the second one over questions; a difference is noise if one of "
        "them contains 0.\n"
    )
    table = _table(accuracy_headers(rows), [accuracy_cells(row) for row in rows])
    return f"{note}\n{table}"


def _percent(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    return Interval(100 * interval.mean, 100 * interval.half_width)


def _costs(methods: Mapping[str, MethodRuns]) -> str:
    lines = []
    for its in methods.values():
        cost = its.cost
        cells = [its.method.label, f"{cost.parameters:,}", f"{cost.seconds_per_step:.3f} s"]
        # Not every backend of XLA analyzes its memory.
        cells.append("" if cost.memory is None else f"{cost.memory / 1e6:,.0f} MB")
        lines.append(cells)
    return _table(["method", "parameters that train", "step", "memory of the step"], lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = []
    for cells in (heads, ["---"] * len(heads), *rows):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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


def _row(row: Row | AccuracyRow) -> dict[str, Any]:
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
