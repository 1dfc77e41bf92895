"""The output folder of a run: what a run may overwrite, resume and write."""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from lorax_ft.config import Config
from lorax_ft.interop.bucket import check_bucket, delete, is_remote, output_path
from lorax_ft.run.checkpoints import FOLDER as CHECKPOINTS
from lorax_ft.run.log import LOG, PLOT
from lorax_ft.run.trace import PROFILE

CONFIG = "config.json"
# Prefix of the empty folder, on a bucket the object, that `check_folder` makes and deletes again.
# Another process of the run may see it, and must not take it for content.
PROBE = ".writable-"
# Everything that a run writes, and so all that overwriting it deletes.
RUN_FILES = (
    CONFIG,
    "adapter",
    "nf4_base",
    "model",
    CHECKPOINTS,
    "tensorboard",
    "wandb",
    PROFILE,
    LOG,
    PLOT,
)


def check_folder(config: Config) -> Config | None:
    """Raise if the output folder cannot be used, or if the run would destroy anything there.

    Changes nothing on disk.

    Returns:
      The config of the run to resume, or None for a new run.

    Raises:
      ValueError: the folder is not writable; it holds a run, and neither resume nor overwrite is
        set; it holds other files; overwriting it would delete an input of this run; there is no run
        to resume, or that run had another config.
    """
    folder = output_path(config.train.output)
    check_writable(folder)
    if config.train.overwrite:
        _check_inputs_outside(folder, config)
    holds_run = _is_run(folder / CONFIG)
    if config.train.resume:
        if not holds_run:
            raise ValueError(f"there is no run to resume in {folder}; start without --train.resume")
        previous = Config.from_json((folder / CONFIG).read_text())
        check_same_run(config, previous)
        return previous
    if is_empty(folder):
        return None
    if not holds_run:
        raise ValueError(
            f"{folder} is not empty and holds no run, so it is not overwritten; "
            "use another --train.output"
        )
    if not config.train.overwrite:
        raise ValueError(
            f"{folder} already holds a run; use --train.resume, --train.overwrite or another "
            "--train.output"
        )
    return None


def make_folder(config: Config) -> None:
    """Make the output folder, delete the run to overwrite, and write the resolved config.

    Call it after the setup: a run that fails to start must not delete the run that it overwrites.
    """
    folder = output_path(config.train.output)
    # Several processes share the folder, and one of them writes.
    if jax.process_index() == 0:
        if not is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not config.train.resume:
            _remove_run(folder)
        (folder / CONFIG).write_text(config.to_json() + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("output folder")


def check_writable(folder: Path) -> None:
    """Raise if the folder cannot be made or written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.output {folder} is a file; give a folder")
    if is_remote(folder):
        # orbax 0.12.8 takes every URL except gs:// for a relative path.
        if not str(folder).startswith("gs://"):
            raise ValueError(
                f"train.output {folder}: orbax saves checkpoints to a local folder or gs:// only; "
                "use one of them, and copy the run"
            )
        check_bucket(folder, probe=f"{PROBE}{uuid.uuid4().hex}")
        return
    existing = folder.absolute()
    while not existing.is_dir():
        existing = existing.parent
    # Permission bits do not tell: the file system may be read-only, or the user root.
    try:
        tempfile.TemporaryDirectory(dir=existing, prefix=PROBE).cleanup()
    except OSError as error:
        raise ValueError(
            f"train.output {folder}: cannot write to {existing}: {error.strerror}"
        ) from error


def _check_inputs_outside(folder: Path, config: Config) -> None:
    """Raise if overwriting the folder would delete the model or the adapter to start from."""
    inputs = {
        "adapter.continue_from": config.adapter.continue_from,
        "model.path": config.model.path,
    }
    for name, path in inputs.items():
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            raise ValueError(
                f"{name} {path} lies in {folder}, which train.overwrite deletes; "
                "use another --train.output"
            )


def _is_run(file: Path) -> bool:
    """Whether a config.json was written by a run: a model's folder holds a config.json too."""
    try:
        Config.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError):  # AttributeError: JSON, but not an object
        return False
    return True


def is_empty(folder: Path) -> bool:
    """Whether the folder does not exist or holds nothing."""
    if not folder.is_dir():
        return True
    return all(path.name.startswith(PROBE) for path in folder.iterdir())


def _remove_run(folder: Path) -> None:
    """Delete the files of a run, and no others."""
    if is_remote(folder):
        # config.json last: after a crash, the next run can still overwrite the rest.
        for name in reversed(RUN_FILES):
            delete(folder / name)
        return
    # Renaming is instant. A crash during the deletion then cannot leave half of the old run in
    # place, where it would be taken for a part of the new one.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".old-") as trash:
        for name in RUN_FILES:
            if (folder / name).exists():
                (folder / name).rename(Path(trash) / name)


def check_same_run(config: Config, previous: Config) -> None:
    """Raise if a field that shapes the run differs from the run to resume."""
    # A run that found its learning rate keeps it.
    if config.optim.learning_rate == "find":
        found = previous.optim.learning_rate
        optim = dataclasses.replace(config.optim, learning_rate=found)
        config = dataclasses.replace(config, optim=optim)
    # The number of steps, where to log and how to shard may change; these may not.
    fixed = {
        "model": ["path", "revision", "dtype"],
        "quant": _field_names(config.quant),
        "adapter": _field_names(config.adapter),
        "data": _field_names(config.data),
        "optim": _field_names(config.optim),
        "train": ["batch_size", "seed", "neftune_alpha", "router_aux_loss_coef"],
    }
    # The checkpoint holds the adapter, so the folder it started from may have moved.
    fixed["adapter"].remove("continue_from")
    for section, fields in fixed.items():
        for field in fields:
            old = getattr(getattr(previous, section), field)
            new = getattr(getattr(config, section), field)
            if old != new:
                raise ValueError(
                    f"{section}.{field} is {new!r}, but the run to resume had {old!r}; "
                    "use the same value, or another --train.output"
                )


def _field_names(section: object) -> list[str]:
    assert dataclasses.is_dataclass(section)
    return [field.name for field in dataclasses.fields(section)]
