"""A run from its config to the saved adapter: what `scripts/train.py` calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import multihost_utils
from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.evaluation.exact_match import evaluate_answers
from lorax_ft.interop.bucket import output_path
from lorax_ft.interop.peft import BASE, save_peft
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.lowrank.groups import adapter_leaves_of, partition
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.run import report, summary
from lorax_ft.run.folder import check_folder, make_folder
from lorax_ft.run.log import Log, check_trackers
from lorax_ft.run.progress import Progress
from lorax_ft.run.setup import Job, set_up, step_key
from lorax_ft.run.standing import Standing
from lorax_ft.run.stop_signal import StopSignal
from lorax_ft.run.summary import Result
from lorax_ft.run.validation import Evaluation, choose_questions, validation_loss
from lorax_ft.training import contract
from lorax_ft.training.state import owned_leaves
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine, modules

CHECKED_UPDATES = 2
"""After so many updates, every leaf that trains must have moved (`contract.check_moved`)."""


def train(config: Config, *, dry_run: bool = False) -> Result | None:
    """Run a fine-tuning, from the config to the saved adapter, the log and the plot.

    Args:
      config: the run.
      dry_run: print what would train, the memory it takes and the first batch, and write nothing.

    Returns:
      The result of the run; None for a dry run.

    Raises:
      ValueError: bad input, or a loss that is not finite; files on disk are kept.
      OSError: the disk is full.
    """
    start_time = time.perf_counter()
    console = report.make_console()
    folder = output_path(config.train.output)
    check_trackers(config.train.report_to)
    previous = check_folder(config)
    report.print_config(console, config)

    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    console.print(f"\nLoading {config.model.path} on {devices} …")
    job = set_up(config, folder=folder)
    summary.print_setup(console, job, dry_run=dry_run)
    if dry_run:
        return None
    if previous is not None:
        summary.print_resumed(console, job, previous)

    # Evaluate before make_folder: a wrong eval.answer_pattern fails here, and must not delete the
    # run to overwrite.
    before = _evaluate(job, job.state, console, before=True)
    make_folder(config)
    with _open_log(job, folder) as log:
        if job.first_step == 0:
            log.write(0, summary.metrics(before))
        base = _save_base(job, folder)
        with contextlib.closing(job.checkpoints):
            state = _train(job, log, console)
        after = _evaluate(job, state, console, before=False)
        log.write(job.steps, summary.metrics(after))
    saved = _save(job, state, folder, base=base)

    result = Result(
        folder=folder,
        saved=saved,
        steps=job.steps,
        before=before,
        after=after,
        seconds=time.perf_counter() - start_time,
    )
    summary.print_result(console, job, result)
    return result


class StepOutput(NamedTuple):
    """The output of a training step. The device may still be computing its metrics."""

    step: int
    metrics: dict[str, Array]
    tokens: int


def _train(job: Job, log: Log, console: Console) -> TrainState:
    """The training loop. Returns the state after the last step."""
    config, state = job.config.train, job.state
    key = step_key(job.config)
    pending: StepOutput | None = None
    with (
        Progress(console, first=job.first_step, steps=job.steps) as progress,
        StopSignal() as stop_signal,
    ):
        for step in range(job.first_step + 1, job.steps + 1):
            batch, tokens = job.batch(step - 1)
            checking = step <= CHECKED_UPDATES
            adapters = _copy_adapters(state.trained) if checking else {}
            state, metrics = job.step(state, job.frozen, batch, key)
            # JAX computes in the background, and fetching metrics waits for it. So the metrics of
            # the previous step are fetched while this one runs.
            if pending is not None:
                _record(pending, log, progress, log_every=config.log_every)
            pending = StepOutput(step, metrics, tokens)

            # With several processes, all must ask after every step, the last one included.
            stop_requested = stop_signal.requested(step)
            last = step == job.steps
            stopping = stop_requested and not last
            saving = last or stopping or _is_due(step, config.save_every)
            evaluating = not last and _is_due(step, config.eval_every)
            # No checkpoint is saved of a step whose loss was not checked.
            if checking or saving or evaluating:
                _record(pending, log, progress, log_every=config.log_every)
                pending = None
            if checking:
                _check_moved(adapters, state.trained, metrics, updates=step)
            if saving:
                owned = owned_leaves(state.trained, job.frozen)
                job.checkpoints.save(step, state, owned, Standing())
            if stopping:
                # Wait for orbax: if it cannot write the checkpoint, that is the error to raise.
                job.checkpoints.close()
                raise KeyboardInterrupt(
                    f"interrupted after step {step}; continue with --train.resume"
                )
            if evaluating:
                _log_validation_loss(step, job, state, log, progress)
            if saving or evaluating:
                log.upload()
                progress.skip()
    return state


def _is_due(step: int, every: int) -> bool:
    """Whether this step is a multiple of `every`; with 0 no step is."""
    return every > 0 and step % every == 0


def _record(output: StepOutput, log: Log, progress: Progress, *, log_every: int) -> None:
    """Wait for a step's metrics, check that they are finite, show and log them."""
    step, tokens = output.step, output.tokens
    metrics = {name: float(value) for name, value in jax.device_get(output.metrics).items()}
    metrics["tokens"] = metrics.pop("weight")  # the weight of this loss is its labeled tokens
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise ValueError(
            f"the loss at step {step} is {metrics['loss']} (gradient norm {metrics['grad_norm']}); "
            "lower optim.learning_rate and start again; earlier checkpoints (train.save_every) "
            "are kept"
        )
    tokens_per_second = progress.advance(step, metrics, tokens)
    if _is_due(step, log_every):
        log.write(step, metrics | {"tokens_per_second": tokens_per_second})


def _copy_adapters(trained: Tree) -> Tree:
    """A copy of the trained leaves of adapters, since the step donates the originals."""
    return jax.tree.map(jnp.copy, _adapters(trained))


def _check_moved(before: Tree, trained: Tree, metrics: dict[str, Array], *, updates: int) -> None:
    """Raise if an adapter did not move in the first updates of a run."""
    # Each group of leaves has a learning rate; the smallest allows the smallest update.
    rates = [value for name, value in metrics.items() if name.startswith("learning_rate")]
    moved = jax.jit(contract.moved)(before, _adapters(trained), rate=min(rates))
    contract.check_moved(jax.device_get(moved), updates=updates)


def _adapters(trained: Tree) -> Tree:
    """The trained leaves of adapters, without those of fully trained modules."""
    return adapter_leaves_of(trained)


def _open_log(job: Job, folder: Path) -> Log:
    """The log, written by the first of several processes."""
    return Log(
        folder,
        trackers=job.config.train.report_to,
        settings=dataclasses.asdict(job.config),
        resumed=job.first_step,
        writes=jax.process_index() == 0,
    )


def _evaluate(job: Job, state: TrainState, console: Console, *, before: bool) -> Evaluation:
    """Measure loss and exact match on the validation rows, generate sample answers, and print.

    Args:
      job: the run.
      state: the state to evaluate.
      console: where to print.
      before: whether this is the evaluation before training, or the one after it.
    """
    loss = validation_loss(job, state)
    questions, skipped = choose_questions(job)
    if not questions:
        return Evaluation(loss=loss, exact_match=None, answered=None)
    when = "before training" if before else "after training"
    config = job.config.eval
    with console.status(f"Answering {len(questions)} questions {when} …"):
        answered = evaluate_answers(
            job.model,
            combine(state.trained, job.frozen),
            questions,
            max_new_tokens=config.max_new_tokens,
            compared=config.exact_match_rows,
            pattern=config.answer_pattern,
        )
    exact_match = answered.match.fraction if answered.match else None
    evaluation = Evaluation(loss=loss, exact_match=exact_match, answered=answered)
    heading = when.capitalize()
    # A resumed run has trained before, so its first evaluation is not the one before training.
    if before and job.first_step > 0:
        heading = f"At step {job.first_step}"
    summary.print_evaluation(console, evaluation, when=heading, skipped=skipped)
    return evaluation


def _log_validation_loss(
    step: int, job: Job, state: TrainState, log: Log, progress: Progress
) -> None:
    """Evaluate during training: the loss only, because generating answers takes long."""
    loss = validation_loss(job, state)
    if loss is not None:
        log.write(step, {"validation_loss": loss})
        progress.note(f"step {step}: validation loss {loss:.4f}")


def _save_base(job: Job, folder: Path) -> Path | None:
    """Save the base if the init changed its quantized kernels, for no other checkpoint holds them.

    Returns:
      Its folder; None if the adapter belongs to the model that was loaded.
    """
    params = combine(job.state.trained, job.frozen)
    if not any(is_requantized(layer) for layer in modules(params).values()):
        return None
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    base = folder / BASE
    # A resumed run finds the folder that its first part saved.
    if jax.process_index() == 0 and not base.is_dir():
        save_quantized(base, params, job.model)
    return base


def _save(job: Job, state: TrainState, folder: Path, *, base: Path | None) -> Path:
    """Save the adapter as a PEFT folder, or the model as a Hugging Face folder after full tuning.

    Returns:
      The folder.
    """
    config = job.config.adapter
    params = combine(state.trained, job.frozen)
    if jax.process_count() > 1:
        # The base may not fit on one host. It is not gathered, and stays the model's own arrays,
        # by which save_peft knows that it has nothing to write of it.
        owned, rest = partition(params, by="ownership", whole=config.train_whole)
        params = combine(multihost_utils.process_allgather(owned, tiled=True), rest)
    full_fine_tuning = "all" in config.train_whole and not config.targets
    saved = folder / ("model" if full_fine_tuning else "adapter")
    # others="keep": files that a user has put into the folder stay when a run is resumed.
    if jax.process_index() == 0:
        if full_fine_tuning:
            save_model(saved, params, job.model, others="keep")
        else:
            save_peft(saved, params, job.model, config=config, base=base, others="keep")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")
    return saved
