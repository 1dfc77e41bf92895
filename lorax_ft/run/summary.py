"""The result of a run, and what a run prints: after its setup, at evaluations and at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.data.dataset import Dataset
from lorax_ft.interop.bucket import is_remote
from lorax_ft.interop.peft import BASE
from lorax_ft.run import report
from lorax_ft.run.log import LOG, PLOT, read_log
from lorax_ft.run.setup import Job
from lorax_ft.run.validation import Evaluation
from lorax_ft.tree import combine

OWN_RUN = (
    "--config configs/own.py --model.path MODEL --data.train FILE.jsonl --train.output out/mine"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run."""

    folder: Path
    """The run's output folder."""
    saved: Path
    """The adapter's folder, or the model's after full fine-tuning."""
    steps: int
    before: Evaluation
    after: Evaluation
    seconds: float


def print_setup(console: Console, job: Job, *, dry_run: bool) -> None:
    """Print the data, the trainable modules and how long the setup took.

    A dry run also prints the memory and the first batch.
    """
    _print_data(console, job.data, max_length=job.config.data.max_length)
    console.print(f"{job.steps:,} steps of {job.config.train.batch_size} rows.\n")
    params = combine(job.state.trained, job.frozen)
    report.print_modules(console, params, job.state.trained, layout=job.model.layout)
    if dry_run:
        _print_memory(console, job)
        rows = [job.data.train.rows[i] for i in job.batches.indices(job.first_step)]
        report.print_batch(console, job.model.tokenizer, rows)
    times = [f"{name} {seconds:.1f} s" for name, seconds in job.seconds.items()]
    console.print(f"Ready: {', '.join(times)}.")


def print_resumed(console: Console, job: Job, previous: Config) -> None:
    """Print the step that the run resumes from, and whether its number of steps has changed."""
    console.print(f"Resuming from step {job.first_step} of {job.steps}.")
    if job.first_step == job.steps:
        console.print("All steps are done; give more --train.steps to train longer.")
    old = (previous.train.steps, previous.train.epochs)
    new = (job.config.train.steps, job.config.train.epochs)
    # The rate depends on the number of steps, so more steps change the rate of the next one too.
    if old != new and job.config.optim.schedule != "constant":
        console.print(
            f"The number of steps has changed: the learning rate continues on the schedule for "
            f"{job.steps} steps."
        )


def print_evaluation(
    console: Console, evaluation: Evaluation, *, when: str, skipped: int = 0
) -> None:
    """Print the metrics of an evaluation.

    Args:
      console: where to print.
      evaluation: the metrics.
      when: such as "Before training".
      skipped: questions left out because they are too long.
    """
    parts = []
    if evaluation.loss is not None:
        parts.append(f"validation loss {evaluation.loss:.4f}")
    if evaluation.answered is not None and evaluation.answered.match is not None:
        match = evaluation.answered.match
        parts.append(f"exact match {match.fraction:.1%} of {match.total} answers")
    if skipped:
        parts.append(f"{skipped} questions skipped, too long to leave room for an answer")
    console.print(f"{when}: {', '.join(parts)}")


def print_result(console: Console, job: Job, result: Result) -> None:
    """Print answers before and after training, metrics, files and the next commands."""
    before, after = result.before.answered, result.after.answered
    samples = job.config.eval.samples
    if before and after and samples:
        questions = [prompt[-1]["content"] for prompt in after.prompts[:samples]]
        columns = {
            "reference": after.references,
            "before": before.answers,
            "after": after.answers,
        }
        console.print()
        report.print_answers(console, "Answers", questions, columns)
    console.print()
    report.print_summary(console, _summary_rows(job, result), title="Done")
    if is_remote(result.folder):
        # PEFT, transformers and our scripts read local folders.
        console.print(f"To use it, copy {result.folder} to a local folder.", soft_wrap=True)
        return
    base = result.folder / BASE
    # Lines to copy are not wrapped.
    if base.is_dir():
        console.print("In Python, with PEFT and bitsandbytes", style="bold")
        loaded = f'AutoModelForCausalLM.from_pretrained("{base}")'
        console.print(f'  PeftModel.from_pretrained({loaded}, "{result.saved}")', soft_wrap=True)
    console.print("Next commands", style="bold")
    commands = (
        f'generate.py --run {result.folder} "your question"',
        f"chat.py --run {result.folder}",
        f"merge.py --run {result.folder} --output {result.folder}/merged",
        f"train.py {OWN_RUN}",
    )
    for command in commands:
        console.print(f"  python scripts/{command}", soft_wrap=True)


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """The metrics that were measured, under their names in the log."""
    measured = {}
    if evaluation.loss is not None:
        measured["validation_loss"] = evaluation.loss
    if evaluation.exact_match is not None:
        measured["exact_match"] = evaluation.exact_match
    return measured


def _print_data(console: Console, data: Dataset, *, max_length: int) -> None:
    """Print the size of the data, and a warning if much of it is truncated."""
    train, validation = data.train, data.validation
    console.print(
        f"Training: {train.count:,} samples in {len(train.rows):,} rows, "
        f"{train.tokens:,} tokens ({train.labels:,} labeled); "
        f"{train.cut:,} samples truncated, {train.dropped:,} dropped (no label left)."
    )
    console.print(f"Validation: {len(validation.rows):,} rows.")
    if train.unused:
        parts = [f"{name} ({count:,} times)" for name, count in train.unused.items()]
        console.print(f"Not used: {', '.join(parts)}.", style="yellow")
    if train.cut > 0.1 * train.count:
        console.print(
            f"Many samples are truncated: --data.max_length is {max_length}, and 95% of the "
            f"samples would fit in {train.usual_length}.\n",
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
    rows = [("steps", f"{result.steps:,}"), ("time", f"{result.seconds:.0f} s")]
    first = metrics(result.before)
    # A resumed run compares with the evaluation before its very first step, which the log holds.
    if job.first_step:
        first = next(iter(read_log(result.folder)), {})
    last = metrics(result.after)
    formats = {"validation_loss": ".4f", "exact_match": ".1%"}
    for name, spec in formats.items():
        if name in first and name in last:
            change = f"{first[name]:{spec}} → {last[name]:{spec}}"
            rows.append((name.replace("_", " "), change))
    if job.model.base != job.model.source:
        # A base that the init changed was saved beside the adapter.
        changed_base = result.folder / BASE
        base = str(changed_base) if changed_base.is_dir() else job.model.base
        rows.append(("base", base))
    rows.append((result.saved.name, str(result.saved)))
    rows.append(("loss plot", str(result.folder / PLOT)))
    rows.append(("log", str(result.folder / LOG)))
    return rows
