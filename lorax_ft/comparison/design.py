"""The design of a comparison: rates, seeds, and separate rows to choose by and to judge by.

The rate of a method is chosen by the loss on one half of the validation rows and judged by the loss
on the other half, so that no method profits from having more rates to choose from.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorax_ft.config import Config, DataConfig
from lorax_ft.data.bad_rows import BadRows
from lorax_ft.data.dataset import name_sets
from lorax_ft.data.sources import has_split, parse_sources, read_rows, split_limit
from lorax_ft.files import write_file
from lorax_ft.sweep.axes import Point, Settings, make_point

CHOOSE, TEST = "choose", "test"
"""The names of the two validation sets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What is trained of each method."""

    rates: tuple[float, ...]
    """Learning rates to try, rising by about equal factors."""
    common_rate: float
    """The rate at which all methods are compared beside their own best; one of `rates`."""
    seeds: tuple[int, ...]
    """Seeds of the compared runs."""
    search_seeds: int
    """How many of the seeds are trained at every rate."""
    benchmark: str | None = None
    """A folder of multiple-choice questions to train on and to judge by (`read_task`); None: the
    data of the config."""
    benchmark_limit: int | None = None
    """Questions of each subject to use; None: all."""

    def __post_init__(self) -> None:
        # With fewer than three, the best one is always at an edge.
        rising = sorted(set(self.rates))
        if len(self.rates) < 3 or list(self.rates) != rising:
            raise ValueError("--rates must be three or more different numbers, the smallest first")
        if self.common_rate not in self.rates:
            listed = ", ".join(f"{rate:g}" for rate in self.rates)
            raise ValueError(f"--common_rate {self.common_rate:g} is not one of --rates {listed}")
        if not 1 <= self.search_seeds <= len(self.seeds):
            raise ValueError(
                f"--search_seeds is {self.search_seeds}; it must be 1 to {len(self.seeds)}, the "
                "number of seeds"
            )

    @property
    def factor(self) -> float:
        """The mean factor between two rates."""
        whole = self.rates[-1] / self.rates[0]
        gaps = len(self.rates) - 1
        return float(whole ** (1 / gaps))


def points(config: Config, rates: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    """A point for each rate and seed."""
    made = []
    for number, (rate, seed) in enumerate(itertools.product(rates, seeds)):
        settings: Settings = {"optim.learning_rate": rate, "train.seed": seed}
        made.append(make_point(config, settings, number=number))
    return made


def with_two_sets(config: Config, folder: Path) -> Config:
    """The config with its validation rows split in two sets, to choose and to test by.

    Sets that the config names choose and test stay as they are. Otherwise the first set, or the
    only one, is split. Others stay behind these two: they show what is forgotten.

    Args:
      config: with validation files, or with a training folder that has the validation split.
      folder: where the two halves are written, every other row each.

    Raises:
      ValueError: there are no validation rows beside the training rows.
    """
    data = config.data
    sets = name_sets(data.validation)
    if CHOOSE in sets and TEST in sets:
        ordered = {name: sets.pop(name) for name in (CHOOSE, TEST)}
        return with_sets(config, {**ordered, **sets})
    # A single set without a name is called "".
    first = next(iter(sets), "")
    paths = sets.pop(first, None) or _training_folder(data)
    halves: dict[str, list[str]] = {CHOOSE: [], TEST: []}
    bad = BadRows(skip=data.bad_rows == "skip")
    rows = read_rows(paths, split=data.validation_split, revision=data.revision, bad=bad)
    for number, row in enumerate(rows):
        # Every other row, because files may be sorted by subject or difficulty.
        name = CHOOSE if number % 2 == 0 else TEST
        halves[name].append(json.dumps(row.fields, ensure_ascii=False))
    if not halves[TEST]:
        raise ValueError("a comparison needs at least two validation rows; give data.validation")
    files = {}
    for name, lines in halves.items():
        files[name] = [str(write_lines(folder / f"{name}.jsonl", lines))]
    return with_sets(config, {**files, **sets})


def with_sets(config: Config, sets: Mapping[str, Sequence[str]]) -> Config:
    """The config with these validation sets, the paths of each by name."""
    entries = []
    for name, paths in sets.items():
        # As data.validation names a set.
        entries += [f"{name}={path}" for path in paths]
    data = dataclasses.replace(config.data, validation=tuple(entries))
    return dataclasses.replace(config, data=data)


def write_lines(file: Path, lines: Sequence[str]) -> Path:
    """Write a file of lines, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, "\n".join(lines) + "\n")
    return file


def _training_folder(data: DataConfig) -> list[str]:
    """The folder or hub id of the training rows, which has validation rows too."""
    paths = [source.path for source in parse_sources(data.train)]
    # Of several sources, or of one without such a split, a run would hold out training rows, other
    # ones for each seed.
    if len(paths) == 1 and has_split(paths[0], data.validation_split):
        return [split_limit(paths[0])[0]]
    raise ValueError(
        "a comparison needs validation rows that are not trained on; give data.validation"
    )
