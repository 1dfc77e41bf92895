"""Checkpoints of a run: trained leaves, the optimizer's state and the step, by orbax.

The step is the data's position too, since batches are a function of it. The base is not saved; the
frozen leaves of the adapters (scales, starts) are, once.
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

from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree


class Checkpoints:
    """The checkpoints in a folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder.absolute(), keep

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:  # makes the folder, so not before it is needed
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, enable_async_checkpointing=True
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def check_room(self, state: TrainState, owned: Tree) -> None:
        """Raise where a checkpoint does not fit on the disk.

        Raises:
          OSError: ENOSPC, with the folder and the bytes.
        """
        existing = next(place for place in (self._folder, *self._folder.parents) if place.is_dir())
        need, free = (
            sum(leaf.nbytes for leaf in jax.tree.leaves((state, owned))),
            shutil.disk_usage(existing).free,
        )
        if need > free:
            reason = f"{os.strerror(errno.ENOSPC)}: a checkpoint takes {need / 1e6:,.1f} MB, {free / 1e6:,.1f} are left"
            raise OSError(errno.ENOSPC, reason, str(self._folder))

    def save(self, step: int, state: TrainState, owned: Tree) -> None:
        """Save the state and the adapters' frozen leaves, beside training.

        Raises:
          OSError: as `check_room`.
        """
        self.check_room(state, owned)
        items = {"state": ocp.args.StandardSave(state._asdict())} | (
            {"owned": ocp.args.StandardSave(owned)} if owned else {}
        )
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, state: TrainState, owned: Tree) -> tuple[TrainState, Tree]:
        """The newest checkpoint, placed as `state` and `owned` are.

        Raises:
          ValueError: there is none, or it was made with other adapters.
        """
        step = self.latest()
        if step is None:
            raise ValueError(
                "there is no checkpoint to resume from; start anew with --train.overwrite in place of --train.resume"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state._asdict(), owned))
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(abstract[0])}
        if owned:
            items["owned"] = ocp.args.StandardRestore(abstract[1])
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {step} does not fit this run's adapters or optimizer: {reason}"
            ) from error
        return TrainState(**restored["state"]), restored["owned"] if owned else {}

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
