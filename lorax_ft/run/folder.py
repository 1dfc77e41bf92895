"""The output folder of a run: what a run may overwrite, resume and write."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from lorax_ft.config import Config
from lorax_ft.files import named_errors, read_text
from lorax_ft.interop.bucket import check_bucket, delete, is_remote, output_path
from lorax_ft.run.checkpoints import FOLDER as CHECKPOINTS
from lorax_ft.run.checkpoints import Checkpoints, warn_of_damage
from lorax_ft.run.lock import LOCK
from lorax_ft.run.log import LOG, PLOT
from lorax_ft.run.trace import PROFILE

CONFIG = "config.json"
FINISHED = "finished.json"
"""Written when a run has ended and all of its results are in place."""
# Prefix of the empty folder, on a bucket the object, that `check_writable` makes and deletes again.
# Another process of the run may see it, and must not take it for content.
PROBE = ".writable-"
TRASH = ".old-"
# What decides where a run ends, and what it leaves behind: with another value, a finished run goes
# on, or at least ends anew.
ENDS = ("steps", "epochs", "max_minutes", "patience", "load_best", "push_to_hub")
FOLDERS = ("adapter", "nf4_base", "model")
# Everything that a run writes, and so all that overwriting it deletes.
RUN_FILES = (
    FINISHED,
    CHECKPOINTS,
    *FOLDERS,
    "tensorboard",
    "wandb",
    PROFILE,
    LOG,
    PLOT,
)
# The starts of names that a run writes to before it renames them. A killed run leaves them behind.
LEFTOVERS = (
    PROBE,
    TRASH,
    *(f".{name}" for name in (CONFIG, FINISHED, LOG)),
    *(f".{name}-" for name in FOLDERS),
)


class Start(NamedTuple):
    """How a run starts in its output folder."""

    previous: Config | None = None
    """The config of the run to go on with; None for a new run."""
    step: int | None = None
    """The checkpoint to go on from; None: from the beginning."""
    finished: bool = False
    """Whether that run has ended, so that nothing is left to do."""


def check_folder(config: Config) -> Start:
    """How the run starts; raise if its output folder holds something else.

    Changes nothing on disk. `check_writable` comes first.

    Raises:
      ValueError: the folder holds other files, or another run; train.resume is always, and there is
        nothing to go on from; it is never, and there is a run; all checkpoints are damaged;
        overwriting the folder would delete an input of this run.
    """
    folder = output_path(config.train.output)
    resume, overwrite = config.train.resume, config.train.overwrite
    if overwrite:
        _check_inputs_outside(folder, config)
    if not _is_run(folder / CONFIG):
        if resume == "always":
            raise ValueError(
                f"there is no run to resume in {folder}; leave train.resume at auto to begin one"
            )
        if is_empty(folder):
            return Start()
        raise ValueError(
            f"{folder} is not empty and holds no run, so it is not overwritten; "
            "use another --train.output"
        )
    if overwrite:
        return Start()
    if resume == "never":
        raise ValueError(
            f"{folder} already holds a run; leave train.resume at auto to go on with it, or use "
            "--train.overwrite or another --train.output"
        )
    previous = Config.from_json(_read_config(folder / CONFIG))
    check_same_run(config, previous)
    has_result = any((folder / name).is_dir() for name in ("adapter", "model"))
    if has_result and (folder / FINISHED).is_file() and _ends_alike(config, previous):
        return Start(previous, finished=True)
    return Start(previous, _find_step(config, folder))


def _ends_alike(config: Config, previous: Config) -> bool:
    """Whether two configs end a run after the same steps, with the same results."""
    return all(getattr(config.train, name) == getattr(previous.train, name) for name in ENDS)


def _find_step(config: Config, folder: Path) -> int | None:
    """The newest intact checkpoint; None if the run was stopped before its first one."""
    checkpoints = Checkpoints(folder / CHECKPOINTS, keep=config.train.keep_checkpoints)
    found = checkpoints.find()
    if found.step is None and found.damaged:
        # To begin anew would delete what somebody may want to repair.
        damage = next(iter(found.damaged.values()))
        raise ValueError(
            f"all checkpoints in {folder} are damaged ({damage}); restore one of them, or begin "
            "anew with --train.overwrite"
        )
    if found.step is None and config.train.resume == "always":
        raise ValueError(
            f"the run in {folder} has no checkpoint to resume from; leave train.resume at auto to "
            "begin it again"
        )
    warn_of_damage(folder, found)
    return found.step


def make_folder(config: Config, start: Start) -> None:
    """Make the output folder, delete the run to overwrite, and write the resolved config.

    Call it after the setup: a run that fails to start must not delete the run that it overwrites.
    A kill at any point leaves a folder that the same command takes: the old config.json stays until
    nothing else of the old run is left, and is then replaced at once.
    """
    folder = output_path(config.train.output)
    # Several processes share the folder, and one of them writes.
    if jax.process_index() == 0:
        if not is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _clean(folder)
        if start.step is None:
            _remove_run(folder)
        # Not finished any more, if it goes on.
        if (folder / FINISHED).exists():
            (folder / FINISHED).unlink()
        write_text(folder / CONFIG, config.to_json() + "\n")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("output folder")


def mark_finished(folder: Path, *, steps: int) -> None:
    """Note that the run has ended, and that its results are in place."""
    if jax.process_index() == 0:
        write_text(folder / FINISHED, json.dumps({"steps": steps}) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file such that a kill leaves the old one or the new one."""
    if is_remote(file):  # objects on a bucket appear whole
        file.write_text(text)
        return
    new = file.with_name(f".{file.name}")
    with named_errors(file):
        new.write_text(text)
    new.replace(file)


def _clean(folder: Path) -> None:
    """Delete what a killed run has left half-written."""
    for path in folder.iterdir():
        if not path.name.startswith(LEFTOVERS):
            continue
        # Killed between the two renames that replace a folder (`new_folder`): the old one goes back
        # to its place, with the files that somebody may have put there.
        name = path.name.removeprefix(".").partition("-")[0]
        if name in FOLDERS and (path / "old").is_dir() and not (folder / name).exists():
            (path / "old").rename(folder / name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
        Config.from_json(_read_config(file))
    except (OSError, ValueError):
        return False
    return True


def _read_config(file: Path) -> str:
    """The text of a run's config.json, on a disk or a bucket."""
    if is_remote(file):
        return file.read_text(encoding="utf-8")
    return read_text(file)


def is_empty(folder: Path) -> bool:
    """Whether the folder does not exist, or holds nothing but what a killed run leaves."""
    if not folder.is_dir():
        return True
    return all(path.name.startswith((LOCK, *LEFTOVERS)) for path in folder.iterdir())


def _remove_run(folder: Path) -> None:
    """Delete the files of a run but its config.json, and no others."""
    if is_remote(folder):
        for name in RUN_FILES:
            delete(folder / name)
        return
    # Renaming is instant. A crash during the deletion then cannot leave half of the old run in
    # place, where it would be taken for a part of the new one.
    with tempfile.TemporaryDirectory(dir=folder, prefix=TRASH) as trash:
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
    # How the data is read, which does not change what is read.
    fixed["data"].remove("num_proc")
    fixed["data"].remove("cache")
    for section, fields in fixed.items():
        for field in fields:
            old = getattr(getattr(previous, section), field)
            new = getattr(getattr(config, section), field)
            if old != new:
                raise ValueError(
                    f"{section}.{field} is {new!r}, but the run to resume in "
                    f"{config.train.output} had {old!r}; use the same value, --train.overwrite to "
                    "begin anew, or another --train.output"
                )


def _field_names(section: object) -> list[str]:
    assert dataclasses.is_dataclass(section)
    return [field.name for field in dataclasses.fields(section)]
