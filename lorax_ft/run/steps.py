"""The steps of a run, with their evaluations and checkpoints, until the training ends."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console

from lorax_ft.lowrank.groups import adapter_leaves_of
from lorax_ft.run.clock import Clock
from lorax_ft.run.diagnosis import SPIKE_WINDOW, is_spike
from lorax_ft.run.log import Log
from lorax_ft.run.program import step_key
from lorax_ft.run.progress import Progress
from lorax_ft.run.report import counted
from lorax_ft.run.setup import Job
from lorax_ft.run.standing import WINDOW, Standing
from lorax_ft.run.stop_signal import Interrupted, StopSignal
from lorax_ft.run.trace import Trace
from lorax_ft.run.validation import describe_metrics, first_loss, validation_metrics
from lorax_ft.run.watchdog import Watchdog
from lorax_ft.training import contract
from lorax_ft.training.state import owned_leaves
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree

CHECKED_UPDATES = 2
"""After so many updates, every leaf that trains must have moved (`contract.check_moved`)."""


class Trained(NamedTuple):
    """What the steps of a run leave behind."""

    state: TrainState
    step: int
    """The step that `state` is of."""
    measured: dict[str, float] | None
    """The validation metrics of `state`; None if they were not measured."""
    standing: Standing
    ended_early: str
    """Why the training ended before its last step; empty if it did not."""
    tokens_per_second: float
    """Over all devices and without padding, since the run started or was resumed; else 0."""


class StepOutput(NamedTuple):
    """The output of a training step. The device may still be computing its metrics."""

    step: int
    metrics: dict[str, Array]
    tokens: int


def run_steps(job: Job, log: Log, console: Console, stop_signal: StopSignal) -> Trained:
    """The training loop.

    Several processes run it alike: they see the same losses, and agree on the time and on signals.

    Raises:
      ValueError: too many losses or gradients are not finite, or an adapter does not move.
      KeyboardInterrupt: a signal ended the loop, after a checkpoint.
      OSError: the disk is full.
    """
    with (
        Progress(console, first=job.first_step, steps=job.steps) as progress,
        Trace(log.local, steps=job.config.train.profile) as trace,
        stop_signal.waiting(),
    ):
        return _Loop(job, log, progress, stop_signal, trace).run()


class _Loop:
    """The training loop and its state."""

    def __init__(
        self,
        job: Job,
        log: Log,
        progress: Progress,
        stop_signal: StopSignal,
        trace: Trace,
    ) -> None:
        self._job = job
        self._config = job.config.train
        self._key = step_key(job.config)
        self._log = log
        self._progress = progress
        self._stop_signal = stop_signal
        self._trace = trace
        self._watchdog = Watchdog(self._config.step_timeout)
        self._clock = Clock(job.standing.seconds, max_minutes=self._config.max_minutes)
        self._step = job.first_step
        self._state = job.state
        self._standing = job.standing
        # The validation metrics of the current step, if it was evaluated.
        self._measured: dict[str, float] | None = None
        # JAX computes in the background, and fetching metrics waits for it. So the metrics of a
        # step are fetched while the next one runs.
        self._pending: StepOutput | None = None
        # The adapters before a step that is checked.
        self._before: Tree = {}
        # The losses of the last steps, with which the next one is compared.
        self._losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)

    def run(self) -> Trained:
        """Train to the end."""
        steps, config = self._job.steps, self._config
        out_of_time = self._clock.is_over()
        if self._missed_evaluation(last=self._step == steps or out_of_time):
            self._evaluate()
            self._log_measured(last=self._step == steps)
        ended_early = self._early_end(out_of_time=out_of_time)
        while self._step < steps and not ended_early:
            self._train_step()
            # With several processes, all must ask after every step, the last one included.
            stop_requested = self._stop_signal.requested(self._step)
            out_of_time = self._clock.is_over()
            self._check_update()
            if len(self._standing.skipped_lately) > config.max_skipped:
                self._give_up()
            last = self._step == steps or out_of_time
            if stop_requested and not last:
                self._stop()
            if self._due(config.eval_every) or (last and config.eval_every != 0):
                self._evaluate()
            ended_early = self._early_end(out_of_time=out_of_time)
            last = last or bool(ended_early)
            self._log_measured(last=last)
            if last or self._due(config.save_every) or self._improved():
                self._save()
        return Trained(
            state=self._state,
            step=self._step,
            measured=self._measured,
            standing=self._standing,
            ended_early=ended_early,
            tokens_per_second=self._progress.mean_tokens_per_second,
        )

    def _train_step(self) -> None:
        """Make a step, and record the one before it."""
        with self._watchdog.watching():
            batch, tokens = self._job.batch(self._step)
            self._step += 1
            self._measured = None
            if self._updates() <= CHECKED_UPDATES:
                self._before = _copy_adapters(self._state.trained)
            self._state, metrics = self._job.step(self._state, self._job.frozen, batch, self._key)
        self._trace.after_step(metrics)
        self._record()
        self._pending = StepOutput(self._step, metrics, tokens)

    def _updates(self) -> int:
        """The updates that the run has made if the last step is one; a skipped step is none."""
        return self._step - self._standing.skipped

    def _check_update(self) -> None:
        """Raise if an adapter did not move in the first updates of a run."""
        updates = self._updates()
        if updates > CHECKED_UPDATES or self._pending is None:
            return
        metrics = self._pending.metrics
        self._record()
        was_skipped = self._updates() < updates
        if not was_skipped:
            _check_moved(self._before, self._state.trained, metrics, updates=updates)
        self._before = {}

    def _record(self) -> None:
        """Wait for the metrics of the pending step; show, count and log them."""
        if self._pending is None:
            return
        step, fetched, tokens = self._pending
        self._pending = None
        with self._watchdog.watching():
            metrics = {name: float(value) for name, value in jax.device_get(fetched).items()}
        metrics["tokens"] = metrics.pop("weight")  # the weight of this loss is its labeled tokens
        was_skipped = metrics.pop("skipped") > 0
        if was_skipped:
            metrics["skipped"] = 1.0
            self._standing = self._standing.skips(step)
            self._progress.note(_describe_skip(step, metrics))
        else:
            self._note_spike(step, metrics["loss"])
        metrics["tokens_per_second"] = self._progress.advance(
            step, metrics, tokens, self._standing.skipped
        )
        metrics["epoch"] = self._job.epoch(step)
        if was_skipped or step % self._config.log_every == 0:
            self._log.write(step, metrics)

    def _note_spike(self, step: int, loss: float) -> None:
        """Print a loss that stands out from those of the last steps."""
        usual = is_spike(self._losses, loss)
        if usual is not None:
            self._progress.note(
                f"step {step}: the loss rose to {loss:.4f}, from {usual:.4f} "
                f"in the last {len(self._losses)} steps"
            )
        self._losses.append(loss)

    def _evaluate(self) -> None:
        """Measure the validation metrics; generating answers takes too long during training."""
        self._record()
        try:
            # An evaluation may take minutes, which a machine that shuts down does not wait.
            with self._stop_signal.at_once():
                measured = validation_metrics(self._job, self._state)
        except Interrupted:
            self._stop()
        if measured:
            self._measured = measured
            self._progress.note(f"step {self._step}: {describe_metrics(measured)}")
        loss = first_loss(measured)
        if loss is not None:
            self._standing = self._standing.evaluated(self._step, loss)
        self._progress.skip()

    def _missed_evaluation(self, *, last: bool) -> bool:
        """Whether the run was interrupted at this step before it was evaluated."""
        every = self._config.eval_every
        evaluates = self._due(every) or (last and every != 0)
        evaluated = self._standing.evaluated_step == self._step
        return self._step > 0 and evaluates and not evaluated

    def _log_measured(self, *, last: bool) -> None:
        """Log the validation metrics of this step, unless the line of the run's end has them."""
        if self._measured is None:
            return
        loads_other = self._config.load_best and self._standing.best_step != self._step
        if not last or loads_other:
            self._log.write(self._step, self._measured)
            self._log.upload()

    def _early_end(self, *, out_of_time: bool) -> str:
        """Why the training ends after this step, before the last one; empty if it does not."""
        config = self._config
        if self._step == self._job.steps:
            return ""
        if out_of_time:
            return f"{config.max_minutes:g} minutes are over (train.max_minutes)"
        if self._standing.out_of_patience(config.patience):
            evaluations = counted(self._standing.waited, "evaluation")
            return f"no new lowest validation loss in {evaluations} (train.patience)"
        return ""

    def _improved(self) -> bool:
        """Whether this step is the best one, and so needs a checkpoint."""
        evaluated = self._measured is not None
        return self._config.load_best and evaluated and self._standing.best_step == self._step

    def _save(self) -> None:
        """Save a checkpoint; the best one so far is kept beside the latest."""
        # No checkpoint is saved of a step whose loss was not checked.
        self._record()
        if not _is_finite(self._state):
            raise ValueError(
                f"the weights at step {self._step} are no longer finite, and no checkpoint is "
                f"saved of them; {self._advice()}"
            )
        checkpoints = self._job.checkpoints
        if self._config.load_best:
            checkpoints.keep_best(self._standing.best_step)
        owned = owned_leaves(self._state.trained, self._job.frozen)
        standing = dataclasses.replace(self._standing, seconds=self._clock.seconds())
        checkpoints.save(self._step, self._state, owned, standing, inputs=self._job.inputs)
        self._log.upload()
        self._progress.skip()

    def _stop(self) -> NoReturn:
        """End the run with a checkpoint.

        A machine that is about to shut down has no time for an evaluation, which the resumed run
        makes up for (`_missed_evaluation`).
        """
        self._save()
        # Wait for orbax: if it cannot write the checkpoint, that is the error to raise.
        self._job.checkpoints.close()
        raise KeyboardInterrupt(
            f"interrupted after step {self._step}; the same command goes on from there"
        )

    def _give_up(self) -> NoReturn:
        """End the run whose steps are skipped, with the state before them in a checkpoint."""
        self._save()
        self._job.checkpoints.close()
        lately = self._standing.skipped_lately
        raise ValueError(
            f"{counted(len(lately), 'step')} of the last {min(self._step, WINDOW)} were skipped, "
            f"the last one at step {lately[-1]}, as their loss or gradients were not finite "
            f"(train.max_skipped {self._config.max_skipped}); the checkpoint of step {self._step} "
            f"has the weights without them; {self._advice()}"
        )

    def _advice(self) -> str:
        """What to try where losses are not finite."""
        config = self._job.config
        options = [f"a lower optim.learning_rate (it was {config.optim.peak:g})"]
        if self._updates() == 0:  # of the base alone, which no rate has changed
            options = ["other data (--dry_run shows the first batch)"]
        if config.model.dtype == "bfloat16":
            options.append("model.dtype float32")
        return f"begin anew (--train.overwrite) with {' or '.join(options)}"

    def _due(self, every: int | str) -> bool:
        return self._job.is_due(self._step, every)


def _describe_skip(step: int, metrics: Mapping[str, float]) -> str:
    """Why a step was skipped, in a line."""
    if metrics["tokens"] == 0:
        return f"step {step} is skipped: no token of its batch is labeled"
    return (
        f"step {step} is skipped: the loss is {metrics['loss']:g}, the gradient norm "
        f"{metrics['grad_norm']:g}"
    )


@jax.jit
def _is_finite(state: TrainState) -> Array:
    """Whether all weights and moments are finite. Only checkpoints ask, which fetch them anyway."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def _copy_adapters(trained: Tree) -> Tree:
    """A copy of the trained leaves of adapters, since the step donates the originals."""
    return jax.tree.map(jnp.copy, adapter_leaves_of(trained))


def _check_moved(before: Tree, trained: Tree, metrics: dict[str, Array], *, updates: int) -> None:
    """Raise if an adapter did not move in the first updates of a run."""
    # Each group of leaves has a learning rate; the smallest allows the smallest update.
    rates = [value for name, value in metrics.items() if name.startswith("learning_rate")]
    moved = jax.jit(contract.moved)(before, adapter_leaves_of(trained), rate=min(rates))
    contract.check_moved(jax.device_get(moved), updates=updates)
