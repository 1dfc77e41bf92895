"""Checkpoints of a run by orbax: the trained leaves, the optimizer state, the step, the standing.

The step is also the position in the data, because each batch is a function of its step. The base is
not saved. The frozen leaves of the adapters (scales, starts) are. Each checkpoint has checksums of
its files; one whose files do not have them is passed over, with a warning, for the one before.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lorax_ft.interop.bucket import is_remote
from lorax_ft.run.checksums import find_damage, write_checksums
from lorax_ft.run.fingerprint import check_same_inputs
from lorax_ft.run.standing import Standing
from lorax_ft.run.write_errors import write_errors
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree

FOLDER = "checkpoints"
"""The folder of the checkpoints in a run's output folder."""
STANDING = "standing"
"""The item of a checkpoint that holds the run's `Standing`."""
INPUTS = "inputs"
"""The item that holds the fingerprint of what the run trains on."""


class Found(NamedTuple):
    """What a folder of checkpoints holds."""

    step: int | None
    """The newest intact checkpoint; None if there is none."""
    damaged: dict[int, str]
    """The newer ones that cannot be used, with what is wrong, the newest first."""


def find_checkpoint(folder: Path, *, step: int | None = None) -> Found:
    """The newest intact checkpoint in a folder, and the damaged ones that are newer.

    Of several processes, the first one reads the files, and tells the others.

    Args:
      folder: the folder of the checkpoints.
      step: the only checkpoint to look at; None: all of them.
    """
    if jax.process_count() == 1:
        return _find_checkpoint(folder, step)
    found = Found(None, {})
    if jax.process_index() == 0:
        found = _find_checkpoint(folder, step)
    told = multihost_utils.broadcast_one_to_all(-1 if found.step is None else found.step)
    newest = None if int(told) < 0 else int(told)
    return Found(newest, found.damaged)


def _find_checkpoint(folder: Path, step: int | None) -> Found:
    damaged: dict[int, str] = {}
    for saved in reversed(saved_steps(folder)):
        if step not in (None, saved):
            continue
        damage = find_damage(_orbax_path(folder) / str(saved))
        if not damage:
            return Found(saved, damaged)
        damaged[saved] = damage
    return Found(None, damaged)


def warn_of_damage(folder: Path, found: Found) -> None:
    """Warn of each checkpoint that is passed over."""
    for step, damage in found.damaged.items():
        instead = "the beginning" if found.step is None else f"step {found.step}"
        warnings.warn(
            f"the checkpoint of step {step} in {folder} is damaged ({damage}); "
            f"it is passed over for {instead}",
            stacklevel=2,
        )


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, intact or not, in order."""
    # orbax writes a checkpoint under another name, and renames it once it is complete.
    return sorted(ocp.utils.checkpoint_steps(_orbax_path(folder)))


def resolve_checkpoint(run: Path, which: str | int) -> int:
    """The step of a checkpoint of a run.

    Args:
      run: the output folder of the run, which may have been interrupted.
      which: "latest" (the latest intact one), "best" (the lowest validation loss so far, kept by
        train.load_best), or a step.

    Raises:
      ValueError: the run has no checkpoint, or not this one, or it is damaged.
    """
    folder = run / FOLDER
    steps = saved_steps(folder)
    if not steps:
        raise ValueError(
            f"{run} has no checkpoint: the run has not saved one yet (train.save_every)"
        )
    if which in ("latest", "best"):
        found = find_checkpoint(folder)
        if found.step is None:
            raise ValueError(f"{run} has no intact checkpoint: {_first_damage(found)}")
        warn_of_damage(folder, found)
        if which == "latest":
            return found.step
        return _intact(run, _best(folder, steps, newest=found.step))
    listed = ", ".join(map(str, steps))
    if not str(which).isdecimal():
        near = difflib.get_close_matches(str(which), ("latest", "best"), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"checkpoint {which!r} is neither latest, best nor a step; {run} has {listed}{hint}"
        )
    if int(which) not in steps:
        raise ValueError(f"{run} has no checkpoint of step {which}; it has {listed}")
    return _intact(run, int(which))


def _intact(run: Path, step: int) -> int:
    """The step, whose checkpoint must be intact."""
    found = find_checkpoint(run / FOLDER, step=step)
    if found.step is None:
        raise ValueError(f"{run}: {_first_damage(found)}; use another checkpoint")
    return step


def _first_damage(found: Found) -> str:
    step, damage = next(iter(found.damaged.items()))
    return f"that of step {step} is damaged ({damage})"


def _best(folder: Path, steps: Sequence[int], *, newest: int) -> int:
    """The best step, as the newest checkpoint knows it."""
    best = _read_standing(folder, newest).best_step
    if best is None:
        raise ValueError(
            f"{folder.parent} was not evaluated while it trained, so no checkpoint is the best; "
            f"use latest, or one of {', '.join(map(str, steps))}"
        )
    if best not in steps:
        raise ValueError(
            f"the best step of {folder.parent} was {best}, whose checkpoint was not kept "
            f"(train.load_best keeps it); use latest, or one of {', '.join(map(str, steps))}"
        )
    return best


def _read_standing(folder: Path, step: int) -> Standing:
    """The standing that a checkpoint holds."""
    return Standing(**_read_json(folder, step, STANDING))


def _read_json(folder: Path, step: int, item: str) -> dict[str, Any]:
    path = _orbax_path(folder) / str(step) / item
    values: dict[str, Any] = ocp.JsonCheckpointHandler().restore(epath.Path(path))
    return values


def _orbax_path(folder: Path) -> Path:
    """orbax refuses relative paths."""
    return folder if is_remote(folder) else folder.absolute()


class _Kept:
    """Which checkpoints orbax keeps: the latest ones, and the best one."""

    def __init__(self, latest: int) -> None:
        self.latest = latest
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each checkpoint, oldest first, whether it stays. orbax calls this after a save."""
        first_latest = len(checkpoints) - self.latest
        return [
            i >= first_latest or checkpoint.step == self.best_step
            for i, checkpoint in enumerate(checkpoints)
        ]


class Checkpoints:
    """The checkpoints in a folder. Nothing is written before the first `save`.

    Args:
      folder: where they lie.
      keep: how many of the latest to keep.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = _orbax_path(folder)
        self._kept = _Kept(keep)
        self._manager: ocp.CheckpointManager | None = None
        self._saving = 0
        """The step of the last checkpoint that was begun."""

    def check_room(self, state: TrainState, owned: Tree) -> None:
        """Raise if a checkpoint does not fit on the disk; a bucket always has room.

        Raises:
          OSError: ENOSPC, with the folder and the sizes.
        """
        if is_remote(self.folder):
            return
        # The folder may not exist yet; its nearest parent is on the same disk.
        folder = self.folder
        while not folder.is_dir():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state, owned)))
        if needed > free:
            reason = (
                f"{os.strerror(errno.ENOSPC)}: a checkpoint takes {needed / 1e6:,.1f} MB, "
                f"and {free / 1e6:,.1f} MB are free"
            )
            raise OSError(errno.ENOSPC, reason, str(self.folder))

    def find(self) -> Found:
        """As `find_checkpoint`."""
        return find_checkpoint(self.folder)

    def is_intact(self, step: int) -> bool:
        """Whether there is a checkpoint of this step that is not damaged."""
        self._wait()
        return find_checkpoint(self.folder, step=step).step is not None

    def standing(self, step: int, *, keeps_best: bool) -> Standing:
        """The standing that a checkpoint holds.

        Args:
          step: of the checkpoint.
          keeps_best: whether the best checkpoint will be loaded. If it was not kept, or is damaged,
            the best step is chosen anew.
        """
        standing = _read_standing(self.folder, step)
        best = standing.best_step
        if not keeps_best or best is None or self.is_intact(best):
            return standing
        if best in saved_steps(self.folder):
            warnings.warn(
                f"the checkpoint of the best step {best} in {self.folder} is damaged; "
                f"the best step is chosen anew from step {step} on",
                stacklevel=2,
            )
        return dataclasses.replace(standing, best_step=None, best_loss=None)

    def check_inputs(self, step: int, inputs: Mapping[str, str]) -> None:
        """Raise if a checkpoint was trained on other data or another base (`fingerprint`).

        Raises:
          ValueError: it was; the error names the first that differs.
        """
        check_same_inputs(_read_json(self.folder, step, INPUTS), inputs)

    def keep_best(self, step: int | None) -> None:
        """Keep the checkpoint of this step, besides the latest ones, from the next save on."""
        self._kept.best_step = step

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, which a run that goes on saves again.

        orbax would not save a step that it holds already, be it damaged or not.
        """
        if jax.process_index() == 0:
            for later in saved_steps(self.folder):
                if later > step:
                    epath.Path(self.folder / str(later)).rmtree()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("later checkpoints")

    def save(
        self,
        step: int,
        state: TrainState,
        owned: Tree,
        standing: Standing,
        *,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Save the state and the frozen leaves of the adapters, in the background.

        Args:
          step: the number of the checkpoint.
          state: the state.
          owned: the frozen leaves of the adapters.
          standing: how the run stands.
          inputs: the data and the base that it trains on (`fingerprint`).

        Raises:
          OSError: as `check_room`; or this checkpoint, or the one before, cannot be written.
        """
        # Checked here too: the disk may have filled up since the setup.
        self.check_room(state, owned)
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state._asdict()),
            STANDING: ocp.args.JsonSave(dataclasses.asdict(standing)),
            INPUTS: ocp.args.JsonSave(dict(inputs)),
        }
        # orbax refuses an empty tree. Full fine-tuning has no such leaves.
        if owned:
            items["owned"] = ocp.args.StandardSave(owned)
        # orbax waits for the last checkpoint; its checksums need its step until then.
        self._wait()
        with write_errors(self.folder, step):
            manager = self._open()
            self._saving = step
            manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, state: TrainState, owned: Tree, *, step: int) -> tuple[TrainState, Tree]:
        """A checkpoint.

        Args:
          state: shapes and shardings of the state.
          owned: shapes and shardings of the frozen leaves of the adapters.
          step: the step of the checkpoint.

        Raises:
          ValueError: it was saved with other adapters.
        """
        # A checkpoint of this run may still be on its way to the disk.
        self._wait()
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state._asdict(), owned))
        folder = self.folder / str(step)
        try:
            restored = _restore(folder / "state", targets[0])
            # Full fine-tuning has no such leaves.
            restored_owned = _restore(folder / "owned", targets[1]) if owned else {}
        except (ValueError, KeyError) as error:
            # orbax prints both trees; the first line says what differs.
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {step} does not fit this run's adapters or optimizer: {reason}"
            ) from error
        return TrainState(**restored), restored_owned

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
          OSError: the last checkpoint cannot be written.
        """
        if self._manager is not None:
            self._wait()
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        # Not in __init__: orbax makes the folder, and a run that fails in its setup writes nothing.
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                create=True,
                enable_async_checkpointing=True,
                # What a killed run left of the checkpoint that it was writing.
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _wait(self) -> None:
        if self._manager is not None:
            with write_errors(self.folder, self._saving):
                self._manager.wait_until_finished()

    def _write_checksums(self) -> None:
        """Write the checksums of the checkpoint that is complete.

        orbax calls this before it renames the folder, so no checkpoint is without its checksums.
        """
        if jax.process_index() != 0:
            return
        for folder in self.folder.iterdir():
            # "100" or "100.orbax-checkpoint-tmp"
            if folder.name.partition(".")[0] == str(self._saving):
                write_checksums(folder)


def _restore(folder: Path, target: Tree) -> Any:
    """Read an item of a checkpoint into shapes and shardings."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(epath.Path(folder), args=ocp.args.StandardRestore(target))
