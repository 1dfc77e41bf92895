"""A multiple-choice benchmark as the task of a comparison, as the article of docs/COMPARISON.md.

The runs train on dev and a part of the questions, rates are chosen by the loss on another part, and
the methods are judged by their accuracy on the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lorax_ft.comparison.design import CHOOSE, TEST, with_sets, write_lines
from lorax_ft.config import Config
from lorax_ft.data.dataset import name_sets
from lorax_ft.evaluation.benchmark import Benchmark, Question, Subject, read_benchmark
from lorax_ft.evaluation.multiple_choice import Encoded, encode_benchmark, evaluate_choices
from lorax_ft.evaluation.prompts import PROMPTS, prompts_of
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

PARTS = 8
"""Every eighth question goes to the same part."""
TRAINED, CHOOSING = (0, 1, 2, 3), (4,)
"""The parts that are trained on, and those that rates are chosen by; the rest judges."""
DEV_ROWS = 5
"""Questions of dev that each subject has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The questions of a comparison."""

    trained: Benchmark
    choosing: Benchmark
    tested: Benchmark

    def write(self, config: Config, folder: Path) -> Config:
        """The config that trains on these questions, written to a folder.

        Validation sets that the config names stay behind those of the task.
        """
        train = write_lines(folder / "train.jsonl", _rows(self.trained))
        sets = {}
        for name, benchmark in ((CHOOSE, self.choosing), (TEST, self.tested)):
            sets[name] = [str(write_lines(folder / f"{name}.jsonl", _rows(benchmark)))]
        for name, paths in name_sets(config.data.validation).items():
            # A set without a name is that of the config's own task.
            if name:
                sets.setdefault(name, paths)
        # As `encode` asks the questions: without other messages or variables of the template.
        data = dataclasses.replace(
            config.data,
            train=(str(train),),
            shape="auto",
            fields=(),
            system=None,
            tools=None,
            template_args=(),
        )
        return with_sets(dataclasses.replace(config, data=data), sets)

    @property
    def categories(self) -> list[str]:
        """The category of each tested question."""
        names = []
        for subject in self.tested.subjects:
            names += [subject.category] * len(subject.questions)
        return names

    def encode(self, model: Model) -> Encoded:
        """The tested questions as token ids, in the chat template as they are trained.

        Raises:
          ValueError: as `encode_benchmark`.
        """
        return encode_benchmark(self.tested, model, shots=0, chat=True)


def read_task(folder: str, *, limit: int | None = None) -> Task:
    """Read a benchmark, and split its questions.

    Args:
      folder: in a format of `read_benchmark`.
      limit: questions of each subject to use, from the first; None: all.

    Raises:
      ValueError: as `read_benchmark`, or a subject has too few questions to split.
    """
    benchmark = read_benchmark(folder, shots=DEV_ROWS, limit=limit)
    trained, choosing, tested = [], [], []
    for subject in benchmark.subjects:
        parts: dict[str, list[Question]] = {"train": list(subject.dev), CHOOSE: [], TEST: []}
        for number, question in enumerate(subject.questions):
            parts[_part(number)].append(question)
        if not parts[TEST]:
            raise ValueError(
                f"the subject {subject.name} of {folder} has {len(subject.questions)} questions; a "
                f"comparison needs at least {max(CHOOSING) + 2} to train, choose and test by"
            )
        trained.append(_with(subject, parts["train"]))
        choosing.append(_with(subject, parts[CHOOSE]))
        tested.append(_with(subject, parts[TEST]))
    return Task(
        trained=dataclasses.replace(benchmark, subjects=tuple(trained)),
        choosing=dataclasses.replace(benchmark, subjects=tuple(choosing)),
        tested=dataclasses.replace(benchmark, subjects=tuple(tested)),
    )


def correct_answers(
    model: Model, params: Tree, encoded: Encoded, advance: Callable[[int], None]
) -> np.ndarray:
    """1 for each question that is answered correctly, else 0, `[N]`."""
    # Without shots, the questions of a subject share too little to be batched by subject.
    return evaluate_choices(model, params, encoded, share=False, advance=advance).correct


def _part(number: int) -> str:
    """What a question is for, by its number in the subject."""
    part = number % PARTS
    if part in TRAINED:
        return "train"
    return CHOOSE if part in CHOOSING else TEST


def _with(subject: Subject, questions: Sequence[Question]) -> Subject:
    return dataclasses.replace(subject, questions=tuple(questions))


def _rows(benchmark: Benchmark) -> list[str]:
    """The questions as lines of conversations, whose answer is the letter."""
    # Without spaces around it: in a chat template the letter starts the answer.
    prompt_format = PROMPTS[benchmark.format, "standard"]
    lines = []
    for subject in benchmark.subjects:
        prompts = prompts_of(subject, prompt_format, shots=0)
        for prompt, question in zip(prompts, subject.questions, strict=True):
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": question.answer},
            ]
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return lines
