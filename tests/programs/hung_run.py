"""A run whose third step hangs on the device, in a callback that sleeps.

    python tests/programs/hung_run.py CONFIG.json

The watchdog of train.step_timeout has to end it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"

import jax

from lorax_ft.config import Config
from lorax_ft.run import program
from lorax_ft.run.loop import train

HANGS = 3
make_train_step = program.make_train_step


def hang(step: Any) -> None:
    """Sleep for an hour in the step that hangs."""
    if int(step) + 1 == HANGS:
        time.sleep(3600)


def make_hanging_step(*args: Any, **options: Any) -> Any:
    """The training step, whose device calls `hang`."""
    train_step = make_train_step(*args, **options)

    def step(state: Any, *rest: Any) -> Any:
        jax.debug.callback(hang, state.step)
        return train_step(state, *rest)

    return step


def main(file: str) -> None:
    """Train."""
    jax.config.update("jax_num_cpu_devices", 1)
    program.make_train_step = make_hanging_step
    train(Config.from_json(Path(file).read_text()))


if __name__ == "__main__":
    main(sys.argv[1])
