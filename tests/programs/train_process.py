"""One of several processes that train together over gloo: real runs, one after another.

    python tests/programs/train_process.py PORT PROCESSES INDEX DEVICES CONFIG.json ...

Each process has DEVICES CPU devices. It prints one line of JSON for each run: the steps, and the
files in the run's folder that this process opened for writing. Checkpoints are not listed, because
orbax writes them from all processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"

import jax

from lorax_ft.config import Config


def main(port: int, processes: int, index: int, devices: int, *files: str) -> None:
    """Join the other processes, then train."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if cache := os.environ.get("TESTS_COMPILATION_CACHE"):
        jax.config.update("jax_compilation_cache_dir", cache)
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    assert jax.device_count() == processes * devices
    from lorax_ft.run.loop import train

    opened: set[str] = set()
    sys.addaudithook(lambda event, args: _note(opened, event, args))
    for file in files:
        opened.clear()
        result = train(Config.from_json(Path(file).read_text()))
        assert result is not None
        names = {os.path.relpath(path, result.folder) for path in opened}
        written = sorted(name for name in names if not name.startswith(("..", "checkpoints")))
        print(json.dumps({"steps": result.steps, "written": written}), flush=True)
    jax.distributed.shutdown()


def _note(opened: set[str], event: str, args: tuple[Any, ...]) -> None:
    """Record files opened for writing; the audit event `open` passes path, mode and flags."""
    if (
        event == "open"
        and isinstance(args[0], str | os.PathLike)
        and args[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        opened.add(os.fspath(args[0]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), *sys.argv[5:])
