"""Evaluate a model, or an adapter against its base."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lorax_ft import cli
from lorax_ft.checks import check, check_positive
from lorax_ft.config import DataConfig, MeshConfig
from lorax_ft.run.model_args import ModelArgs, load_with_adapter

if TYPE_CHECKING:
    from lorax_ft.evaluation.tasks import Task
    from lorax_ft.models.model import LoadedModel

KINDS = ("choices", "loss", "gsm8k", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Evaluate a model, or an adapter against its base."""

    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND=PATH [KIND=PATH ...]")]
    """What to measure.
    choices=FOLDER: accuracy on the .csv files of MMLU, C-Eval or CMMLU;
    loss=DATA: loss and perplexity on any data that train.py takes;
    gsm8k=DATA: the number that each answer ends with;
    text=DATA: exact match, ROUGE-L and BLEU of each answer."""
    variants: tuple[Literal["base", "off", "on"], ...] = ("base", "off", "on")
    """With an adapter: which of the base, the adapter off and the adapter on to evaluate."""
    output: str = "out/evaluation"
    """Folder for evaluation.json, evaluation.png and the answers."""
    limit: int | None = None
    """Rows of each task, or questions of each subject, from the first; None takes all."""
    shots: int = 5
    """choices: questions with their answers before each question, from dev; 0 to 5."""
    split: Literal["auto", "val", "test"] = "auto"
    """choices: the split; auto is test, or val if the files of test hold no answers (C-Eval)."""
    subjects: tuple[str, ...] = ()
    """choices: names of the subjects, such as anatomy; none takes all."""
    prompts: Literal["standard", "lm-eval"] = "standard"
    """choices: wording of the prompts: the benchmark's own, or lm-evaluation-harness's."""
    chat: bool = False
    """choices: put each prompt into the chat template, as a user's message."""
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(max_length="auto"))
    """loss, gsm8k and text: how rows are read; sources come from --tasks."""
    max_new_tokens: int = 256
    """gsm8k and text: maximum number of tokens of an answer."""
    samples: int = 1
    """gsm8k: answers for each question whose majority counts (maj@n), beside the greedy one;
    1: only the greedy one."""
    temperature: float = 0.7
    """gsm8k: sampling temperature of these answers."""
    answer_pattern: str | None = None
    r"""text: regular expression whose first group is compared for exact match,
    such as "#### (-?[\d,.]+)"; None compares whole answers."""
    batch_size: int = 32
    """gsm8k and text: number of answers that are generated at once."""
    seed: int = 0
    """gsm8k: random seed for sampling."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices: by default each holds the weights and takes a part of the rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.tasks), "give --tasks, such as choices=data/cmmlu")
        for task in self.tasks:
            split_task(task)
        check(bool(self.variants), "give --variants base, off or on")
        check_positive(self, "max_new_tokens", "samples", "batch_size", "temperature")
        check(self.limit is None or self.limit > 0, f"limit is {self.limit}; it must be above 0")
        check(0 <= self.shots <= 5, f"shots is {self.shots}; it must be 0 to 5")
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be 0 or more and below 2^32")
        self._check_data()

    def _check_data(self) -> None:
        """Raises for options of data that have no effect here."""
        usual = DataConfig()
        for name in ("train", "validation", "validation_split", "validation_rows", "pack"):
            check(
                getattr(self.data, name) == getattr(usual, name),
                f"data.{name} has no effect here; --tasks gives the sources, such as "
                "loss=test.jsonl, and data.split the split of a folder",
            )
        check(self.data.limit is None, "data.limit has no effect here; give --limit")


def split_task(task: str) -> tuple[str, str]:
    """The kind and the path of a task.

    Raises:
      ValueError: there is no such kind, or no path.
    """
    match = re.fullmatch(r"(\w+)=(.+)", task)
    if match is None or match[1] not in KINDS:
        raise ValueError(
            f"--tasks {task} is not KIND=PATH with a kind of {', '.join(KINDS)}, such as "
            "choices=data/cmmlu"
        )
    return match[1], match[2]


def main() -> None:
    """Parses the command line, then runs the command."""
    cli.run(evaluate, Args)


def evaluate(args: Args) -> None:
    """Loads the model, does the tasks and shows what it scored."""
    _check_files(args)
    from lorax_ft.sharding import make_mesh

    mesh = make_mesh(args.mesh)
    model, params = load_with_adapter(args, mesh=mesh if mesh.size > 1 else None)
    from lorax_ft.run.evaluation import run_task, variants_of
    from lorax_ft.run.evaluation_report import print_results, write_results
    from lorax_ft.run.report import make_console

    console = make_console()
    # All are read before the first is done: a mistake in the last one should show at once.
    tasks = [_task(args, model, *split_task(task)) for task in args.tasks]
    variants = variants_of(model, params, args.variants)
    results = [run_task(task, variants, console) for task in tasks]
    print_results(console, results)
    output = Path(args.output).expanduser()
    described = {"model": model.base, "run": args.run, "adapter": args.adapter}
    write_results(output, results, model=described)
    console.print(f"saved to {output}")


def _check_files(args: Args) -> None:
    """Raises for mistakes that would cost the user the time to load the model."""
    from lorax_ft.data.dataset import check_sources
    from lorax_ft.evaluation.benchmark import read_benchmark

    if Path(args.output).expanduser().is_file():
        raise ValueError(f"{args.output} is a file; give a folder to write to")
    for task in args.tasks:
        kind, path = split_task(task)
        if kind == "choices":
            read_benchmark(path, split=args.split, subjects=args.subjects, shots=args.shots)
        else:
            check_sources(dataclasses.replace(args.data, train=(path,), validation=()))


def _task(args: Args, model: LoadedModel, kind: str, path: str) -> Task:
    """A task of the command line."""
    from lorax_ft.evaluation.tasks import Vote, choice_task, gsm8k_task, loss_task, text_task

    if kind == "choices":
        return choice_task(
            model,
            path,
            shots=args.shots,
            split=args.split,
            subjects=args.subjects,
            limit=args.limit,
            style=args.prompts,
            chat=args.chat,
        )
    if kind == "loss":
        return loss_task(model, path, data=args.data, limit=args.limit)
    if kind == "gsm8k":
        vote = None
        if args.samples > 1:
            vote = Vote(samples=args.samples, temperature=args.temperature, seed=args.seed)
        return gsm8k_task(
            model,
            path,
            data=args.data,
            max_new_tokens=args.max_new_tokens,
            vote=vote,
            batch_size=args.batch_size,
            limit=args.limit,
        )
    return text_task(
        model,
        path,
        data=args.data,
        max_new_tokens=args.max_new_tokens,
        pattern=args.answer_pattern,
        batch_size=args.batch_size,
        limit=args.limit,
    )
