"""What an evaluation shows and writes: a table, a bar chart, JSON and the answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from lorax_ft.evaluation.estimates import NORMAL_95, Estimate
from lorax_ft.evaluation.items import Scores
from lorax_ft.files import named_errors, write_file
from lorax_ft.run.evaluation import Result, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"base": "#737373", "off": "#9ecae1", "on": "#08519c"}
SUBJECT_ROWS = 20
"""More subjects than this are only in the file."""


class _Row(NamedTuple):
    """A line of the table."""

    name: str
    scores: Mapping[str, Estimate]
    """By variant."""
    differences: Mapping[str, Estimate]
    """By pair of variants."""


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Prints a table for each task: means ± standard errors, and differences with intervals."""
    for result in results:
        console.print(_table(result))
        for name, outcome in result.outcomes.items():
            for metric, value in outcome.corpus.items():
                console.print(f"  {metric} of all answers, {describe(name)}: {100 * value:.2f}")
    note = "± standard error"
    if len(results[0].outcomes) > 1:
        note += "; differences are paired, with their 95 % interval"
    console.print(note)


def write_results(folder: Path, results: Sequence[Result], *, model: Mapping[str, Any]) -> None:
    """Writes evaluation.json, evaluation.png and a file of answers for each task and variant."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": dict(model), "results": [result.to_json() for result in results]}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_file(folder / "evaluation.json", text + "\n")
    plot = folder / "evaluation.png"
    with named_errors(plot):
        plot_results(results).savefig(plot)
    # With numbers, as a kind of task may come several times.
    for number, result in enumerate(results, 1):
        for name, outcome in result.outcomes.items():
            # A loss has no answers.
            if not outcome.answers:
                continue
            lines = [json.dumps(line, ensure_ascii=False) for line in outcome.answers]
            file = folder / f"answers_{number}_{result.task.name}_{name}.jsonl"
            write_file(file, "\n".join(lines) + "\n")


def plot_results(results: Sequence[Result]) -> Figure:
    """Draws the means of each task as bars, with their 95 % intervals."""
    # Slow to import. Without pyplot, because its global state would change the caller's figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 3.2 * len(results)
    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # squeeze would give a single chart in place of an array of them.
    grid = figure.subplots(len(results), 1, squeeze=False)
    for axes, result in zip(grid[:, 0], results, strict=True):
        _plot_result(axes, result)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _plot_result(axes: Axes, result: Result) -> None:
    """Draws the metrics of a task side by side; all are of one unit."""
    rows: list[_Row] = []
    for metric in result.scores:
        rows.extend(_rows(result, metric, subjects=False))
        factor = _factor(metric)
    variants = list(result.outcomes)
    # The bars of a row share 0.8 of its width, side by side around its middle.
    width = 0.8 / len(variants)
    middle = (len(variants) - 1) / 2
    for number, variant in enumerate(variants):
        shift = (number - middle) * width
        places = []
        means = []
        halves = []
        for place, row in enumerate(rows):
            estimate = row.scores[variant]
            places.append(place + shift)
            means.append(factor * estimate.mean)
            # None where there is a single item: a bar without an interval.
            halves.append(factor * NORMAL_95 * (estimate.error or 0))
        axes.bar(
            places,
            means,
            width,
            yerr=halves,
            capsize=3,
            color=COLORS[variant],
            label=describe(variant),
        )
    axes.set_xticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats per token" if "loss" in result.scores else "%")
    axes.set_title(result.task.name)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _table(result: Result) -> Table:
    """The table of a task."""
    title = result.task.name
    if "loss" not in result.scores:
        title += ", in %"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("items", justify="right")
    variants = list(result.outcomes)
    for name in variants:
        table.add_column(describe(name), justify="right", no_wrap=True)
    # The others are in the file.
    pairs = [f"{name} - {variants[0]}" for name in variants[1:]]
    for pair in pairs:
        table.add_column(pair, justify="right")
    for metric, scores in result.scores.items():
        subjects = scores[variants[0]].subjects
        # A single subject would repeat the averages.
        shows_subjects = 1 < len(subjects) <= SUBJECT_ROWS
        for row in _rows(result, metric, subjects=shows_subjects):
            cells = [str(row.scores[variants[0]].count)]
            for name in variants:
                cells.append(_with_error(row.scores[name], metric))
            for pair in pairs:
                cells.append(_with_interval(row.differences[pair], metric))
            table.add_row(row.name, *cells)
        if metric == "loss":
            perplexities = [_perplexity(scores[name].total) for name in variants]
            table.add_row("perplexity", "", *perplexities)
        if len(subjects) > SUBJECT_ROWS:
            table.caption = f"evaluation.json has the {len(subjects)} subjects"
    return table


def _rows(result: Result, metric: str, *, subjects: bool) -> Iterator[_Row]:
    """The lines of a metric: averages, categories, and perhaps subjects."""
    scores, differences = result.scores[metric], result.differences.get(metric, {})

    def row(name: str, part: Any) -> _Row:
        own = {variant: part(score) for variant, score in scores.items()}
        paired = {pair: part(score) for pair, score in differences.items()}
        return _Row(name, own, paired)

    first: Scores = next(iter(scores.values()))
    if first.macro is None:
        yield row(metric, lambda score: score.total)
        return
    yield row("micro average", lambda score: score.total)
    yield row("macro average", lambda score: score.macro)
    # The name is a default, for a function looks up a loop's variable when it is called.
    for category in first.categories:
        yield row(category, lambda score, name=category: score.categories[name][0])
    if subjects:
        for subject in first.subjects:
            yield row(f"  {subject}", lambda score, name=subject: score.subjects[name])


def _factor(metric: str) -> int:
    """Fractions are shown in percent."""
    return 1 if metric == "loss" else 100


def _digits(metric: str) -> int:
    """Digits after the point."""
    return 4 if metric == "loss" else 2


def _with_error(estimate: Estimate, metric: str) -> str:
    """A mean ± its standard error."""
    factor = _factor(metric)
    digits = _digits(metric)
    text = f"{factor * estimate.mean:.{digits}f}"
    if estimate.error is None:
        return text
    return f"{text} ± {factor * estimate.error:.{digits}f}"


def _with_interval(estimate: Estimate, metric: str) -> str:
    """A difference with its sign and its interval."""
    factor = _factor(metric)
    digits = _digits(metric)
    text = f"{factor * estimate.mean:+.{digits}f}"
    if estimate.interval is None:
        return text
    low, high = estimate.interval
    return f"{text} [{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]"


def _perplexity(loss: Estimate) -> str:
    """exp(loss), with the interval that exp of the loss's interval is."""
    text = f"{math.exp(loss.mean):.2f}"
    if loss.interval is None:
        return text
    low, high = loss.interval
    return f"{text} [{math.exp(low):.2f}, {math.exp(high):.2f}]"
