"""Bounds what a chat template, a program of a stranger, takes in time and in memory.

transformers renders templates in jinja2's sandbox: they reach neither files nor the interpreter,
and `range` has at most 100,000 numbers. It bounds neither time nor memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from lorax_ft.memory_limit import memory_limit
from lorax_ft.time_limit import time_limit

SECONDS = 10.0
"""A conversation is rendered in well under a millisecond. A template that takes this long loops."""
MEMORY = 2_000_000_000
"""Bytes by which the process may grow while a conversation is rendered."""
LONGEST_TEMPLATE = 2_000_000


@contextlib.contextmanager
def template_limits(template: str) -> Iterator[None]:
    """Raises in the code inside, which compiles or renders a template, if it takes too much.

    Raises:
      ValueError: the template is enormous, or computes powers.
      TimeoutError: it takes more than 10 seconds.
      MemoryError: it takes more than 2 GB.
    """
    check_template(template)
    # The limit of time ends first: its error must not come while the limit of memory is lifted.
    with memory_limit(MEMORY), time_limit(SECONDS):
        yield


@functools.lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Raise for what the limits do not reach: a single operation cannot be interrupted.

    Raises:
      ValueError: as `template_limits`.
    """
    import jinja2

    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"the chat template has more than {LONGEST_TEMPLATE:,} characters")
    before = ""
    try:
        for _, kind, value in jinja2.Environment().lex(template):
            if kind == "whitespace":
                continue
            # Behind a bracket or a comma it unpacks arguments.
            if value == "**" and before not in ("(", ","):
                raise ValueError("the chat template computes a power, which may take forever")
            before = value
    except jinja2.TemplateSyntaxError:
        # Where it is rendered, the error says where in the template.
        return
