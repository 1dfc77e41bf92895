"""The output folder of a sweep: train.output with "-sweep" behind it.

A config file is made for the output of one run, and the best point's run is to lie there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lorax_ft.config import Config
from lorax_ft.interop.bucket import is_remote
from lorax_ft.interop.peft_checks import BASE
from lorax_ft.run.checkpoints import FOLDER as CHECKPOINTS
from lorax_ft.run.folder import check_same_run, is_empty, write_text
from lorax_ft.sweep.results import LOSSES, RESULTS

SUFFIX = "-sweep"
SWEEP = "sweep.json"
"""The options and the config of the sweep, by which its folder is known."""
BEST = "best.py"
ADAPTER = "adapter"
PLOT = "sweep.png"
FILES = (CHECKPOINTS, RESULTS, LOSSES, BEST, ADAPTER, BASE, PLOT)
"""Everything that a sweep writes besides sweep.json, and so all that overwriting it deletes.
sweep.json stays until the new one takes its place: a killed sweep can be started again."""


def sweep_folder(config: Config) -> Path:
    """The output folder of a sweep of this config.

    Raises:
      ValueError: it is on a bucket, where the files of a sweep cannot grow.
    """
    folder = Path(config.train.output + SUFFIX)
    if is_remote(folder):
        raise ValueError(
            f"train.output {config.train.output}: a sweep writes to a local folder; give one"
        )
    return folder


def check_sweep_folder(folder: Path, config: Config, options: dict[str, Any]) -> bool:
    """Raise if the folder cannot be used. Changes nothing on disk.

    Args:
      folder: the output folder.
      config: the config that is swept.
      options: the sweep's other options, which a resumed sweep must repeat.

    Returns:
      Whether the folder holds the sweep to resume.

    Raises:
      ValueError: it holds something else, or another sweep.
    """
    file = folder / SWEEP
    if not file.is_file():
        if config.train.resume == "always":
            raise ValueError(
                f"there is no sweep to resume in {folder}; leave train.resume at auto to begin one"
            )
        if is_empty(folder):
            return False
        # Overwriting deletes what a sweep writes, so it must be the folder of one.
        raise ValueError(
            f"{folder} is not empty and holds no sweep, so it is not overwritten; "
            "use another --train.output"
        )
    if config.train.overwrite:
        return False
    if config.train.resume == "never":
        raise ValueError(
            f"{folder} already holds a sweep; leave train.resume at auto to go on with it, or use "
            "--train.overwrite or another --train.output"
        )
    _check_same_sweep(json.loads(file.read_text()), config, options)
    return True


def make_sweep_folder(
    folder: Path, config: Config, options: dict[str, Any], *, resume: bool
) -> None:
    """Make the folder, delete the sweep to overwrite, and write what the new one is."""
    # Of several processes with one disk, one writes.
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        _remove(folder, FILES)
    text = {"sweep": options, "config": json.loads(config.to_json())}
    write_text(folder / SWEEP, json.dumps(text, indent=2) + "\n")


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_same_sweep(previous: dict[str, Any], config: Config, options: dict[str, Any]) -> None:
    """Raise if a resumed sweep differs from the one in the folder."""
    for name, value in options.items():
        # A sweep of an older version may lack an option.
        old = previous["sweep"].get(name)
        if old != value:
            raise ValueError(
                f"--{name} is {_shown(value)}, but the sweep to resume had {_shown(old)}; "
                "use the same value, or another --train.output"
            )
    before = Config.from_json(json.dumps(previous["config"]))
    check_same_run(config, before)
    # A single run may be resumed for more steps. Points of a sweep are compared at equal ones.
    if config.train.steps != before.train.steps or config.train.epochs != before.train.epochs:
        raise ValueError(
            f"train.steps is {config.train.steps} and train.epochs {config.train.epochs}, but the "
            f"sweep to resume had {before.train.steps} and {before.train.epochs}; use the same"
        )


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)
