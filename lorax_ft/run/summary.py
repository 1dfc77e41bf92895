"""What a run came to, and what it says at its start and at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.evaluation.exact_match import Answers
from lorax_ft.interop.peft import BASE
from lorax_ft.run import report
from lorax_ft.run.log import LOG, PLOT, read_log
from lorax_ft.run.start import Job
from lorax_ft.tree import combine

OWN_RUN = (
    "--config configs/own.py --model.path MODEL --data.train FILE.jsonl --train.output out/mine"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the model does on the validation rows."""

    loss: float | None
    exact_match: float | None
    answered: Answers | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    folder: Path
    """The run's output folder."""
    saved: Path
    """The adapter's folder, or the model's where everything trains."""
    steps: int
    before: Evaluation
    after: Evaluation
    seconds: float


def print_start(console: Console, job: Job, *, dry_run: bool) -> None:
    """The data, what trains, and how long the start took; of a dry run also the memory and the first batch."""
    params = combine(job.state.trained, job.frozen)
    train, validation = job.data.train, job.data.validation
    console.print(
        f"{len(train.conversations):,} samples in {len(train.rows):,} rows, {train.tokens:,} tokens, of them "
        f"{train.labels:,} labeled; {train.cut:,} samples cut, {train.dropped:,} dropped as no answer is left; "
        f"{len(validation.rows):,} rows to validate on.\n{job.steps:,} steps of {job.config.train.batch_size} rows.\n"
    )
    if train.cut > 0.1 * len(train.conversations):
        console.print(
            f"Many samples lose their end: 95 % of them would fit into --data.max_length {train.usual_length}, and it "
            f"is {job.config.data.max_length}.\n",
            style="yellow",
        )
    report.print_table(console, params, job.state.trained, layout=job.model.layout)
    if dry_run:
        memory = job.step.memory_analysis()
        temporaries = memory.temp_size_in_bytes if memory else 0
        parts = {
            "base and other frozen leaves": job.frozen,
            "trained leaves": job.state.trained,
            "optimizer": job.state.opt_state,
        }
        report.print_memory(console, parts, temporaries=temporaries)
        indices = job.batches.indices(job.first_step)
        report.print_batch(console, job.model.tokenizer, [job.data.train.rows[i] for i in indices])
    laps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in job.seconds.items())
    console.print(f"Ready: {laps}.")


def print_resumed(console: Console, job: Job, then: Config) -> None:
    """Where a run goes on, and what differs from the config `then` that it had."""
    console.print(f"Going on from step {job.first_step} of {job.steps}.")
    if job.first_step == job.steps:
        console.print("Nothing is left to train; more --train.steps would go on.")
    now = job.config.train
    if (then.train.steps, then.train.epochs) != (
        now.steps,
        now.epochs,
    ) and job.config.optim.schedule != "constant":
        console.print(
            f"It was to end elsewhere: the learning rate now has the schedule of {job.steps} steps."
        )


def print_end(console: Console, job: Job, result: Result) -> None:
    """Answers before and after, what was reached, where it lies, and what to type next."""
    before, after, n = result.before.answered, result.after.answered, job.config.eval.samples
    if before and after and n:
        questions = [prompt[-1]["content"] for prompt in after.prompts[:n]]
        columns = {"reference": after.references, "before": before.answers, "after": after.answers}
        console.print()
        report.print_answers(console, "Answers", questions, columns)
    rows = [("steps", f"{result.steps:,}"), ("time", f"{result.seconds:.0f} s")]
    first = next(iter(read_log(result.folder)), {}) if job.first_step else numbers(result.before)
    for name, form in (("validation_loss", ".4f"), ("exact_match", ".1%")):
        now = numbers(result.after).get(name)
        if now is not None and name in first:
            rows.append((name.replace("_", " "), f"{first[name]:{form}} → {now:{form}}"))
    if job.model.base != job.model.source:
        own = result.folder / BASE
        rows.append(("base", str(own) if own.is_dir() else job.model.base))
    rows += [
        (result.saved.name, str(result.saved)),
        ("loss plot", str(result.folder / PLOT)),
        ("log", str(result.folder / LOG)),
    ]
    console.print()
    report.print_summary(console, rows, title="Done")
    if (result.folder / BASE).is_dir():
        console.print("In Python, with PEFT and bitsandbytes", style="bold")
        loaded = f'AutoModelForCausalLM.from_pretrained("{result.folder / BASE}")'
        console.print(f'  PeftModel.from_pretrained({loaded}, "{result.saved}")', soft_wrap=True)
    console.print("What to type next", style="bold")
    for command in (
        f'generate.py --run {result.folder} "a question of yours"',
        f"chat.py --run {result.folder}",
        f"merge.py --run {result.folder} --output {result.folder}/merged",
        f"train.py {OWN_RUN}",
    ):
        console.print(f"  python scripts/{command}", soft_wrap=True)  # one line, to be copied


def numbers(evaluation: Evaluation) -> dict[str, float]:
    """What was measured, as the log names it."""
    values = {"validation_loss": evaluation.loss, "exact_match": evaluation.exact_match}
    return {name: value for name, value in values.items() if value is not None}
