"""What a sweep measures: results.jsonl, losses.jsonl, and which point is the best.

results.jsonl has a line for each point and evaluation, with the settings of the point as columns;
losses.jsonl has a line for each step, with the training losses of all points that trained together.
`pandas.read_json(file, lines=True)` reads both.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.files import named_errors, write_file
from lorax_ft.run.validation import METRIC, first_metric
from lorax_ft.sweep.agree import SEED
from lorax_ft.sweep.axes import Point, Settings

RESULTS = "results.jsonl"
LOSSES = "losses.jsonl"


class Results:
    """The evaluations of the points so far, in memory and in the files.

    Args:
      points: the points of the sweep.
      folder: where the files lie; None: nothing is written.
      steps_done: for a resumed sweep, the steps of each point: lines of later steps are dropped.
        None: the files start empty.
    """

    def __init__(
        self,
        points: Sequence[Point],
        folder: Path | None,
        *,
        steps_done: Sequence[int] | None = None,
    ) -> None:
        self.points = list(points)
        self.losses: dict[tuple[int, int], float] = {}
        """The validation loss by point and step."""
        self.diverged: dict[int, int] = {}
        """The step at which a point's loss was no longer finite."""
        self.dropped: dict[int, int] = {}
        """The step after which a point was dropped."""
        self.trained: dict[int, float] = {}
        """The last training loss of each point."""
        self._folder = folder
        if folder is None:
            return
        done = {}
        for k, point in enumerate(points):
            # Not even the evaluation at step 0 is left of what a new sweep overwrites.
            done[point.number] = -1 if steps_done is None else steps_done[k]
        _keep_lines(folder / RESULTS, lambda line: _is_kept(line["point"], line["step"], done))
        _keep_lines(folder / LOSSES, lambda line: _is_kept(line["points"][0], line["step"], done))
        if steps_done is not None:
            self.read(folder)

    def add_step(
        self, step: int, members: Sequence[int], metrics: Mapping[str, np.ndarray], *, log: bool
    ) -> list[int]:
        """Note the training losses of a step. Returns the points that it shows to diverge."""
        losses = metrics["loss"]
        norms = metrics["grad_norm"]
        not_finite = []
        for k, loss, norm in zip(members, losses, norms, strict=True):
            self.trained[k] = float(loss)
            if not (np.isfinite(loss) and np.isfinite(norm)):
                not_finite.append(k)
        if log:
            line = {
                "step": step,
                "points": [self.points[k].number for k in members],
                "loss": list(map(_number, losses)),
                "grad_norm": list(map(_number, norms)),
            }
            self._append(LOSSES, line)
        return self._note_divergence(step, not_finite)

    def add_evaluation(
        self, step: int, members: Sequence[int], losses: Sequence[Mapping[str, float]]
    ) -> list[int]:
        """Note the validation losses of some points. Returns those that turn out to diverge."""
        not_finite = []
        for k, its in zip(members, losses, strict=True):
            self.losses[k, step] = its[first_metric(its)]
            if not math.isfinite(self.losses[k, step]):
                not_finite.append(k)
            line = self._line(k, step)
            for name, value in its.items():
                line[name] = _number(value)
            self._append(RESULTS, line)
        return self._note_divergence(step, not_finite)

    def read(self, folder: Path) -> None:
        """Read what the files in a folder hold of these points."""
        places = {point.number: k for k, point in enumerate(self.points)}
        for line in read_lines(folder / RESULTS):
            number, step = line["point"], line["step"]
            # Of another generation.
            if number not in places:
                continue
            k = places[number]
            if "diverged" in line:
                self.diverged[k] = step
            else:
                # The first validation set, by which points are compared.
                metric = next(name for name in line if name.startswith(METRIC))
                self.losses[k, step] = _read_number(line[metric])
        for line in read_lines(folder / LOSSES):
            for number, loss in zip(line["points"], line["loss"], strict=True):
                if number in places:
                    self.trained[places[number]] = _read_number(loss)

    def has(self, k: int, step: int) -> bool:
        """Whether a point was evaluated at a step."""
        return (k, step) in self.losses

    def last(self, k: int) -> tuple[int, float] | None:
        """The last step at which a point was evaluated, and its validation loss there."""
        steps = [step for point, step in self.losses if point == k]
        if not steps:
            return None
        last = max(steps)
        return last, self.losses[k, last]

    def score(self, k: int, step: int) -> float:
        """What a point is judged by: its validation loss at a step; infinite if it diverged."""
        loss = self.losses.get((k, step), math.inf)
        if k in self.diverged or not math.isfinite(loss):
            return math.inf
        return loss

    def ranking(self, members: Sequence[int], step: int) -> list[list[int]]:
        """The points by setting, the best setting first.

        The points of a setting differ in their seed only. Settings are compared by the mean of
        their points, and points of a setting by themselves.
        """
        settings: dict[str, list[int]] = {}
        for k in members:
            key = setting_key(self.points[k].settings)
            settings.setdefault(key, []).append(k)

        def mean(group: list[int]) -> float:
            return float(np.mean([self.score(k, step) for k in group]))

        ranked = []
        for group in sorted(settings.values(), key=mean):
            ranked.append(sorted(group, key=lambda k: self.score(k, step)))
        return ranked

    def best(self, step: int) -> int | None:
        """The best point of the best setting that was evaluated at this step.

        None if all diverged.
        """
        # Those that were dropped earlier are not among them.
        evaluated = [k for k in range(len(self.points)) if self.has(k, step)]
        for group in self.ranking(evaluated, step):
            if math.isfinite(self.score(group[0], step)):
                return group[0]
        return None

    def _note_divergence(self, step: int, members: Sequence[int]) -> list[int]:
        # Such a step changes nothing, so that later losses may be finite; a point is noted once.
        new = [k for k in members if k not in self.diverged]
        for k in new:
            self.diverged[k] = step
            self._append(RESULTS, self._line(k, step) | {"diverged": True})
        return new

    def _line(self, k: int, step: int) -> dict[str, Any]:
        """The start of a line: the point, its settings, the step, the training loss there."""
        point = self.points[k]
        trained = self.trained.get(k)
        loss = None if trained is None else _number(trained)
        return {"point": point.number, **point.settings, "step": step, "train_loss": loss}

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self._folder is not None:
            path = self._folder / name
            with named_errors(path), path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def setting_key(settings: Settings) -> str:
    """What the points of a setting have in common: everything but the seed."""
    others = dict(settings)
    others.pop(SEED, None)
    return json.dumps(others)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that a sweep wrote; none if it does not exist."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text().splitlines():
        # A sweep that was killed may leave half a line at the end.
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def _is_kept(point: int, step: int, done: Mapping[int, int]) -> bool:
    """Whether a line is of a step that a point has done, or of a point before all these."""
    # Of an earlier generation, which is complete.
    if point < min(done):
        return True
    return step <= done.get(point, -1)


def _keep_lines(file: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Write the file anew with the lines to keep, through another file that a crash may leave."""
    kept = [line for line in read_lines(file) if keep(line)]
    new = file.with_name(f".{file.name}")
    write_file(new, "".join(json.dumps(line) + "\n" for line in kept))
    new.replace(file)


def _read_number(value: float | None) -> float:
    """The number that `_number` wrote."""
    return math.nan if value is None else value


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None
