"""What the generations of a sweep share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from lorax_ft.sweep.setup import Loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A sweep under way: what it trains on, and where it prints and writes."""

    loaded: Loaded
    console: Console
    folder: Path
    parallel: int
    """Adapters that train together, at most."""
    resume: bool
    """Whether the folder holds the start of this sweep."""
    command: str | None
    """The command line that started the sweep, for the model card."""
