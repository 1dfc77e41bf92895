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
    program = Path(sys.argv[0])
    script = program.with_name(f"{name.replace('-', '_')}.py")
    if program.parent.name == "scripts" and script.is_file():
        return f"python {script}"
    return f"lorax-ft {name}"
