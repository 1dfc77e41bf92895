"""Exact match: the fraction of answers that equal their references.

Either the whole texts are compared, or what a regular expression extracts from both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from lorax_ft import regexes
from lorax_ft.data.conversation import Conversation, Message, as_conversation
from lorax_ft.data.formats import split_answer
from lorax_ft.inference.texts import answer
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Which answers are correct."""

    correct: tuple[bool, ...]
    """Whether each answer is correct, in the order of the answers."""

    @property
    def count(self) -> int:
        """Number of correct answers."""
        return sum(self.correct)

    @property
    def total(self) -> int:
        """Number of answers."""
        return len(self.correct)

    @property
    def fraction(self) -> float:
        """Fraction of correct answers, between 0 and 1."""
        return self.count / self.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """The questions, the model's answers and the references, in the same order."""

    prompts: list[list[Message]]
    """The messages before each answer."""
    answers: list[str]
    """What the model generated, stripped."""
    references: list[str]
    """The last assistant turn of each conversation."""
    match: ExactMatch | None
    """The result for the answers that were compared; None if none were."""


def exact_match(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    pattern: str | None = None,
) -> ExactMatch:
    r"""Compares answers with their references.

    Args:
      answers: what the model generated.
      references: the expected answers.
      pattern: regular expression; its first group is compared, at its last match in each text. If
        the group is a number, commas are removed first. None compares the whole texts, stripped.

    Raises:
      ValueError: there is nothing to compare, or the pattern is not a regular expression, has no
        group or does not match a reference.

    >>> pattern = r"#### (-?[\d,.]+)"
    >>> exact_match(["4 + 4 = 8, so #### 1,008"], ["#### 1008"], pattern=pattern).fraction
    1.0
    """
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} answers and {len(references)} references; "
            "give one reference for each answer, and at least one answer"
        )
    expected = extract_references(references, pattern=pattern)
    correct = []
    for text, reference in zip(answers, expected, strict=True):
        # An answer without a match is None, which equals no reference.
        correct.append(extract(text, pattern=pattern) == reference)
    return ExactMatch(correct=tuple(correct))


def evaluate_answers(
    model: Model,
    params: Tree,
    conversations: Sequence[Conversation | Sequence[Message]],
    *,
    max_new_tokens: int,
    compared: int | None = None,
    pattern: str | None = None,
    batch_size: int = 32,
) -> Answers:
    """Generates the last answer of each conversation, greedily, and compares it with the reference.

    Args:
      model: the model; its tokenizer is used too.
      params: parameters, with or without adapters.
      conversations: conversations (or their messages) with an assistant turn each; turns after
        the last one are ignored.
      max_new_tokens: the largest number of tokens in an answer.
      compared: how many answers to compare, counted from the first; None compares all.
      pattern: see `exact_match`.
      batch_size: answers that are generated at once.

    Raises:
      ValueError: as `exact_match` and `answer`, or a conversation has no assistant turn.
    """
    prompts = []
    questions = []
    references = []
    for number, given in enumerate(conversations, 1):
        conversation = as_conversation(given)
        messages = conversation.messages
        if all(message["role"] != "assistant" for message in messages):
            raise ValueError(
                f"conversation {number} has no assistant turn to compare an answer with"
            )
        prompt, reference = split_answer(messages)
        prompts.append(prompt)
        # With the tools and documents of the whole conversation, which its template shows.
        questions.append(dataclasses.replace(conversation, messages=prompt))
        references.append(reference)
    expected = references[:compared]
    # A pattern that does not fit must fail now, not after minutes of generation.
    extract_references(expected, pattern=pattern)
    answers = answer(model, params, questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    match = None
    if expected:
        match = exact_match(answers[: len(expected)], expected, pattern=pattern)
    return Answers(prompts=prompts, answers=answers, references=references, match=match)


def extract(text: str, *, pattern: str | None) -> str | None:
    r"""Returns the part of a text that is compared; None if the pattern does not match.

    This is the first group of the pattern's last match, without commas if it is a number.

    >>> extract("first #### 3, then #### 1,250.", pattern=r"#### ([\d,.]+)")
    '1250'
    """
    if pattern is None:
        return text.strip()
    found = None
    # A model may write the answer's marker several times while it reasons; the last match counts.
    _check_pattern(pattern)
    for match in regexes.finditer(pattern, text):
        # A group in an unused alternative is None, as in "(a)|b".
        if match[1] is not None:
            found = match[1].strip()
    if found is None:
        return None
    if re.fullmatch(r"[-+]?\d[\d,]*(\.\d*)?", found):
        # A pattern such as ([\d.]+) also captures the period that ends the sentence.
        return found.replace(",", "").removesuffix(".")
    return found


def extract_references(references: Sequence[str], *, pattern: str | None) -> list[str]:
    """Returns the part of each reference that is compared.

    Raises:
      ValueError: the pattern is not a regular expression, has no group or does not match one of
        the references.
    """
    extracted = []
    for number, text in enumerate(references, 1):
        part = extract(text, pattern=pattern)
        if part is None:
            # The end of the reference is where an answer usually stands.
            raise ValueError(
                f"the answer pattern {pattern!r} does not match reference {number}: {text[-80:]!r}"
            )
        extracted.append(part)
    return extracted


def _check_pattern(pattern: str) -> None:
    """Raise unless a pattern is a regular expression with a group."""
    try:
        compiled = regexes.compiled(pattern)
    except ValueError as error:
        raise ValueError(f"the answer pattern {error}") from error
    if not compiled.groups:
        raise ValueError(f"the answer pattern {pattern!r} has no group to take the answer from")
