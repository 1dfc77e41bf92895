"""Rows that cannot be used: the first one ends the reading, or they are left out and counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorax_ft.files import write_file

FILE = "bad_rows.txt"
"""The file in a run's output folder that lists them."""
_MOST_LISTED = 10_000


@dataclasses.dataclass
class BadRows:
    """What happens to rows that cannot be used, and those that were met."""

    skip: bool = False
    """Whether they are left out; otherwise the first one is an error."""
    count: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    """What is wrong with the first 10,000, each with its place."""

    def met(self, error: Exception) -> None:
        """Notes a row that cannot be used, or raises its error."""
        if not self.skip:
            raise error
        self.note(str(error))

    def note(self, problem: str) -> None:
        """Notes a row that was left out."""
        self.count += 1
        if len(self.problems) < _MOST_LISTED:
            self.problems.append(problem)

    def write(self, folder: Path) -> None:
        """Lists them in a file, one a line; without any, removes the file of an earlier run."""
        file = folder / FILE
        if not self.count:
            file.unlink(missing_ok=True)
            return
        lines = list(self.problems)
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines):,} more")
        write_file(file, "\n".join(lines) + "\n")


STOP = BadRows()
"""The first one is an error."""
