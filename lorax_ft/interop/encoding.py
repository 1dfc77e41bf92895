"""Calls a tokenizer, whose regular expressions and normalizer are those of a stranger's file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

SECONDS = 60.0
CHARACTERS_PER_SECOND = 20_000
"""Tokenizers read some 500,000 on one core; slower than this, an expression does not end."""
SHORT = 2000
"""Characters that are read in the caller's thread: a thread takes some 50 microseconds to start."""
PANIC = "PanicException"


def run_tokenizer(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """`tokenizer(texts, **options)` of transformers, in a bounded time.

    Raises:
      ValueError: the tokenizer fails, or does not finish.
    """

    def call() -> Any:
        # Without verbose=False, transformers warns about every text that is longer than the
        # model's context.
        return tokenizer(texts, verbose=False, **options)

    size = len(texts) if isinstance(texts, str) else sum(map(len, texts))
    if size <= SHORT:
        return _without_panic(call)
    return _within(call, SECONDS + size / CHARACTERS_PER_SECOND, size)


def _within(call: Callable[[], Any], seconds: float, size: int) -> Any:
    """What `call` returns; raise if it takes longer.

    Nothing interrupts the Rust library. Its thread is left behind, and ends with the process.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(_without_panic(call))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="lorax_ft tokenizer", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise ValueError(
            f"the tokenizer did not finish {size:,} characters within {seconds:,.0f} seconds; an "
            "expression in its tokenizer.json may take forever: use another tokenizer"
        )
    return results[0]


def _without_panic(call: Callable[[], Any]) -> Any:
    """What `call` returns; any error as a ValueError, also a panic of the Rust library."""
    try:
        return call()
    # transformers uses the values of tokenizer_config.json as they are, whatever their types. A
    # panic is no Exception, and its class cannot be imported.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"the tokenizer failed on a text: {reason}") from error
