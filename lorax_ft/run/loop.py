"""A run from its config to its saved adapter, as `scripts/train.py` does it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from rich.console import Console

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.data.batches import evaluation_batches
from lorax_ft.data.chat import encode_prompt
from lorax_ft.data.formats import Message, split_answer
from lorax_ft.evaluation.exact_match import evaluate_answers
from lorax_ft.interop.peft import BASE, save_peft
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.run import report, summary
from lorax_ft.run.folder import check_folder, make_folder
from lorax_ft.run.log import Log, check_trackers
from lorax_ft.run.progress import Progress
from lorax_ft.run.start import Job, start, step_key
from lorax_ft.run.stop_signal import StopSignal
from lorax_ft.run.summary import Evaluation, Result
from lorax_ft.training import contract
from lorax_ft.training.state import owned_leaves
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine, modules, split


def train(config: Config, *, dry_run: bool = False) -> Result | None:
    """Fine-tune: the whole run, from the config to the saved adapter, the log and the plot.

    Args:
      config: the run.
      dry_run: print what would train, the memory it takes and the first batch, and stop; writes nothing.

    Returns:
      What the run came to; None for a dry run.

    Raises:
      ValueError: bad input, or a loss that is not finite; what is on disk stays.
      OSError: the disk is full.
    """
    began = time.perf_counter()
    console = report.make_console()
    folder = Path(config.train.output)
    check_trackers(config.train.report_to)
    then = check_folder(config)
    report.print_config(console, config)
    console.print(
        f"\nLoading {config.model.path} on {jax.device_count()} × {jax.devices()[0].device_kind} …"
    )
    job = start(config, folder=folder)
    summary.print_start(console, job, dry_run=dry_run)
    if dry_run:
        return None
    if then is not None:
        summary.print_resumed(console, job, then)
    before = _evaluate(
        job, job.state, console, "before"
    )  # first, as a wrong answer pattern is found here
    make_folder(config)
    log = Log(
        folder,
        trackers=config.train.report_to,
        settings=dataclasses.asdict(config),
        resumed=job.first_step,
        writes=jax.process_index() == 0,
    )
    with log:
        if not job.first_step:
            log.write(0, summary.numbers(before))
        base = _save_base(job, folder)
        with contextlib.closing(job.checkpoints):
            state = _train(job, log, console)
        after = _evaluate(job, state, console, "after")
        log.write(job.steps, summary.numbers(after))
    saved = _save(job, state, folder, base=base)
    result = Result(
        folder=folder,
        saved=saved,
        steps=job.steps,
        before=before,
        after=after,
        seconds=time.perf_counter() - began,
    )
    summary.print_end(console, job, result)
    return result


def _train(job: Job, log: Log, console: Console) -> TrainState:
    """The steps. The loss of a step is fetched while the next one runs."""
    config, state = job.config.train, job.state
    pending: tuple[int, dict[str, Array], int] | None = None
    key = step_key(job.config)
    with (
        Progress(console, first=job.first_step, steps=job.steps) as progress,
        StopSignal() as interruption,
    ):
        for step in range(job.first_step, job.steps):
            batch, tokens = job.batch(step)
            early = step < 2  # a resumed run's adapters have moved already
            before = jax.tree.map(jnp.copy, _adapters(state.trained)) if early else {}
            state, metrics = job.step(state, job.frozen, batch, key)
            if pending:
                _record(pending, log, progress, every=config.log_every)
            pending = (step + 1, metrics, tokens)
            last = step + 1 == job.steps
            stopping = interruption.asked(step) and not last
            saving = last or stopping or (config.save_every and (step + 1) % config.save_every == 0)
            evaluating = not last and config.eval_every and (step + 1) % config.eval_every == 0
            if (
                early or saving or evaluating
            ):  # nothing is saved of a step whose loss was not looked at
                _record(pending, log, progress, every=config.log_every)
                pending = None
            if early:
                rate = min(
                    value for name, value in metrics.items() if name.startswith("learning_rate")
                )
                moved = jax.jit(contract.moved)(before, _adapters(state.trained), rate=rate)
                contract.check_moved(jax.device_get(moved), updates=step + 1)
            if saving:
                job.checkpoints.save(step + 1, state, owned_leaves(state.trained, job.frozen))
            if stopping:
                job.checkpoints.close()
                raise KeyboardInterrupt(
                    f"interrupted after step {step + 1}; --train.resume goes on from there"
                )
            if evaluating and (loss := _validation_loss(job, state)) is not None:
                log.write(step + 1, {"validation_loss": loss})
                progress.note(f"step {step + 1}: validation loss {loss:.4f}")
            if saving or evaluating:
                progress.skip()
    return state


def _record(
    pending: tuple[int, dict[str, Array], int], log: Log, progress: Progress, *, every: int
) -> None:
    """Fetch a step's metrics, stop at a loss that is not finite, and log."""
    step, metrics, tokens = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        raise ValueError(
            f"the loss at step {step} is {values['loss']} (gradient norm {values['grad_norm']}); "
            "lower optim.learning_rate and start again; earlier checkpoints (train.save_every) are kept"
        )
    rate = progress.advance(step, values, tokens)
    if step % every == 0:
        log.write(step, values | {"tokens_per_second": rate})


def _evaluate(job: Job, state: TrainState, console: Console, when: str) -> Evaluation:
    """Loss, exact match and sample answers on the validation rows."""
    loss = _validation_loss(job, state)
    config = job.config.eval
    questions, passed_over = _questions(job)
    if not questions:
        return Evaluation(loss=loss, exact_match=None, answered=None)
    with console.status(f"Answering {len(questions)} questions {when} training …"):
        answered = evaluate_answers(
            job.model,
            combine(state.trained, job.frozen),
            questions,
            max_new_tokens=config.max_new_tokens,
            compared=config.exact_match_rows,
            pattern=config.answer_pattern,
        )
    match = answered.match
    exact = match.fraction if match else None
    numbers = [f"validation loss {loss:.4f}"] if loss is not None else []
    numbers += [f"exact match {match.fraction:.1%} of {match.total} answers"] if match else []
    numbers += (
        [f"{passed_over} questions too long to be answered passed over"] if passed_over else []
    )
    started = when == "before" and job.first_step
    console.print(
        f"{f'At step {job.first_step}' if started else f'{when.capitalize()} training'}: {', '.join(numbers)}"
    )
    return Evaluation(loss=loss, exact_match=exact, answered=answered)


def _questions(job: Job) -> tuple[list[list[Message]], int]:
    """The first validation conversations to answer, and how many before them leave the model no room to."""
    config, model = job.config.eval, job.model
    wanted, passed_over = max(config.exact_match_rows, config.samples), 0
    chosen: list[list[Message]] = []
    for messages in job.data.validation.conversations:
        if len(chosen) == wanted:
            break
        prompt = encode_prompt(split_answer(messages)[0], model.tokenizer)
        if len(prompt) + config.max_new_tokens <= model.config.max_positions:
            chosen.append(messages)
        else:
            passed_over += 1
    return chosen, passed_over


def _validation_loss(job: Job, state: TrainState) -> float | None:
    """The mean loss over the labeled tokens of the validation rows, or None without such rows."""
    config, rows = job.config, job.data.validation.rows
    if not rows:
        return None
    params = combine(state.trained, job.frozen)
    size = config.train.batch_size // config.train.microbatches
    sums = np.zeros(2)
    for batch in evaluation_batches(
        rows, size, max_length=config.data.max_length, limit=config.eval.rows
    ):
        with jax.set_mesh(job.mesh):
            sums += np.array(
                jax.device_get(job.evaluate(params, sharding.place_batch(batch, job.mesh)))
            )
    return float(sums[0] / sums[1])


def _save_base(job: Job, folder: Path) -> Path | None:
    """The base that the adapter is for, where no checkpoint elsewhere is it: quantized without its start."""
    base, params = folder / BASE, combine(job.state.trained, job.frozen)
    if not any(map(is_requantized, modules(params).values())):
        return None
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0 and not base.is_dir():  # a resumed run's is there
        save_quantized(base, params, job.model)
    return base


def _save(job: Job, state: TrainState, folder: Path, *, base: Path | None) -> Path:
    """The adapter as a PEFT folder, or the model as a Hugging Face folder where everything trained."""
    config = job.config.adapter
    params = combine(state.trained, job.frozen)
    if (
        jax.process_count() > 1
    ):  # the base stays where it is, and is the model's own in save_peft's eyes
        owned, rest = partition(params, by="ownership", whole=config.train_whole)
        params = combine(multihost_utils.process_allgather(owned, tiled=True), rest)
    full = "all" in config.train_whole and not config.targets
    saved = folder / ("model" if full else "adapter")
    if jax.process_index() == 0:
        if full:
            save_model(saved, params, job.model, others="keep")
        else:
            save_peft(saved, params, job.model, config=config, base=base, others="keep")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")
    return saved


def _adapters(trained: Tree) -> Tree:
    """The trained leaves that belong to adapters."""
    return split(
        trained, lambda path: path.rpartition("/")[2] in ("lora_a", "lora_b", "magnitude")
    )[0]
