"""A run from its config to the saved adapter: what `lorax-ft train` calls."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.evaluation.exact_match import evaluate_answers
from lorax_ft.interop.bucket import HUB, local_copy, output_path
from lorax_ft.interop.hub import missing_base, prepare_repo, push_folder
from lorax_ft.interop.peft import save_peft
from lorax_ft.interop.peft_checks import BASE
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.run import report, summary
from lorax_ft.run.checkpoints import Checkpoints
from lorax_ft.run.folder import (
    Start,
    check_folder,
    check_writable,
    make_folder,
    mark_finished,
)
from lorax_ft.run.lock import locked
from lorax_ft.run.log import Log, check_trackers
from lorax_ft.run.room import check_open_files, check_room
from lorax_ft.run.setup import Job, set_up
from lorax_ft.run.steps import Trained, run_steps
from lorax_ft.run.stop_signal import StopSignal
from lorax_ft.run.summary import Result
from lorax_ft.run.training_notes import training_notes
from lorax_ft.run.validation import Evaluation, choose_questions, validation_metrics
from lorax_ft.run.verify import verify
from lorax_ft.training.state import owned_leaves
from lorax_ft.training.step import TrainState
from lorax_ft.tree import combine, modules


def train(config: Config, *, dry_run: bool = False, command: str | None = None) -> Result | None:
    """As `lorax_ft.train`, at a learning rate that is a number."""
    folder = output_path(config.train.output)
    check_open_files()
    check_trackers(config.train.report_to)
    check_writable(folder)
    with StopSignal() as stop_signal:
        if dry_run:
            return _train(config, folder, stop_signal, dry_run=True, command=command)
        with locked(folder):
            return _train(config, folder, stop_signal, dry_run=False, command=command)


def _train(
    config: Config,
    folder: Path,
    stop_signal: StopSignal,
    *,
    dry_run: bool,
    command: str | None,
) -> Result | None:
    start_time = time.perf_counter()
    console = report.make_console()
    start = check_folder(config)
    if start.finished:
        summary.print_finished(console, folder)
        return None
    if config.train.push_to_hub and not dry_run and jax.process_index() == 0:
        prepare_repo(_repository(config))
    report.print_config(console, config)

    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    console.print(f"\nLoading {config.model.path} on {devices} …")
    job = set_up(config, folder=folder, resume=start.step)
    summary.print_setup(console, job, dry_run=dry_run)
    check_room(job.step)
    if dry_run:
        return None
    if start.previous is not None and start.step is not None:
        summary.print_resumed(console, job, start.previous)

    result = _run(job, console, stop_signal, folder, start, command=command, began=start_time)
    summary.print_result(console, job, result)
    if config.train.push_to_hub and jax.process_index() == 0:
        _push(result.saved, job, console)
    mark_finished(folder, steps=result.steps)
    return result


def _run(
    job: Job,
    console: Console,
    stop_signal: StopSignal,
    folder: Path,
    start: Start,
    *,
    command: str | None,
    began: float,
) -> Result:
    """Train between two evaluations, and save what was trained."""
    # Evaluate before make_folder: a wrong eval.answer_pattern fails here, and must not delete the
    # run to overwrite.
    before = _evaluate(job, job.state, console, before=True)
    make_folder(job.config, start)
    if start.step is not None:
        job.checkpoints.drop_after(start.step)
    if jax.process_index() == 0:
        job.data.bad_rows.write(folder)
    with _open_log(job, folder) as log:
        if job.first_step == 0:
            log.write(0, summary.metrics(before))
        base = _save_base(job, folder)
        with _closing(job.checkpoints):
            end = run_steps(job, log, console, stop_signal)
            trained = _load_best(job, end)
        after = _evaluate(job, trained.state, console, before=False, measured=trained.measured)
        log.write(end.step, summary.final_metrics(job, end.step, trained, after))
    notes = training_notes(
        job.config,
        job.model,
        job.data,
        steps=summary.describe_steps(job, end.step, ended_early=end.ended_early),
        results=summary.describe_changes(job, folder, before=before, after=after),
        command=command,
    )
    saved = _save(job, trained.state, folder, base=base, notes=notes)
    verified = ""
    if job.config.train.verify:
        verified = verify(job, trained.state, saved, base=base)

    return Result(
        folder=folder,
        saved=saved,
        steps=end.step,
        saved_step=trained.step,
        ended_early=end.ended_early,
        before=before,
        after=after,
        seconds=time.perf_counter() - began,
        skipped=trained.standing.skipped,
        verified=verified,
        tokens_per_second=end.tokens_per_second,
        warnings=summary.find_warnings(job, folder, before=before, after=after),
    )


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Wait for the checkpoints at the end of the block, unless a signal ends it."""
    try:
        yield
    except KeyboardInterrupt:
        # A second Ctrl-C does not wait. After a first one, the loop has waited already.
        raise
    except Exception:
        checkpoints.close()
        raise
    checkpoints.close()


def _repository(config: Config) -> str:
    """train.push_to_hub as a path: hf://owner/name."""
    return f"{HUB}{str(config.train.push_to_hub).removeprefix(HUB)}"


def _push(saved: Path, job: Job, console: Console) -> None:
    """Upload the adapter or the model of a run to the hub."""
    try:
        with local_copy(saved) as local:
            url = push_folder(local, _repository(job.config))
    except OSError as error:
        raise OSError(f"{error}; the run has ended well, and {saved} holds its result") from error
    console.print(f"Uploaded {saved} to {url}")
    warning = missing_base(job.model.source)
    if warning and job.config.adapter.targets:
        console.print(warning, style="yellow")


def _load_best(job: Job, trained: Trained) -> Trained:
    """The weights of the best step, if train.load_best asks for them and another one is better."""
    best = trained.standing.best_step
    if not job.config.train.load_best or best is None or best == trained.step:
        return trained
    if not job.checkpoints.is_intact(best):
        warnings.warn(
            f"the checkpoint of the best step {best} is damaged; the adapter is that of the last "
            f"step, {trained.step}",
            stacklevel=2,
        )
        return trained
    owned = owned_leaves(trained.state.trained, job.frozen)
    # The frozen leaves of the adapters are the same in all checkpoints.
    state, _ = job.checkpoints.restore(trained.state, owned, step=best)
    return trained._replace(state=state, step=best, measured=None)


def _open_log(job: Job, folder: Path) -> Log:
    """The log, written by the first of several processes."""
    return Log(
        folder,
        trackers=job.config.train.report_to,
        settings=dataclasses.asdict(job.config),
        resumed=job.first_step,
        writes=jax.process_index() == 0,
    )


def _evaluate(
    job: Job,
    state: TrainState,
    console: Console,
    *,
    before: bool,
    measured: Mapping[str, float] | None = None,
) -> Evaluation:
    """Measure loss and exact match on the validation rows, generate sample answers, and print.

    Args:
      job: the run.
      state: the state to evaluate.
      console: where to print.
      before: whether this is the evaluation before training, or the one after it.
      measured: the validation metrics of this state, if they were measured already.
    """
    if measured is None:
        measured = validation_metrics(job, state)
    questions, skipped = choose_questions(job)
    if not questions:
        return Evaluation(measured=measured, exact_match=None, answered=None)
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
    evaluation = Evaluation(measured=measured, exact_match=exact_match, answered=answered)
    heading = when.capitalize()
    # A resumed run has trained before, so its first evaluation is not the one before training.
    if before and job.first_step > 0:
        heading = f"At step {job.first_step}"
    summary.print_evaluation(console, evaluation, when=heading, skipped=skipped)
    return evaluation


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


def _save(job: Job, state: TrainState, folder: Path, *, base: Path | None, notes: str) -> Path:
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
            save_model(saved, params, job.model, others="keep", training_notes=notes)
        else:
            save_peft(
                saved,
                params,
                job.model,
                config=config,
                base=base,
                others="keep",
                training_notes=notes,
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")
    return saved
