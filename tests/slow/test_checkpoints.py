"""A checkpoint of every kind of run, through --checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_cases import Main
from test_checkpoint_option import QUICK, RUNS, check_last_checkpoint


@pytest.mark.parametrize("name", [name for name in RUNS if name not in QUICK])
def test_the_last_checkpoint_is_what_the_run_saved(
    name: str, main: Main, tmp_path: Path, capsys: Any
) -> None:
    check_last_checkpoint(name, main, tmp_path, capsys)
