"""What the scripts share: arguments by tyro, errors in one line, quiet libraries. Imports no JAX."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tyro

Args = TypeVar("Args")

QUIET = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # that PyTorch is not there
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # it warns where a process forks after tokenizing
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA's own log
}


def run(main: Callable[[Args], None], args_type: type[Args]) -> None:
    """Parses the command line into `args_type` and calls `main` with it.

    Bad input ends the process with one line and status 2 (see `one_line_errors`).

    Args:
      main: does the work; it raises ValueError or OSError where its input is bad.
      args_type: a dataclass; the sentence under a field is its help.
    """
    with one_line_errors():
        main(parse(args_type))


def parse(
    args_type: type[Args], *, default: Args | None = None, argv: Sequence[str] | None = None
) -> Args:
    """The command line as an `args_type`; `--help` prints and ends the process.

    Args:
      args_type: a dataclass.
      default: values for what is not given; None takes the dataclass's own.
      argv: the arguments; None takes the process's.

    Raises:
      ValueError: an option is unknown (with the nearest), missing or of the wrong type, or a value is out of range.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                args_type,
                args=argv,
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_unboxed(said.getvalue())) from None


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process where the block raises: bad input with one line and status 2, an interruption with 130.

    With LORAX_FT_DEBUG=1 in the environment the traceback is shown. Libraries imported in the block are quiet.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LORAX_FT_DEBUG"):
            raise
        sys.stdout.flush()
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        sys.exit(130)


def _message(error: Exception) -> str:
    """The error in one line; the system's own errors by file and reason, without their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _unboxed(box: str) -> str:
    """The first section of tyro's box of an error, and the names of similar arguments, in one line."""
    # Where the output is not Unicode, tyro draws no box: rules of -, the first under a title.
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = [
        re.sub(r"-{3,}", lambda rule: "─" * len(rule[0]), line).strip("│╭╮╰╯ ")
        for line in plain.splitlines()
    ]
    sections: list[list[str]] = [[]]
    for line in lines:
        if set(line) == {"─"}:
            sections.append([])
        elif line and "─ " not in line and " ─" not in line:
            sections[-1].append(line)
    sections = sections if "╭" in plain else sections[1:]
    message = " ".join(next(filter(None, sections), ["the arguments cannot be read"]))
    checked = re.match(
        r"Error parsing \w+: ", message
    )  # by the dataclass itself, which says what to do
    message = message[checked.end() if checked else 0 :].rstrip(".")
    unknown = message.startswith("Unrecognized")
    near = [
        line.split()[0]
        for section in sections[1:]
        for line in section
        if unknown and line.startswith("--")
    ]
    hint = "" if checked else "; --help lists all options"
    return message + (f"; did you mean {near[0]}?" if near else hint)
