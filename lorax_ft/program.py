"""The commands as the user starts them, for messages."""

from __future__ import annotations

import sys
from pathlib import Path


def command(name: str) -> str:
    """A command as this process was started: `lorax-ft merge`, or `python scripts/merge.py`.

    A process that is no command, such as a notebook, is told the installed one.

    >>> command("merge")
    'lorax-ft merge'
    """
    script = _script(name)
    return f"python {script}" if script is not None else f"lorax-ft {name}"


def either(python: str, shell: str) -> str:
    """What a message says to do: in a command what the shell takes, elsewhere Python.

    >>> either("save_peft writes it", "--target peft writes it")
    'save_peft writes it'
    """
    # `lorax-ft` sets its name to that of the command, "lorax-ft merge".
    is_command = sys.argv[0].startswith("lorax-ft ") or _script("convert-config") is not None
    return shell if is_command else python


def _script(name: str) -> Path | None:
    """The script of a command beside the one that this process runs, if it runs one."""
    program = Path(sys.argv[0])
    script = program.with_name(f"{name.replace('-', '_')}.py")
    return script if program.parent.name == "scripts" and script.is_file() else None
