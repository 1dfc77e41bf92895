"""What the scripts share: argument parsing, one-line errors, quiet libraries. Imports no JAX."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import tyro

from lorax_ft.config import Config
from lorax_ft.config.foreign.source import Source, named_keys
from lorax_ft.config.load import Loaded, read_config
from lorax_ft.config.run import unchecked
from lorax_ft.options import (
    advice,
    check_given_once,
    flag_with_value,
    given_options,
    wrong_value,
)
from lorax_ft.secrets import redacted

Args = TypeVar("Args")
RunArgs = TypeVar("RunArgs", bound=Config)

QUIET = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # it warns that PyTorch is missing
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # it warns if the process forks after tokenizing
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",  # the log of XLA
}

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
DEPRECATED_OPTION = r"\w+\.\w+ is deprecated"


def run(main: Callable[[Args], None], args_type: type[Args]) -> None:
    """Parse the command line into `args_type` and call `main` with it.

    Bad input ends the process with a one-line error and status 2 (see `one_line_errors`).

    Args:
      main: the script; it raises ValueError or OSError on bad input.
      args_type: a dataclass; the docstring under each field is its help text.
    """
    with one_line_errors():
        main(parse(args_type))


def parse(
    args_type: type[Args],
    *,
    default: Args | None = None,
    argv: Sequence[str] | None = None,
) -> Args:
    """Parse the command line into `args_type`; `--help` prints the help and ends the process.

    Args:
      args_type: a dataclass.
      default: values of options that are not given; None uses the defaults of the dataclass.
      argv: the arguments; None uses those of the process.

    Raises:
      ValueError: an option is unknown (the error names the closest one, or ours for the name that
        another trainer has for it), is given twice, lacks its value or has the wrong type, or a
        value is invalid.
    """
    given = _with_value_of_resume(sys.argv[1:] if argv is None else argv)
    check_given_once(given, args_type)
    captured = io.StringIO()
    defaults = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(captured), warnings.catch_warnings(record=True) as caught:
            # Python shows a DeprecationWarning only if the code in __main__ causes it; here tyro
            # does, for an option that the user typed.
            warnings.filterwarnings("always", DEPRECATED_OPTION, DeprecationWarning)
            args = tyro.cli(args_type, args=given, default=defaults)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        # A name of another trainer comes first: tyro would suggest nothing, or the wrong option.
        message = (
            advice(given, args_type)
            or flag_with_value(given, args_type)
            or wrong_value(given, args_type)
        )
        raise ValueError(message or _unbox(captured.getvalue())) from None
    # tyro may build a section several times.
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}", file=sys.stderr)
    return args


def _with_value_of_resume(argv: Sequence[str]) -> list[str]:
    """The arguments with "always" behind --train.resume where it has no value, as it was a flag.

    >>> _with_value_of_resume(["--train.resume", "--train.steps", "3"])
    ['--train.resume', 'always', '--train.steps', '3']
    """
    given = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        given.append(argument)
        if argument == "--train.resume" and following.startswith("--"):
            given.append("always")
    return given


class Run(NamedTuple, Generic[RunArgs]):
    """What a command line says about a run."""

    args: RunArgs
    config: Config
    """The config alone."""
    source: Source | None
    """The file of --config, if it is that of another trainer."""


def parse_run(args_type: type[RunArgs]) -> Run[RunArgs]:
    """Parse the command line of a script that runs a `Config`: the file of --config, then options.

    Args:
      args_type: a subclass of `Config` with further options, among them `config`.

    Raises:
      ValueError: as `read_config` and `parse`.
    """
    # Before the full parser, whose defaults are the values of the config file.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", nargs="?")
    config_file = first.parse_known_args()[0].config
    loaded = Loaded(Config())
    if config_file:
        loaded = read_config(config_file, given_options(sys.argv[1:]))
    return parse_over(args_type, loaded, config=config_file)


def parse_over(
    args_type: type[RunArgs],
    loaded: Loaded,
    *,
    argv: Sequence[str] | None = None,
    **others: Any,
) -> Run[RunArgs]:
    """Parse options over the values of a config.

    Args:
      args_type: a subclass of `Config` with further options.
      loaded: the config.
      argv: the arguments; None uses those of the process.
      others: the values of further options, unless they are given.

    Raises:
      ValueError: as `parse`.
    """
    default = unchecked(args_type, {**_sections(loaded.config), **others})
    with named_keys(loaded.source):
        args = parse(args_type, default=default, argv=argv)
    return Run(args, Config(**_sections(args)), loaded.source)


def command_line() -> str:
    """The command that started this process, as a shell takes it."""
    program, *arguments = sys.argv
    if program.endswith(".py"):
        program = shlex.join(["python", program])
    return f"{program} {shlex.join(arguments)}".strip()


def _sections(config: Config) -> dict[str, Any]:
    """The values of Config's fields, without those that a subclass adds."""
    # Not asdict(), which would also turn the nested configs into dicts.
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}


def _show_warning(message: Warning | str, *place: object, **options: object) -> None:
    """Print a warning in one line, without the line of code that it comes from."""
    print(redacted(f"warning: {message}"), file=sys.stderr)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process if the block raises: with status 2 on bad input, 130 on an interrupt.

    The error takes one line, or the whole traceback if LORAX_FT_DEBUG=1 is set in the environment.
    Warnings take one line each. Libraries that are imported inside the block are quiet.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if os.environ.get("LORAX_FT_DEBUG"):
            raise
        _flush()  # else the error could appear before what was printed earlier
        print(redacted(f"error: {_one_line(error)}"), file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # Of JAX, which is not imported here.
        if OUT_OF_MEMORY not in str(error) or os.environ.get("LORAX_FT_DEBUG"):
            raise
        _flush()
        _, _, reason = str(error).partition(f"{OUT_OF_MEMORY}: ")
        print(f"error: {_out_of_memory(reason)}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:  # of NumPy and of Python
        if os.environ.get("LORAX_FT_DEBUG"):
            raise
        _flush()
        print(f"error: {_out_of_memory(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)


def _flush() -> None:
    """Write what was printed; drop it where it cannot be written: a full disk, a closed pipe."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python tries once more at its end, and would end with another status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(reason: str) -> str:
    """That memory ran out, how much there is, and what to do, in one line."""
    first = " ".join(reason.partition("\n")[0].split()).rstrip(".")
    first = re.sub(r"\b(\d{7,}) bytes", lambda size: f"{int(size[1]) / 1e9:,.2f} GB", first)
    # It imports JAX, which takes seconds and is imported already where memory ran out.
    from lorax_ft.run.memory import ADVICE, describe_memory

    return (
        f"the memory is too small: {first or 'an allocation failed'}, but {describe_memory()}; "
        f"{ADVICE}"
    )


def _one_line(error: Exception) -> str:
    """The message of an error in one line; for errors of the system, file and reason only."""
    if isinstance(error, OSError) and error.strerror:
        # str(error) would start with "[Errno 2]".
        reason = error.strerror
        if error.errno == errno.EMFILE:
            reason += "; allow more of them, as with ulimit -n 1024"
        if error.filename:
            return f"{error.filename}: {reason}"
        return reason
    return " ".join(str(error).split()) or type(error).__name__


def _unbox(box: str) -> str:
    """The message in the box that tyro draws around an error, in one line, with a suggestion."""
    sections = _box_sections(box)
    message = "the arguments cannot be parsed"
    for section in sections:
        if section:
            message = " ".join(section)
            break
    # Errors raised by the dataclass itself have this prefix, and say how to fix the input.
    without_prefix = re.sub(r"^Error parsing \w+: ", "", message)
    if without_prefix != message:
        return without_prefix.rstrip(".")
    message = message.rstrip(".")
    if message.startswith("Unrecognized"):
        unknown = message.partition(": ")[2]
        if not unknown.startswith("-"):
            return f"{unknown!r} belongs to no option; put quotes around a text with spaces"
        # tyro lists the values of unknown options among their names.
        message = re.sub(r", [^-,][^,]*", "", message)
        # The sections after the first list similar options, the closest one first.
        for section in sections[1:]:
            for line in section:
                if line.startswith("--"):
                    option = line.split()[0][2:].replace("-", "_")
                    return f"{message}; did you mean --{option}?"
    return f"{message}; --help lists all options"


def _box_sections(box: str) -> list[list[str]]:
    """The lines of text in a box, split into sections at its horizontal rules."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        line = re.sub(r"\x1b\[[\d;]*m", "", line)  # colors
        # tyro draws with "-" if the output cannot encode Unicode.
        line = re.sub(r"-{3,}", lambda rule: "─" * len(rule[0]), line)
        line = line.strip("│╭╮╰╯ ")
        if set(line) == {"─"}:
            sections.append([])
        elif line and "─ " not in line and " ─" not in line:  # text, and not a title in a rule
            sections[-1].append(line)
    # Without Unicode there is no box: a rule under the title comes before the first section.
    return sections if "╭" in box else sections[1:]
