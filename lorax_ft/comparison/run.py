"""A comparison from its config to the report: what `lorax-ft compare` calls."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lorax_ft.comparison.accuracy import accuracy_rows
from lorax_ft.comparison.benchmark import Task, read_task
from lorax_ft.comparison.design import Design, with_two_sets
from lorax_ft.comparison.document import (
    CURVES_PLOT,
    RATES_PLOT,
    Tables,
    accuracy_cells,
    accuracy_headers,
    as_json,
    headers,
    markdown,
    table_cells,
)
from lorax_ft.comparison.methods import (
    DATA,
    METHODS,
    Method,
    chosen_methods,
    config_of,
    reference_of,
)
from lorax_ft.comparison.plots import plot_curves, plot_rates
from lorax_ft.comparison.runs import MethodRuns, Runner
from lorax_ft.comparison.table import (
    best_rates,
    common_rates,
    rows_at_best_rates,
    rows_at_common_rate,
)
from lorax_ft.config import Config
from lorax_ft.files import write_file
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.locate import read_model_config
from lorax_ft.run.folder import is_empty, write_text
from lorax_ft.run.inputs import check_inputs
from lorax_ft.run.report import make_console, make_table
from lorax_ft.sweep.axes import describe
from lorax_ft.sweep.results import RESULTS

SUFFIX = "-comparison"
REPORT, FIGURES, DESIGN = "comparison.md", "comparison.json", "design.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of a comparison."""

    folder: Path
    methods: Mapping[str, MethodRuns]
    common: Tables
    """At the common rate."""
    best: Tables
    """Each at its best rate."""


def compare(
    config: Config,
    design: Design,
    *,
    methods: Sequence[str],
    parallel: int = 16,
    command: str | None = None,
) -> Comparison:
    """Train each method at several rates and seeds, and say which differences are not noise.

    Args:
      config: what all methods share; train.output names the folder, with "-comparison" behind it.
        Methods that it already holds are kept (train.resume).
      design: rates, seeds and benchmark.
      methods: names of `METHODS`, or entries such as "r64=lora adapter.rank=64"
        (`chosen_methods`).
      parallel: runs that train together, at most.
      command: the command line that started the comparison.

    Raises:
      ValueError: bad input, or a method that the model cannot be trained with.
    """
    chosen = chosen_methods(methods)
    folder = Path(config.train.output + SUFFIX)
    console = make_console()
    # Checked before the first of them is trained, and before a folder is overwritten.
    _check_methods(chosen.values(), config)
    task = _read_inputs(config, design)
    prepare(folder, config, design, chosen)
    if task is None:
        config = with_two_sets(config, folder / DATA)
    else:
        config = task.write(config, folder / DATA)
    runner = Runner(design, console, folder, parallel=parallel, task=task)
    done: dict[str, MethodRuns] = {}
    # One method after the other: they differ in their leaves, and so in their programs.
    for number, (name, method) in enumerate(chosen.items(), 1):
        console.print(f"\n[bold]{method.label}[/bold] ({number} of {len(chosen)})")
        done[name] = runner.run(name, method, config)
    common, best = _tables(done, design, task, runner, config)
    result = Comparison(folder=folder, methods=done, common=common, best=best)
    if jax.process_index() == 0:
        _write(result, design, command=command, config=config)
    _print(console, common, title=f"At the common rate {design.common_rate:g}")
    _print(console, best, title="Each at its best rate")
    console.print(f"\n{folder / REPORT} has the report, {folder / FIGURES} all figures.")
    return result


def _check_methods(methods: Iterable[Method], config: Config) -> None:
    """Raise if a method does not fit the config, or its virtual tokens the model's positions."""
    model = config.model
    fields = read_model_config(model.path, revision=model.revision)
    positions = decoder_config(fields, source=model.path).max_positions
    for method in methods:
        its = config_of(method, config)
        count, length = its.prompt.count, its.data.max_length
        # The positions of a packed row start anew in each sample.
        if count and length != "auto" and length > positions and not its.data.pack:
            raise ValueError(
                f"{method.label}: data.max_length {length}, {count} of them virtual tokens, is "
                f"above the model's {positions} positions; give {positions - count} or less to all "
                "methods, or auto"
            )


def _read_inputs(config: Config, design: Design) -> Task | None:
    """The task of a benchmark, if there is one; else the config's own data are checked."""
    if design.benchmark is not None:
        return read_task(design.benchmark, limit=design.benchmark_limit)
    check_inputs(config)
    return None


def _tables(
    done: Mapping[str, MethodRuns],
    design: Design,
    task: Task | None,
    runner: Runner,
    config: Config,
) -> tuple[Tables, Tables]:
    """The tables at the common rate, and at each method's best."""
    common = Tables(losses=rows_at_common_rate(done, design))
    best = Tables(losses=rows_at_best_rates(done, design))
    if task is not None:
        ask = functools.partial(
            accuracy_rows,
            done,
            design=design,
            categories=task.categories,
            before=runner.answers_before(config),
        )
        common = Tables(losses=common.losses, accuracies=ask(common_rates(done, design)))
        best = Tables(losses=best.losses, accuracies=ask(best_rates(done)))
    return common, best


def _write(result: Comparison, design: Design, *, command: str | None, config: Config) -> None:
    """Write the report, the figures and the plots."""
    folder, methods = result.folder, result.methods
    plot_rates(methods, design, folder / RATES_PLOT)
    plot_curves(methods, design, folder / CURVES_PLOT)
    figures = as_json(methods, result.common, result.best)
    write_file(folder / FIGURES, figures)
    text = markdown(
        methods,
        result.common,
        result.best,
        design,
        title=f"Methods compared on {Path(config.model.path).name}",
        command=command,
        notes=_notes(config, methods),
    )
    write_file(folder / REPORT, text)


def prepare(folder: Path, config: Config, design: Design, methods: Mapping[str, Method]) -> None:
    """Make the folder, or check that it holds the comparison to resume."""
    values: dict[str, Any] = {
        "design": dataclasses.asdict(design),
        "config": json.loads(config.to_json()),
        "methods": {name: dict(method.settings) for name, method in methods.items()},
    }
    # As it will be read: JSON has no tuples.
    values = json.loads(json.dumps(values))
    file = folder / DESIGN
    held: dict[str, Any] = {}
    if file.is_file():
        held = json.loads(file.read_text())
    # One that ended before its first result, as by a mistake in the data, is no loss.
    has_results = bool(held) and any(folder.rglob(RESULTS))
    if not held:
        if config.train.resume == "always":
            raise ValueError(f"there is no comparison to resume in {folder}")
        # Only a comparison is overwritten, never another folder of this name.
        if not is_empty(folder):
            raise ValueError(
                f"{folder} is not empty, and holds no comparison; give another --train.output"
            )
    elif config.train.overwrite or (not has_results and config.train.resume != "always"):
        _remove(folder, held.get("methods", {}))
    elif config.train.resume == "never":
        raise ValueError(
            f"{folder} already holds a comparison; leave train.resume at auto to go on with it, or "
            "use --train.overwrite or another --train.output"
        )
    else:
        _check_same(folder, held, values)
        # A resumed comparison may have other methods; those that it leaves out keep their runs.
        values["methods"] = {**held.get("methods", {}), **values["methods"]}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=2) + "\n")


# These say what to do with the folder and how to read the data; the runs are the same.
_FREE = {"train": {"resume", "overwrite"}, "data": {"num_proc", "cache"}}


def _check_same(folder: Path, held: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise if a folder holds runs of another comparison."""
    # An older version wrote fewer fields; those have their defaults.
    old = json.loads(Config.from_json(json.dumps(held["config"])).to_json())
    sections = {"": (held["design"], values["design"])}
    for name, section in values["config"].items():
        sections[f"{name}."] = (old[name], section)
    for prefix, (before, now) in sections.items():
        free = _FREE.get(prefix.removesuffix("."), set())
        for field in sorted(now.keys() - free):
            if before.get(field) != now[field]:
                raise ValueError(
                    f"{prefix}{field} is {now[field]!r}, but the comparison in {folder} had "
                    f"{before.get(field)!r}; use the same value, or another --train.output"
                )
    for name, settings in values["methods"].items():
        if held.get("methods", {}).get(name, settings) != settings:
            raise ValueError(
                f"{folder} holds runs of {name} with other settings; give it another name, or "
                "another --train.output"
            )


def _remove(folder: Path, methods: Iterable[str]) -> None:
    """Delete what a comparison writes, and nothing else."""
    for name in (REPORT, FIGURES, RATES_PLOT, CURVES_PLOT):
        (folder / name).unlink(missing_ok=True)
    for name in (DATA, *methods):
        shutil.rmtree(folder / name, ignore_errors=True)


def _notes(config: Config, methods: Mapping[str, MethodRuns]) -> list[str]:
    """Facts about the runs, for the report."""
    adapter, train = config.adapter, config.train
    # Without folders, which say nothing to others who read the report.
    data = ", ".join(Path(path).name for path in config.data.train)
    steps = methods[reference_of(methods)].steps
    notes = [
        f"Model {Path(config.model.path).name}, {config.model.dtype}; data {data}, rows of at most "
        f"{config.data.max_length} tokens.",
        f"{steps} steps of {train.batch_size} rows; rank {adapter.rank}, alpha {adapter.alpha:g}, "
        f"dropout {adapter.dropout:g}, targets {' '.join(adapter.targets)}; "
        f"{config.optim.optimizer}, {config.optim.schedule} schedule.",
        f"{jax.device_count()} × {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, jax "
        f"{jax.__version__}.",
    ]
    for its in methods.values():
        if count := config_of(its.method, config).prompt.count:
            notes.append(
                f"{its.method.label}: {count} virtual tokens before each sample, beside its own."
            )
    # Others are known by their names.
    for name, its in methods.items():
        if name not in METHODS:
            notes.append(f"{name}: {describe(its.method.settings)}.")
    return notes


def _print(console: Console, tables: Tables, *, title: str) -> None:
    """Print the losses at some rates, and the accuracies if there are any."""
    _print_table(console, title, headers(tables.losses), map(table_cells, tables.losses))
    if tables.accuracies:
        heads = accuracy_headers(tables.accuracies)
        cells = map(accuracy_cells, tables.accuracies)
        _print_table(console, f"{title}: correct answers, in %", heads, cells)


def _print_table(
    console: Console, title: str, heads: Iterable[str], rows: Iterable[Sequence[str]]
) -> None:
    table = make_table(title)
    for head in heads:
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
