"""Tasks that a model is evaluated on.

What is asked is read once, and asked of several parameters: the base, and the base with an adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lorax_ft.config import DataConfig
from lorax_ft.data.conversation import Conversation
from lorax_ft.data.dataset import load_split
from lorax_ft.data.formats import has_answer, split_answer
from lorax_ft.data.shapes import LETTERS
from lorax_ft.evaluation.benchmark import Split, read_benchmark
from lorax_ft.evaluation.exact_match import exact_match, extract_references
from lorax_ft.evaluation.items import Items
from lorax_ft.evaluation.likelihood import row_losses
from lorax_ft.evaluation.math_answers import final_number, majority, reference_number
from lorax_ft.evaluation.multiple_choice import Choices, encode_benchmark, evaluate_choices
from lorax_ft.evaluation.prompts import PromptStyle
from lorax_ft.evaluation.text_metrics import corpus_bleu, rouge_l, sentence_bleu
from lorax_ft.inference.sampling import Sampling
from lorax_ft.inference.texts import answer
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

Kind = Literal["choices", "loss", "gsm8k", "text"]
Advance = Callable[[int], None]


class Outcome(NamedTuple):
    """What a model did in a task."""

    metrics: Mapping[str, Items]
    answers: Sequence[Any]
    """What it answered to each item, for a file; empty if it only scored a text."""
    corpus: Mapping[str, float] = {}
    """Metrics of all items together, which have no values of single items."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task that is read, and how to do it."""

    name: str
    count: int
    """Items that the progress bar counts."""
    settings: Mapping[str, Any]
    """What a reader must know to repeat it."""
    run: Callable[[Tree, Advance], Outcome]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vote:
    """Sampled answers to each question, whose most frequent number counts (2203.11171)."""

    samples: int
    temperature: float = 0.7
    seed: int = 0

    def options(self, draw: int) -> dict[str, Any]:
        """The options of `answer` for draw number `draw`."""
        # A key of its own, or all draws would be the same.
        key = jax.random.fold_in(jax.random.key(self.seed), draw)
        return {"sampling": Sampling(temperature=self.temperature), "key": key}


def choice_task(
    model: Model,
    folder: str,
    *,
    shots: int,
    split: Split = "auto",
    subjects: Sequence[str] = (),
    limit: int | None = None,
    style: PromptStyle = "standard",
    chat: bool = False,
) -> Task:
    """The questions of a benchmark (see `read_benchmark` and `encode_benchmark`)."""
    benchmark = read_benchmark(folder, split=split, subjects=subjects, shots=shots, limit=limit)
    encoded = encode_benchmark(benchmark, model, shots=shots, style=style, chat=chat)

    def run(params: Tree, advance: Advance) -> Outcome:
        choices = evaluate_choices(model, params, encoded, advance=advance)
        items = Items(
            values=choices.correct,
            subjects=encoded.subjects,
            categories=encoded.categories,
        )
        return Outcome({"accuracy": items}, _choice_lines(encoded.subjects, choices))

    settings = {
        "folder": folder,
        "split": benchmark.split,
        "shots": shots,
        "prompts": style,
        "chat": chat,
    }
    return Task(name=benchmark.format, count=len(encoded.prompts), settings=settings, run=run)


def _choice_lines(subjects: Sequence[str], choices: Choices) -> list[dict[str, Any]]:
    """A line of the file of answers for each question."""
    lines = []
    columns = zip(subjects, choices.chosen, choices.answers, choices.log_probs, strict=True)
    for subject, chosen, correct, log_probs in columns:
        line = {
            "subject": subject,
            "answer": LETTERS[chosen],
            "reference": LETTERS[correct],
            "log_probs": log_probs.tolist(),  # of A to D
        }
        lines.append(line)
    return lines


def loss_task(model: Model, source: str, *, data: DataConfig, limit: int | None = None) -> Task:
    """The loss of the labeled tokens of rows, as in training.

    Raises:
      ValueError: as `load_split`, or no row has a labeled token.
    """
    positions = model.config.max_positions
    split, max_length = load_split(data, source, model.tokenizer, limit=limit, positions=positions)
    samples = []
    for row in split.rows:
        # Rows that are not packed hold one sample each.
        (sample,) = row
        samples.append(sample)
    if not samples:
        raise ValueError(f"{source} has no row with a token that counts in the loss")
    if max_length > positions:
        raise ValueError(
            f"data.max_length is {max_length}, but the model has {positions} positions"
        )

    def run(params: Tree, advance: Advance) -> Outcome:
        losses = row_losses(model, params, samples, advance=advance)
        # The mean is one over tokens, so a row counts by its labeled tokens.
        items = Items(values=losses.sums, weights=losses.tokens, unit="nats")
        return Outcome({"loss": items}, ())

    settings = {"source": source, "max_length": max_length, "truncated": split.cut}
    return Task(name="loss", count=len(samples), settings=settings, run=run)


def gsm8k_task(
    model: Model,
    source: str,
    *,
    data: DataConfig,
    max_new_tokens: int,
    vote: Vote | None = None,
    batch_size: int = 32,
    limit: int | None = None,
) -> Task:
    """Math word problems: the number that each greedy answer ends with, and a majority vote.

    Args:
      model: provides the tokenizer.
      source: conversations whose last assistant turn is a solution.
      data: how they are read.
      max_new_tokens: the largest number of tokens in an answer.
      vote: the answers that vote beside the greedy one; None holds no vote.
      batch_size: answers that are generated at once.
      limit: questions to ask, from the first; None asks all.
    """
    questions, references = _questions(model, source, data=data, limit=limit)
    # Now, not after minutes of generation: a reference without a number is an error.
    expected = _reference_numbers(source, references)

    def ask(params: Tree, advance: Advance, options: Mapping[str, Any]) -> list[str]:
        return answer(
            model,
            params,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            advance=advance,
            **options,
        )

    def run(params: Tree, advance: Advance) -> Outcome:
        texts = ask(params, advance, {})
        metrics = {"exact_match": _matches([final_number(text) for text in texts], expected)}
        answers = _answer_lines(texts, references)
        if vote is not None:
            drawn = [ask(params, advance, vote.options(draw)) for draw in range(vote.samples)]
            samples = list(zip(*drawn, strict=True))  # by question
            metrics[f"maj@{vote.samples}"] = _matches(_votes(samples), expected)
            for line, its_samples in zip(answers, samples, strict=True):
                line["samples"] = list(its_samples)
        return Outcome(metrics, answers)

    settings: dict[str, Any] = {"source": source, "max_new_tokens": max_new_tokens}
    rounds = 1
    if vote is not None:
        rounds += vote.samples
        settings |= dataclasses.asdict(vote)
    return Task(name="gsm8k", count=rounds * len(questions), settings=settings, run=run)


def _reference_numbers(source: str, references: Sequence[str]) -> list[str]:
    """The number of each reference solution."""
    numbers = []
    for number, text in enumerate(references, 1):
        numbers.append(reference_number(text, f"{source}, question {number}"))
    return numbers


def _votes(samples: Sequence[Sequence[str]]) -> list[str | None]:
    """The number that the answers to each question agree on."""
    votes = []
    for texts in samples:
        numbers = [final_number(text) for text in texts]
        votes.append(majority(numbers))
    return votes


def text_task(
    model: Model,
    source: str,
    *,
    data: DataConfig,
    max_new_tokens: int,
    pattern: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
) -> Task:
    """Greedy answers, compared with their references: exact match, ROUGE-L and BLEU.

    Args:
      model: provides the tokenizer.
      source: conversations whose last assistant turn is the reference.
      data: how they are read.
      max_new_tokens: the largest number of tokens in an answer.
      pattern: of exact match, see `exact_match`.
      batch_size: answers that are generated at once.
      limit: questions to ask, from the first; None asks all.
    """
    questions, references = _questions(model, source, data=data, limit=limit)
    # Mistakes must show now, not after minutes of generation.
    extract_references(references, pattern=pattern)
    rouge_l(references[:1], references[:1])
    sentence_bleu(references[:1], references[:1])

    def run(params: Tree, advance: Advance) -> Outcome:
        texts = answer(
            model,
            params,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            advance=advance,
        )
        match = exact_match(texts, references, pattern=pattern)
        metrics = {
            "exact_match": Items(values=np.array(match.correct, np.float64)),
            "rouge_l": Items(values=rouge_l(texts, references)),
            "sentence_bleu": Items(values=sentence_bleu(texts, references)),
        }
        answers = _answer_lines(texts, references)
        # BLEU of the corpus is no mean of BLEUs of sentences: it counts n-grams over all of them.
        return Outcome(metrics, answers, {"bleu": corpus_bleu(texts, references)})

    settings = {"source": source, "max_new_tokens": max_new_tokens, "pattern": pattern}
    return Task(name="text", count=len(questions), settings=settings, run=run)


def _answer_lines(texts: Sequence[str], references: Sequence[str]) -> list[dict[str, Any]]:
    """A line of the file of answers for each question."""
    lines: list[dict[str, Any]] = []
    for text, reference in zip(texts, references, strict=True):
        lines.append({"answer": text, "reference": reference})
    return lines


def _questions(
    model: Model, source: str, *, data: DataConfig, limit: int | None
) -> tuple[list[Conversation], list[str]]:
    """The conversations of a source up to the last answer, and these answers."""
    split, _ = load_split(data, source, model.tokenizer, limit=limit)
    questions = []
    references = []
    for number, example in enumerate(split.examples, 1):
        if not isinstance(example, Conversation) or not has_answer(example.messages):
            raise ValueError(
                f"row {number} of {source} is no conversation with an answer to compare with; use "
                "loss to measure how likely texts are"
            )
        messages, reference = split_answer(example.messages)
        questions.append(dataclasses.replace(example, messages=messages))
        references.append(reference)
    return questions, references


def _matches(given: Sequence[str | None], expected: Sequence[str]) -> Items:
    # Answers without a number are None, which no reference is.
    matches = []
    for number, reference in zip(given, expected, strict=True):
        matches.append(number == reference)
    return Items(values=np.array(matches, np.float64))
