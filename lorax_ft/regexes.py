"""Regular expressions of users and of files, whose time is bounded.

Python's own `re` may take years for a text of 40 characters, and nothing interrupts it. The package
`regex` matches the same expressions, and can be given a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import regex

LONGEST = 10_000
"""Characters of a pattern."""
SECONDS = 2.0
"""For one text, such as the path of a module or an answer."""


def fullmatch(pattern: str, text: str) -> bool:
    """Whether a pattern matches the whole text.

    Raises:
      ValueError: the pattern is no regular expression, or takes too long.
    """
    try:
        return compiled(pattern).fullmatch(text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise _too_slow(pattern, text) from error


def finditer(pattern: str, text: str) -> Iterator[Any]:
    """The matches of a pattern in a text, one after the other.

    Raises:
      ValueError: as `fullmatch`.
    """
    try:
        yield from compiled(pattern).finditer(text, timeout=SECONDS)
    except TimeoutError as error:
        raise _too_slow(pattern, text) from error


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str) -> Any:
    """The compiled pattern, of `regex`.

    Raises:
      ValueError: it is no regular expression, or is enormous.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"a regular expression has {len(pattern):,} characters, above {LONGEST:,}")
    try:
        return regex.compile(pattern)
    # Of a pattern such as "((((…" and of one with a huge count.
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {reason}") from error


def _too_slow(pattern: str, text: str) -> ValueError:
    return ValueError(
        f"the regular expression {pattern[:80]!r} did not finish within {SECONDS:g} seconds on "
        f"{text[:80]!r}; give one without repeats inside repeats"
    )
