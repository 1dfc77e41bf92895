"""Answers to math word problems (GSM8K, 2110.14168): the number that a solution ends with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lorax_ft.evaluation.exact_match import extract

MARKED = r"#### (-?[\d,.]+)"
"""The number behind the marker of GSM8K's solutions."""
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def final_number(solution: str) -> str | None:
    r"""Returns the number behind the last "####", or else the last number; None if there is none.

    Commas, a dollar sign and zeros at the end of a fraction are removed.

    >>> final_number("She pays $1,250.00.\n#### 1,250")
    '1250'
    >>> final_number("So she pays $1,250.50 in all.")
    '1250.5'
    """
    # The marker of GSM8K's solutions, which a model that was tuned on them writes.
    marked = extract(solution, pattern=MARKED)
    if marked is not None and NUMBER.fullmatch(marked):
        return _plain(marked)
    numbers = NUMBER.findall(solution)
    if not numbers:
        return None
    # Without a marker, as other models answer, the result comes last.
    return _plain(numbers[-1])


def majority(numbers: Sequence[str | None]) -> str | None:
    """Returns the most frequent number, of equally frequent ones the first; None if all are None.

    This is self-consistency (2203.11171).

    >>> majority(["8", None, "9", "9", None, None])
    '9'
    """
    votes = Counter(number for number in numbers if number is not None)
    if not votes:
        return None
    # Counter keeps the order in which its members came first.
    return votes.most_common(1)[0][0]


def reference_number(solution: str, place: str) -> str:
    """Returns the number of a reference solution.

    Raises:
      ValueError: it has none.
    """
    number = final_number(solution)
    if number is None:
        raise ValueError(
            f"{place}: the reference has no number to compare an answer with: {solution[-80:]!r}"
        )
    return number


def _plain(number: str) -> str:
    # The period is that of the sentence.
    number = number.replace(",", "").replace("$", "").rstrip(".")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number
