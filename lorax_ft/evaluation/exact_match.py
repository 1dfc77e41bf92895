"""The share of answers that equal their references, as text or by what a pattern finds in both."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from lorax_ft.data.formats import Message, split_answer
from lorax_ft.inference.texts import answer
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Which answers are right."""

    correct: tuple[bool, ...]
    """For each answer, in their order."""

    @property
    def count(self) -> int:
        """Right answers."""
        return sum(self.correct)

    @property
    def total(self) -> int:
        """Answers."""
        return len(self.correct)

    @property
    def fraction(self) -> float:
        """Right answers over answers, between 0 and 1."""
        return self.count / self.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Questions, what the model said, and how that compares."""

    prompts: list[list[Message]]
    """The messages before each answer."""
    answers: list[str]
    references: list[str]
    match: ExactMatch | None
    """Of the answers that are compared; None where none is."""


def exact_match(
    answers: Sequence[str], references: Sequence[str], *, pattern: str | None = None
) -> ExactMatch:
    r"""Compares answers with their references.

    Args:
      answers: what the model said.
      references: what it should have said.
      pattern: regular expression whose first group is compared, where it matches last in each text; of numbers
        without their commas. None compares the whole texts, stripped.

    Raises:
      ValueError: there is nothing to compare, the pattern is none or has no group, or does not match a reference.

    >>> exact_match(["4 + 4 = 8, so #### 1,008"], ["#### 1008"], pattern=r"#### (-?[\d,.]+)").fraction
    1.0
    """
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} answers and {len(references)} references; give as many of each, at least one"
        )
    wanted = extract_references(references, pattern=pattern)
    found = [extract(text, pattern=pattern) for text in answers]
    return ExactMatch(correct=tuple(a == b for a, b in zip(found, wanted, strict=True)))


def evaluate_answers(
    model: Model,
    params: Tree,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    compared: int | None = None,
    pattern: str | None = None,
    batch_size: int = 32,
) -> Answers:
    """Lets the model give each conversation's last answer, greedily, and compares it with the one that stands there.

    Args:
      model: gives the tokenizer too.
      params: parameters, with or without adapters.
      conversations: with an assistant turn each; what follows the last one is left out.
      max_new_tokens: the longest answer.
      compared: how many answers, from the first on, are compared; None compares all.
      pattern: see `exact_match`.
      batch_size: answers at once.

    Raises:
      ValueError: as `exact_match` and `answer`, or a conversation has no assistant turn.
    """
    for number, messages in enumerate(conversations, 1):
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(
                f"conversation {number} has no assistant turn to compare an answer with"
            )
    pairs = [split_answer(messages) for messages in conversations]
    prompts, references = [prompt for prompt, _ in pairs], [reference for _, reference in pairs]
    right = references[:compared]
    extract_references(right, pattern=pattern)  # before the minutes that answers may take
    answers = answer(model, params, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    match = exact_match(answers[: len(right)], right, pattern=pattern) if right else None
    return Answers(prompts=prompts, answers=answers, references=references, match=match)


def extract(text: str, *, pattern: str | None) -> str | None:
    """What is compared of a text: the pattern's last match, a number without commas; None where nothing matches.

    >>> extract("first #### 3, then #### 1,250.", pattern=r"#### ([\\d,.]+)")
    '1250'
    """
    if pattern is None:
        return text.strip()
    found = [
        match[1].strip() for match in _compiled(pattern).finditer(text) if match[1] is not None
    ]
    if not found:
        return None
    is_number = re.fullmatch(r"[-+]?\d[\d,]*(\.\d*)?", found[-1]) is not None
    return found[-1].replace(",", "").removesuffix(".") if is_number else found[-1]


def extract_references(references: Sequence[str], *, pattern: str | None) -> list[str]:
    """What is compared of each reference.

    Raises:
      ValueError: the pattern is none or has no group, or does not match one of them.
    """
    found = []
    for number, text in enumerate(references, 1):
        part = extract(text, pattern=pattern)
        if part is None:
            raise ValueError(
                f"the answer pattern {pattern!r} does not match reference {number}: {text[-80:]!r}"
            )
        found.append(part)
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the answer pattern {pattern!r} is not a regular expression: {error}"
        ) from error
    if not compiled.groups:
        raise ValueError(f"the answer pattern {pattern!r} has no group to take the answer from")
    return compiled
