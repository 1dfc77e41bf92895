"""Runs that are killed and started again, compared with one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lorax_ft.config import Config
from lorax_ft.run.log import LOG

PROGRAM = Path(__file__).parent / "programs/killed_runs.py"
TIMINGS = ("tokens_per_second",)
"""What no two runs have in common."""


def run_killed(config: Config, moments: Sequence[str], file: Path) -> list[dict[str, Any]]:
    """Run a config once for each moment at which to kill it (`killed_runs.py`)."""
    file.write_text(config.to_json())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment["TESTS_COMPILATION_CACHE"] = jax.config.jax_compilation_cache_dir or ""
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(file), *moments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["killed"] or line["code"] == 0 for line in lines), done.stderr[-3000:]
    return lines


def outcome(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common: the adapter, the log, the end of the data."""
    log = []
    for line in (folder / LOG).read_text().splitlines():
        values = json.loads(line)
        log.append({name: value for name, value in values.items() if name not in TIMINGS})
    weights = (folder / "adapter/adapter_model.safetensors").read_bytes()
    finished = (folder / "finished.json").read_text()
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    hidden = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    return {
        "log": log,
        "weights": weights,
        "finished": finished,
        "checkpoints": steps,
        "hidden": hidden,
    }
