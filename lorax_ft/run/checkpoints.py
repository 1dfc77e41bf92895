"""Checkpoints of a run by orbax: the trained leaves, the optimizer state and the step.

The step is also the position in the data, because each batch is a function of its step. The base is
not saved. The frozen leaves of the adapters (scales, starts) are.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lorax_ft.interop.bucket import is_remote
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        # orbax refuses relative paths.
        self._folder = folder if is_remote(folder) else folder.absolute()
        self._keep = keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Not in __init__: orbax makes the folder, and a run that fails in its setup writes nothing.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, enable_async_checkpointing=True
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

    def save(self, step: int, state: TrainState, owned: Tree) -> None:
        """Save the state and the frozen leaves of the adapters, in the background.

        Raises:
          OSError: as `check_room`.
        """
        # Checked here too: the disk may have filled up since the setup.
        self.check_room(state, owned)
        items = {"state": ocp.args.StandardSave(state._asdict())}
        # orbax refuses an empty tree. Full fine-tuning has no such leaves.
        if owned:
            items["owned"] = ocp.args.StandardSave(owned)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, state: TrainState, owned: Tree) -> tuple[TrainState, Tree]:
        """The newest checkpoint.

        Args:
          state: shapes and shardings of the state.
          owned: shapes and shardings of the frozen leaves of the adapters.

        Raises:
          ValueError: there is no checkpoint, or it was saved with other adapters.
        """
        step = self.latest()
        if step is None:
            raise ValueError(
                "there is no checkpoint to resume from; start again with --train.overwrite "
                "instead of --train.resume"
            )
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
