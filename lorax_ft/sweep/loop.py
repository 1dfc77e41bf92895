"""The steps of a sweep: all points, in groups that train together, until the last comparison.

A checkpoint holds the states of all points, each with its own step. With the evaluations in
results.jsonl they tell everything else: which points are dropped, and which group trains next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from rich.console import Console

from lorax_ft.run.checkpoints import FOLDER, Checkpoints, warn_of_damage
from lorax_ft.run.fingerprint import fingerprint
from lorax_ft.run.setup import is_due
from lorax_ft.run.standing import Standing
from lorax_ft.run.stop_signal import StopSignal
from lorax_ft.sweep.display import Display
from lorax_ft.sweep.halving import Budget, groups, rung_ends, survivors
from lorax_ft.sweep.program import Program
from lorax_ft.sweep.results import Results, setting_key
from lorax_ft.sweep.setup import SweepJob
from lorax_ft.sweep.stack import put, take
from lorax_ft.sweep.starts import start_key
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swept:
    """What the steps of a sweep leave behind."""

    state: TrainState
    """Of all points, `[K, ...]`; each as it was when it was last trained."""
    results: Results


def run_points(
    job: SweepJob,
    console: Console,
    *,
    folder: Path | None,
    parallel: int,
    budget: Budget = "full",
    resume: bool = False,
    number: int = 0,
) -> Swept:
    """Train the points of a sweep.

    Args:
      job: the points.
      console: where to print.
      folder: for the results and the checkpoints; None: nothing is written.
      parallel: how many adapters train together, at most.
      budget: "halve" drops the worse half of the settings after equal shares of the steps.
      resume: whether to continue from the last checkpoint in the folder, if there is one.
      number: of the generation, whose checkpoints lie in a folder of their own.

    Raises:
      KeyboardInterrupt: a signal ended the loop, after a checkpoint.
      OSError: the disk is full.
    """
    checkpoints = None
    if folder is not None:
        keep = job.config.train.keep_checkpoints
        checkpoints = Checkpoints(folder / FOLDER / str(number), keep=keep)
    # The steps that each point has done in a sweep to resume.
    state, done = job.state, None
    inputs: Mapping[str, str] = {}
    if checkpoints is not None:
        inputs = fingerprint(job.base, job.data[0])
    if checkpoints is not None and resume:
        found = checkpoints.find()
        warn_of_damage(checkpoints.folder, found)
        if found.step is not None:
            checkpoints.check_inputs(found.step, inputs)
            state, _ = checkpoints.restore(job.state, job.owned, step=found.step)
            done = np.asarray(state.step).tolist()
        checkpoints.drop_after(-1 if found.step is None else found.step)
    results = Results(job.points, folder, steps_done=done)
    settings = len({setting_key(point.settings) for point in job.points})
    ends = rung_ends(budget, settings=settings, steps=job.steps)
    total = _updates(ends, settings, len(job.points))
    display = Display(console, results, done=sum(done or [0]), total=total)
    with display, StopSignal() as stop_signal, stop_signal.waiting():
        loop = _Loop(job, results, display, stop_signal, checkpoints, state, inputs)
        try:
            loop.run(ends, parallel)
        finally:
            if checkpoints is not None:
                checkpoints.close()
    return Swept(state=loop.state, results=results)


def _updates(ends: Sequence[int], settings: int, points: int) -> int:
    """The updates of all adapters together."""
    seeds = points // settings
    total = 0
    start = 0
    for end in ends:
        total += (end - start) * settings * seeds
        start = end
        # As `survivors` keeps them.
        settings = (settings + 1) // 2
    return total


class _Loop:
    """The loop over rungs and groups, and the states of all points."""

    def __init__(
        self,
        job: SweepJob,
        results: Results,
        display: Display,
        stop_signal: StopSignal,
        checkpoints: Checkpoints | None,
        state: TrainState,
        inputs: Mapping[str, str],
    ) -> None:
        self.state = state
        self._job = job
        self._inputs = inputs
        self._config = job.config.train
        self._results = results
        self._display = display
        self._stop_signal = stop_signal
        self._checkpoints = checkpoints
        self._steps = np.array(state.step)
        """The steps that each point has done, `[K]`."""
        self._saved: int | None = None
        """The number of the last checkpoint."""

    def run(self, ends: Sequence[int], parallel: int) -> None:
        """Train all points to the end of each rung, and drop the worse half between rungs.

        It ends early if all of them diverged.
        """
        alive = list(range(len(self._job.points)))
        for end in ends:
            for members in groups(alive, parallel):
                self._train(members, end)
            # Nothing is left to compare. What that means is the caller's to say: all rates beyond
            # the best one may diverge.
            if all(k in self._results.diverged for k in alive):
                return
            if end != ends[-1]:
                kept = survivors(self._results.ranking(alive, end))
                dropped = [k for k in alive if k not in kept]
                self._results.dropped.update(dict.fromkeys(dropped, end))
                self._display.dropped(end, dropped)
                alive = kept

    def _train(self, members: list[int], end: int) -> None:
        """Train a group of points to the step `end`, which is evaluated."""
        # Points of an earlier rung may stand at different steps, some of them dropped.
        first = int(self._steps[members].min())
        if first >= end and all(self._results.has(k, end) for k in members):
            return
        group = self._make_group(members, first)
        if self._evaluates(first, end) and not self._results.has(members[0], first):
            self._evaluate(group)
        while group.step < end:
            group.train_step()
            self._record(group.pop_output())
            # Several processes count alike, each call with another number.
            stop_requested = self._stop_signal.requested(self._updates(group))
            if stop_requested and group.step < end:
                self._stop(group)
            if self._evaluates(group.step, end):
                self._record(group.pop_output(wait=True))
                self._evaluate(group)
            if self._is_due(group.step, self._config.save_every):
                self._save(group)
        self._save(group)

    def _make_group(self, members: list[int], step: int) -> _Group:
        job = self._job
        if members == list(range(len(job.points))):
            # Without a copy, which would take the memory of the states once more.
            state, owned, keys = self.state, job.owned, job.keys
        else:
            state, owned, keys = take((self.state, job.owned, job.keys), members)
        program = job.compile(members, state, owned)
        self._display.skip()
        return _Group(job, members, program, state=state, owned=owned, keys=keys, step=step)

    def _evaluates(self, step: int, end: int) -> bool:
        """Whether a step is evaluated: the start, the end of a rung, and what the config says."""
        if step in (0, end):
            return True
        return self._is_due(step, self._config.eval_every)

    def _is_due(self, step: int, every: int | str) -> bool:
        return is_due(self._job.batches[0], step, every)

    def _record(self, output: _Output | None) -> None:
        """Show and write the metrics of a step."""
        # None after the first step, whose metrics are still being computed.
        if output is None:
            return
        step, members, metrics, tokens = output
        fetched = jax.device_get(metrics)
        log = step % self._config.log_every == 0
        diverged = self._results.add_step(step, members, fetched, log=log)
        self._display.advance(step, self._job.steps, members, tokens)
        self._display.diverged(diverged)

    def _evaluate(self, group: _Group) -> None:
        losses = group.validation_losses()
        self._display.diverged(self._results.add_evaluation(group.step, group.members, losses))
        self._display.evaluated(group.step, group.members)

    def _save(self, group: _Group) -> None:
        """Put the group's states back, and save a checkpoint of all points."""
        # No checkpoint is saved of a step whose loss was not written.
        self._record(group.pop_output(wait=True))
        others, self.state = self.state, group.state
        # A group of all points has the states of all.
        if len(group.members) < len(self._job.points):
            self.state = put(others, group.members, group.state)
        self._steps[group.members] = group.step
        updates = self._updates(group)
        if self._checkpoints is not None and updates != self._saved:
            self._checkpoints.save(
                updates, self.state, self._job.owned, Standing(), inputs=self._inputs
            )
            self._saved = updates
        self._display.skip()

    def _stop(self, group: _Group) -> None:
        """End the sweep with a checkpoint."""
        self._save(group)
        if self._checkpoints is None:
            raise KeyboardInterrupt
        # Wait for orbax: if it cannot write the checkpoint, that is the error to raise.
        self._checkpoints.close()
        raise KeyboardInterrupt(
            f"interrupted after step {group.step} of {len(group.members)} adapters; "
            "the same command goes on from there"
        )

    def _updates(self, group: _Group) -> int:
        """The updates of all points so far, which number the checkpoints."""
        steps = self._steps.copy()
        steps[group.members] = group.step
        return int(steps.sum())


class _Output(NamedTuple):
    """The output of a step. The device may still be computing its metrics."""

    step: int
    members: list[int]
    metrics: dict[str, Array]
    tokens: int


class _Group:
    """Some points that train together, as one stacked state."""

    def __init__(
        self,
        job: SweepJob,
        members: list[int],
        program: Program,
        *,
        state: TrainState,
        owned: Tree,
        keys: Array,
        step: int,
    ) -> None:
        self.members = members
        self.state = state
        self.step = step
        self._job = job
        self._program = program
        self._owned = owned
        self._keys = keys
        # The metrics of a step are fetched while the next one runs.
        self._outputs: list[_Output] = []

    def train_step(self) -> None:
        """Make a step of all members."""
        batch, tokens = self._job.batch(self.members, self.step)
        self.step += 1
        self.state, metrics = self._program.step(
            self.state, self._owned, self._job.base, batch, self._keys
        )
        self._outputs.append(_Output(self.step, self.members, metrics, tokens))

    def pop_output(self, *, wait: bool = False) -> _Output | None:
        """The output of the step before the last one; of the last one with `wait`; None: popped."""
        left = 0 if wait else 1
        return self._outputs.pop(0) if len(self._outputs) > left else None

    def validation_losses(self) -> list[dict[str, float]]:
        """The mean loss per labeled token of each validation set, by metric, for each member."""
        members, leaves = self.members, (self.state.trained, self._owned)
        same = list(range(len(members)))
        # Before the first step, those that differ in their rates only are one and the same.
        if self.step == 0:
            same = self._same_starts()
            distinct = [same.index(place) for place in range(max(same) + 1)]
            if len(distinct) < len(members):
                members, leaves = [members[i] for i in distinct], take(leaves, distinct)
        totals: dict[str, np.ndarray] = {}
        for metric, batch in self._job.validation_batches(members):
            with jax.set_mesh(self._job.mesh):
                sums = self._program.evaluate(*leaves, self._job.base, batch)
            # Loss and labeled tokens, `[2, K]`; in float64, since there may be many batches.
            part = np.array(jax.device_get(sums), np.float64)
            totals[metric] = totals.get(metric, 0) + part
        losses: list[dict[str, float]] = [{} for _ in self.members]
        for metric, (loss, tokens) in totals.items():
            means = loss / tokens  # [K]
            for its, place in zip(losses, same, strict=True):
                its[metric] = float(means[place])
        return losses

    def _same_starts(self) -> list[int]:
        """For each member, the number of its start among the different ones, from 0."""
        numbers: dict[Any, int] = {}
        same = []
        for k in self.members:
            config = self._job.points[k].config
            same.append(numbers.setdefault(start_key(config), len(numbers)))
        return same
