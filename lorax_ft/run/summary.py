"""The result of a run, and what a run prints: after its setup, at evaluations and at its end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.data.dataset import Dataset
from lorax_ft.interop.bucket import is_remote
from lorax_ft.interop.peft_checks import BASE
from lorax_ft.lowrank.merge import check_mergeable
from lorax_ft.program import command
from lorax_ft.run import report
from lorax_ft.run.diagnosis import diagnose
from lorax_ft.run.log import LOG, PLOT, read_log
from lorax_ft.run.memory import peak_memory
from lorax_ft.run.report import counted
from lorax_ft.run.setup import Job, count_steps
from lorax_ft.run.steps import Trained
from lorax_ft.run.trace import PROFILE
from lorax_ft.run.validation import ACCURACY, Evaluation, describe_metrics, first_metric
from lorax_ft.soft_prompts.door import virtual_tokens
from lorax_ft.tree import combine

OWN_RUN = "--config own --model.path MODEL --data.train FILE.jsonl --train.output out/mine"

MUCH_PADDING = 0.5
"""A batch with a larger fraction of padding is warned of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run."""

    folder: Path
    """The run's output folder."""
    saved: Path
    """The adapter's folder, or the model's after full fine-tuning."""
    steps: int
    """The last step of the training."""
    saved_step: int
    """The step whose weights were saved: the best one with train.load_best, else the last."""
    ended_early: str
    """Why the training ended before its last step; empty if it did not."""
    before: Evaluation
    after: Evaluation
    """Of the saved weights."""
    seconds: float
    skipped: int
    """Steps that changed nothing, as their loss or gradients were not finite."""
    verified: str
    """What was checked at the end, in words (`train.verify`); empty if nothing was."""
    tokens_per_second: float
    """Training tokens without padding, evaluations and checkpoints left out."""
    warnings: list[str]
    """What went wrong, such as a loss that rose; each a sentence with what to do."""


def print_setup(console: Console, job: Job, *, dry_run: bool) -> None:
    """Print the data, the trainable modules and how long the setup took.

    A dry run also prints the memory and the first batch.
    """
    _print_data(console, job.data, job.config)
    config = job.config.train
    steps, rows = counted(job.steps, "step"), counted(config.batch_size, "row")
    console.print(f"{steps} of {rows}.\n")
    if config.steps is not None and config.epochs is not None:
        console.print(
            f"train.steps {config.steps} and train.epochs {config.epochs:g} are both given: "
            f"train.steps wins, which is {job.epoch(job.steps):.3g} epochs "
            "(--train.steps None counts epochs).\n",
            style="yellow",
        )
    params = combine(job.state.trained, job.frozen)
    report.print_modules(console, params, job.state.trained, layout=job.model.layout)
    if dry_run:
        _print_memory(console, job)
        # Of the first step that the run would make.
        indices = job.batches.indices(job.first_step)
        batch = [job.data.train.rows[i] for i in indices]
        report.print_batch(console, job.model.tokenizer, batch)
    if job.config.model.remat == "auto":
        console.print(f"Gradient checkpointing: {job.model.config.remat} (model.remat auto).")
    times = [f"{name} {seconds:.1f} s" for name, seconds in job.seconds.items()]
    console.print(f"Ready: {', '.join(times)}.")


def print_resumed(console: Console, job: Job, previous: Config) -> None:
    """Print the step that the run resumes from, and whether its number of steps has changed."""
    console.print(f"Resuming from step {job.first_step} of {job.steps}.")
    if job.first_step == job.steps:
        console.print("All steps are done; give more --train.steps to train longer.")
    best = job.standing.best_step
    if job.config.train.load_best and best is not None:
        console.print(f"The best step so far is {best}, with loss {job.standing.best_loss:.4f}.")
    # The rate depends on the number of steps, so more steps change the rate of the next one too.
    has_changed = count_steps(previous.train, job.batches) != job.steps
    if has_changed and job.config.optim.schedule != "constant":
        console.print(
            f"The number of steps has changed: the learning rate continues on the schedule for "
            f"{job.steps} steps."
        )


def print_finished(console: Console, folder: Path) -> None:
    """Print that the run has ended, and what to do with it."""
    console.print(
        f"The run in {folder} has ended, and its results are in place. Give more --train.steps to "
        "train longer, --train.overwrite to begin anew, or another --train.output."
    )


def print_evaluation(
    console: Console,
    evaluation: Evaluation,
    *,
    when: str,
    skipped: int = 0,
) -> None:
    """Print the metrics of an evaluation.

    Args:
      console: where to print.
      evaluation: the metrics.
      when: such as "Before training".
      skipped: questions left out because they are too long.
    """
    parts = []
    if evaluation.measured:
        parts.append(describe_metrics(evaluation.measured))
    answered = evaluation.answered
    if answered is not None and answered.match is not None:
        match = answered.match
        parts.append(f"exact match {match.fraction:.1%} of {match.total} answers")
    if skipped:
        parts.append(f"{skipped} questions skipped, too long to leave room for an answer")
    console.print(f"{when}: {', '.join(parts)}")


def print_result(console: Console, job: Job, result: Result) -> None:
    """Print answers before and after training, metrics, files and the next commands."""
    _print_samples(console, job, result)
    console.print()
    report.print_summary(console, _summary_rows(job, result), title="Done")
    for warning in result.warnings:
        console.print(f"Warning: {warning}.\n", style="yellow")
    if is_remote(result.folder):
        # PEFT, transformers and our scripts read local folders.
        console.print(f"To use it, copy {result.folder} to a local folder.", soft_wrap=True)
        return
    base = result.folder / BASE
    # Lines to copy are not wrapped.
    # PEFT would load the adapter without the soft prompt beside it.
    if base.is_dir() and not virtual_tokens(job.state.trained):
        console.print("In Python, with PEFT and bitsandbytes", style="bold")
        loaded = f'AutoModelForCausalLM.from_pretrained("{base}")'
        console.print(f'  PeftModel.from_pretrained({loaded}, "{result.saved}")', soft_wrap=True)
    console.print("Next commands", style="bold")
    commands = {
        "generate": f'--run {result.folder} "your question"',
        "chat": f"--run {result.folder}",
    }
    if _is_mergeable(job):
        commands["merge"] = f"--run {result.folder} --output {result.folder}/merged"
    commands["train"] = OWN_RUN
    for name, options in commands.items():
        console.print(f"  {command(name)} {options}", soft_wrap=True)


def _is_mergeable(job: Job) -> bool:
    """Whether the adapter can be merged, as a soft prompt cannot."""
    try:
        check_mergeable(combine(job.state.trained, job.frozen))
    except ValueError:
        return False
    return True


def _print_samples(console: Console, job: Job, result: Result) -> None:
    """Print some questions with the answers before and after training, if there are any."""
    before = result.before.answered
    after = result.after.answered
    samples = job.config.eval.samples
    if before is None or after is None or not samples:
        return
    # The last message of a prompt is the question.
    questions = [prompt[-1]["content"] for prompt in after.prompts[:samples]]
    columns = {
        "reference": after.references,
        "before": before.answers,
        "after": after.answers,
    }
    console.print()
    report.print_answers(console, "Answers", questions, columns)


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """The metrics that were measured, under their names in the log."""
    measured = dict(evaluation.measured)
    if evaluation.exact_match is not None:
        measured["exact_match"] = evaluation.exact_match
    return measured


def final_metrics(
    job: Job,
    last_step: int,
    trained: Trained,
    evaluation: Evaluation,
) -> dict[str, float]:
    """The metrics for the last line of the log, which has the last step.

    Losses of other weights, those of the best step, have names of their own.
    """
    if trained.step == last_step:
        return metrics(evaluation)
    named = {f"best_{name}": value for name, value in metrics(evaluation).items()}
    return {"best_step": trained.step} | named


def find_warnings(job: Job, folder: Path, *, before: Evaluation, after: Evaluation) -> list[str]:
    """What went wrong in the run, by its log."""
    first = _first_metrics(job, folder, before)
    # The first set's, as `after.loss` is.
    name = first_metric(after.measured)
    return diagnose(
        read_log(folder),
        before=first.get(name),
        after=after.loss,
        learning_rate=job.config.optim.peak,
    )


def _first_metrics(job: Job, folder: Path, before: Evaluation) -> dict[str, float]:
    """The metrics before the very first step; a resumed run finds them in its log."""
    if job.first_step:
        return next(iter(read_log(folder)), {})
    return metrics(before)


def _print_data(console: Console, data: Dataset, config: Config) -> None:
    """Print the size of the data, and warnings if much of it is truncated or much is padding."""
    train = data.train
    filled = train.tokens + config.prompt.count * train.count
    room = len(train.rows) * data.max_length
    padding = 1 - filled / room
    console.print(
        f"Training: {counted(train.count, 'sample')} in {counted(len(train.rows), 'row')} of "
        f"{data.max_length:,} tokens, {train.tokens:,} tokens ({train.labels:,} labeled), "
        f"{padding:.0%} padding; "
        f"{counted(train.cut, 'sample')} truncated, {train.dropped:,} dropped (no label left)."
    )
    sizes = []
    for name, split in data.validation_sets.items():
        # A single set has no name.
        sizes.append(f"{name} {counted(len(split.rows), 'row')}".strip())
    console.print(f"Validation: {', '.join(sizes)}.")
    for remark in _remarks(data):
        console.print(remark, style="yellow", markup=False)
    if padding > MUCH_PADDING and not config.data.pack:
        # Packed rows have the length that the config gives; those of single samples may be shorter.
        longest = config.data.max_length
        packed_length = longest if isinstance(longest, int) else data.max_length
        packed_rows = math.ceil(filled / packed_length)
        _print_padding(console, data, padding=padding, packed_rows=packed_rows)


def _remarks(data: Dataset) -> list[str]:
    """What a user should know of samples that are left out, repeated, endless or truncated."""
    train = data.train
    bad = data.bad_rows
    remarks = []
    if bad.count:
        remarks.append(
            f"Left out: {counted(bad.count, 'row')} that cannot be used (data.bad_rows skip); the "
            f"first: {bad.problems[0]}"
        )
    if train.copies:
        remarks.append(
            f"Exact copies of earlier samples: {train.copies:,} of {train.count:,}. They are "
            "trained on as any other; remove them from the data if they are not meant."
        )
    if train.unused:
        parts = [f"{name} ({count:,} times)" for name, count in train.unused.items()]
        remarks.append(f"Not used: {', '.join(parts)}.")
    if train.endless:
        remarks.append(
            f"{train.endless:,} answers end without an end-of-turn token, so the model does not "
            "learn where to stop; --data.append_end appends the end-of-sequence token to the last "
            "answer of a conversation."
        )
    if train.cut > 0.1 * train.count:
        remarks.append(
            f"Many samples are truncated: --data.max_length is {data.max_length}, and 95% of the "
            f"samples would fit in {train.usual_length}.\n"
        )
    return remarks


def _print_padding(console: Console, data: Dataset, *, padding: float, packed_rows: int) -> None:
    """Warn that most of each batch is padding, which costs as much time as tokens do."""
    train, max_length = data.train, data.max_length
    lengths = [len(sample) for row in train.rows for sample in row]
    console.print(
        f"{padding:.0%} of each batch is padding: rows have {max_length:,} tokens, samples "
        f"{np.mean(lengths):.0f} on average and {max(lengths):,} at most. --data.pack puts several "
        f"samples into a row (about {counted(packed_rows, 'row')} instead of "
        f"{len(train.rows):,}); "
        "--data.max_length auto makes rows as long as the longest sample.\n",
        style="yellow",
    )


def _print_memory(console: Console, job: Job) -> None:
    """Print the memory of the compiled step."""
    # Some backends report no analysis.
    analysis = job.step.memory_analysis()
    temporaries = analysis.temp_size_in_bytes if analysis else 0
    parts = {
        "base and other frozen leaves": job.frozen,
        "trained leaves": job.state.trained,
        "optimizer": job.state.opt_state,
    }
    report.print_memory(console, parts, temporaries=temporaries)


def _summary_rows(job: Job, result: Result) -> list[tuple[str, str]]:
    """Names and values of the final table."""
    steps = describe_steps(job, result.steps, ended_early=result.ended_early)
    rows = [("steps", steps), ("time", f"{result.seconds:.0f} s")]
    if result.skipped:
        rows.append(("skipped", f"{counted(result.skipped, 'step')} with a loss not finite"))
    if result.tokens_per_second:
        rows.append(("throughput", f"{result.tokens_per_second:,.0f} tokens/s"))
    rows.append(("peak memory", peak_memory()))
    if job.config.train.load_best:
        rows.append(("best step", f"{result.saved_step:,}, whose weights were saved"))
    changes = describe_changes(job, result.folder, before=result.before, after=result.after)
    rows.extend(changes.items())
    if job.model.base != job.model.source:
        # A base that the init changed was saved beside the adapter.
        changed_base = result.folder / BASE
        base = str(changed_base) if changed_base.is_dir() else job.model.base
        rows.append(("base", base))
    rows.append((result.saved.name, str(result.saved)))
    if result.verified:
        rows.append(("verified", result.verified))
    rows.append(("loss plot", str(result.folder / PLOT)))
    rows.append(("log", str(result.folder / LOG)))
    if job.config.train.profile:
        rows.append(("profile", str(result.folder / PROFILE)))
    if result.warnings:
        rows.append(("warnings", f"{len(result.warnings)}, see below"))
    return rows


def describe_changes(
    job: Job,
    folder: Path,
    *,
    before: Evaluation,
    after: Evaluation,
) -> dict[str, str]:
    """The metrics before and after training, by name, such as "5.2000 → 0.3000"."""
    first = _first_metrics(job, folder, before)
    changes = {}
    for name, value in metrics(after).items():
        # A loss that was not finite is null in the log.
        if first.get(name) is None:
            continue
        spec = ".1%" if name in ("exact_match", ACCURACY) else ".4f"
        # "validation_loss/NAME" of a set with a name.
        label = name.replace("_", " ").replace("/", " ")
        changes[label] = f"{first[name]:{spec}} → {value:{spec}}"
    return changes


def describe_steps(job: Job, steps: int, *, ended_early: str) -> str:
    """The steps that were made, and why they are not all."""
    if not ended_early:
        return f"{steps:,}"
    return f"{steps:,} of {job.steps:,}: {ended_early}"
