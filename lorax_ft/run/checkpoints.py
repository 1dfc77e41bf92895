"""Checkpoints of a run by orbax: the trained leaves, the optimizer state, the step, the standing.

The step is also the position in the data, because each batch is a function of its step. The base is
not saved. The frozen leaves of the adapters (scales, starts) are.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lorax_ft.interop.bucket import is_remote
from lorax_ft.run.standing import Standing
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree

FOLDER = "checkpoints"
"""The folder of the checkpoints in a run's output folder."""
STANDING = "standing"
"""The item of a checkpoint that holds the run's `Standing`."""


def resolve_checkpoint(run: Path, which: str | int) -> int:
    """The step of a checkpoint of a run.

    Args:
      run: the output folder of the run, which may have been interrupted.
      which: "latest", "best" (the lowest validation loss so far, kept by train.load_best), or a
        step.

    Raises:
      ValueError: the run has no checkpoint, or not this one.
    """
    folder = run / FOLDER
    # orbax writes a checkpoint under another name, and renames it once it is complete.
    steps = sorted(ocp.utils.checkpoint_steps(_orbax_path(folder)))
    if not steps:
        raise ValueError(
            f"{run} has no checkpoint: the run has not saved one yet (train.save_every)"
        )
    if which == "latest":
        return steps[-1]
    if which == "best":
        return _best(folder, steps)
    listed = ", ".join(map(str, steps))
    if not str(which).isdecimal():
        near = difflib.get_close_matches(str(which), ("latest", "best"), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"checkpoint {which!r} is neither latest, best nor a step; {run} has {listed}{hint}"
        )
    if int(which) not in steps:
        raise ValueError(f"{run} has no checkpoint of step {which}; it has {listed}")
    return int(which)


def _best(folder: Path, steps: Sequence[int]) -> int:
    """The best step, as the newest checkpoint knows it."""
    best = _read_standing(folder, steps[-1]).best_step
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
    """The standing that a checkpoint holds; a new one if an older version saved it."""
    item = _orbax_path(folder) / str(step) / STANDING
    if not item.is_dir():
        return Standing()
    return Standing(**ocp.JsonCheckpointHandler().restore(epath.Path(item)))


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
    """The checkpoints in a folder.

    Args:
      folder: where they lie.
      keep: how many of the latest to keep.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = _orbax_path(folder)
        self._kept = _Kept(keep)

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Not in __init__: orbax makes the folder, and a run that fails in its setup writes nothing.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept, create=True, enable_async_checkpointing=True
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def check_room(self, state: TrainState, owned: Tree) -> None:
        """Raise if a checkpoint does not fit on the disk; a bucket always has room.

        Raises:
          OSError: ENOSPC, with the folder and the sizes.
        """
        if is_remote(self._folder):
            return
        # The folder may not exist yet; its nearest parent is on the same disk.
        folder = self._folder
        while not folder.is_dir():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state, owned)))
        if needed > free:
            reason = (
                f"{os.strerror(errno.ENOSPC)}: a checkpoint takes {needed / 1e6:,.1f} MB, "
                f"and {free / 1e6:,.1f} MB are free"
            )
            raise OSError(errno.ENOSPC, reason, str(self._folder))

    def standing(self, *, keeps_best: bool) -> Standing:
        """The standing that the newest checkpoint holds.

        Args:
          keeps_best: whether the best checkpoint will be loaded. If it was not kept, the best step
            is chosen anew.
        """
        step = self.latest()
        if step is None:
            return Standing()
        standing = _read_standing(self._folder, step)
        if keeps_best and standing.best_step not in self._manager.all_steps():
            return dataclasses.replace(standing, best_step=None, best_loss=None)
        return standing

    def keep_best(self, step: int | None) -> None:
        """Keep the checkpoint of this step, besides the latest ones, from the next save on."""
        self._kept.best_step = step

    def save(self, step: int, state: TrainState, owned: Tree, standing: Standing) -> None:
        """Save the state and the frozen leaves of the adapters, in the background.

        Raises:
          OSError: as `check_room`.
        """
        # Checked here too: the disk may have filled up since the setup.
        self.check_room(state, owned)
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state._asdict()),
            STANDING: ocp.args.JsonSave(dataclasses.asdict(standing)),
        }
        # orbax refuses an empty tree. Full fine-tuning has no such leaves.
        if owned:
            items["owned"] = ocp.args.StandardSave(owned)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self,
        state: TrainState,
        owned: Tree,
        *,
        step: int | None = None,
    ) -> tuple[TrainState, Tree]:
        """A checkpoint.

        Args:
          state: shapes and shardings of the state.
          owned: shapes and shardings of the frozen leaves of the adapters.
          step: the step of the checkpoint; None: the newest.

        Raises:
          ValueError: there is no checkpoint, or it was saved with other adapters.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise ValueError(
                "there is no checkpoint to resume from; start again with --train.overwrite "
                "instead of --train.resume"
            )
        # A checkpoint of this run may still be on its way to the disk.
        self._manager.wait_until_finished()
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state._asdict(), owned))
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(targets[0])}
        if owned:
            items["owned"] = ocp.args.StandardRestore(targets[1])
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            # orbax prints both trees; the first line says what differs.
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {step} does not fit this run's adapters or optimizer: {reason}"
            ) from error
        if owned:
            return TrainState(**restored["state"]), restored["owned"]
        return TrainState(**restored["state"]), {}

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
