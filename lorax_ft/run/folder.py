"""The output folder of a run: what it holds, and when it may be used again."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from lorax_ft.config import Config
from lorax_ft.run.log import LOG, PLOT

CONFIG = "config.json"
PROBE = ".writable-"  # of this process, or of another that starts
OWN = (
    CONFIG,
    "adapter",
    "nf4_base",
    "model",
    "checkpoints",
    "tensorboard",
    "wandb",
    LOG,
    PLOT,
)  # what a run writes


def check_folder(config: Config) -> Config | None:
    """Refuse an output folder where something would be lost. Changes nothing.

    Returns:
      The config that a run to resume had; None where a run begins.

    Raises:
      ValueError: the folder holds a run and neither resume nor overwrite is given, or holds something else, or
        there is no run to resume, or the run to resume was another, or the folder may not be written.
    """
    folder, train = Path(config.train.output), config.train
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.output {folder} is a file; give a folder")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    try:
        tempfile.TemporaryDirectory(dir=existing, prefix=PROBE).cleanup()
    except OSError as error:
        raise ValueError(
            f"train.output {folder}: nothing can be written to {existing}: {error.strerror}"
        ) from error
    holds_run = _is_run(folder / CONFIG)
    holds = folder.is_dir() and any(not path.name.startswith(PROBE) for path in folder.iterdir())
    for name, path in (
        ("adapter.continue_from", config.adapter.continue_from),
        ("model.path", config.model.path),
    ):
        if (
            train.overwrite
            and path is not None
            and folder.resolve() in Path(path).resolve().parents
        ):
            raise ValueError(
                f"{name} {path} lies in {folder}, which train.overwrite deletes; give another output"
            )
    if train.resume and not holds_run:
        raise ValueError(f"there is no run to resume in {folder}; start without --train.resume")
    if train.resume:
        then = Config.from_json((folder / CONFIG).read_text())
        _check_same_run(config, then)
        return then
    if holds and not holds_run:
        raise ValueError(
            f"{folder} is not empty and holds no run, so it is left alone; give another --train.output"
        )
    if holds and not train.overwrite:
        raise ValueError(
            f"{folder} holds another run; give --train.resume, --train.overwrite or another --train.output"
        )
    return None


def make_folder(config: Config) -> None:
    """Make the output folder, of which `check_folder` approved, with the resolved config in it.

    Called when all else is loaded, so that a run that is overwritten is not lost to one that cannot start.
    """
    folder = Path(config.train.output)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not config.train.resume:
            _remove_run(folder)
        (folder / CONFIG).write_text(config.to_json() + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("output folder")


def _is_run(file: Path) -> bool:
    """Whether a config.json is a run's, and not a model's."""
    try:
        Config.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _remove_run(folder: Path) -> None:
    """Delete what a run left in the folder, and nothing else: moved aside first, so that it is gone at once."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".old-") as aside:
        for name in OWN:
            if (folder / name).exists():
                (folder / name).rename(Path(aside) / name)


def _check_same_run(now: Config, then: Config) -> None:
    """Raise where a resumed run would not be the run that was interrupted."""
    same = {
        "model": ("path", "revision", "dtype"),
        "quant": tuple(f.name for f in dataclasses.fields(now.quant)),
        "adapter": tuple(
            f.name for f in dataclasses.fields(now.adapter) if f.name != "continue_from"
        ),  # it may have moved
        "data": tuple(f.name for f in dataclasses.fields(now.data)),
        "optim": tuple(f.name for f in dataclasses.fields(now.optim)),
        "train": ("batch_size", "seed", "neftune_alpha"),
    }
    for section, fields in same.items():
        for field in fields:
            old, new = getattr(getattr(then, section), field), getattr(getattr(now, section), field)
            if old != new:
                raise ValueError(
                    f"{section}.{field} is {new!r}, but the run to resume had {old!r}; "
                    "use the same, or another --train.output"
                )
