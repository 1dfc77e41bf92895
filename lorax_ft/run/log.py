"""What a run writes while it trains: trainer_log.jsonl, the trackers and training_loss.png.

`pandas.read_json(file, lines=True)` reads the log: a column for each metric, and a row for each
step and for each evaluation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lorax_ft.files import named_errors, write_file
from lorax_ft.interop.bucket import is_remote, upload
from lorax_ft.run.plot import plot_lines

LOG = "trainer_log.jsonl"
PLOT = "training_loss.png"


class Log:
    """The log of a run: one JSON object per line, with the same metrics sent to the trackers.

    Objects on a bucket cannot be appended to. If the run's folder is on one, the files are written
    to a temporary folder, and `upload` copies them.

    Args:
      folder: the run's output folder.
      trackers: "tensorboard", "wandb".
      settings: the run's config, for the trackers.
      resumed: the step to resume from. Lines of later steps, from an interrupted run, are dropped.
      writes: whether this process writes. Only one of several does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        resumed: int = 0,
        writes: bool = True,
    ) -> None:
        self._folder = folder
        self._writes = writes
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not writes:
            return
        self._local = folder
        if is_remote(folder):
            self._scratch = tempfile.TemporaryDirectory()
            self._local = Path(self._scratch.name) / folder.name  # the plot's title is the name
            self._local.mkdir()
        self._kept = {_kind(line) for line in _drop_lines(folder, self._local, after=resumed)}
        self._file = (self._local / LOG).open("a")
        # Imported here: both are slow to import, and wandb is optional.
        if "tensorboard" in trackers:
            from tensorboardX import SummaryWriter

            # TensorBoard hides what a killed run has logged of later steps.
            self._tensorboard = SummaryWriter(
                str(self._local / "tensorboard"), purge_step=resumed + 1 if resumed else None
            )
        if "wandb" in trackers:
            import wandb

            options = {"dir": str(self._local), "config": dict(settings)}
            self._wandb = wandb.init(project="lorax_ft", **options)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line for `step`."""
        if not self._writes:
            return
        line: dict[str, float | None] = {"step": step}
        for name, value in metrics.items():
            # JSON has neither NaN nor infinity, and some readers refuse them.
            line[name] = value if math.isfinite(value) else None
        # A run that was killed after this line, and before what came next, writes it once more.
        if _kind(line) not in self._kept:
            with named_errors(self._local / LOG):
                self._file.write(json.dumps(line) + "\n")
                # A run that is killed keeps every line.
                self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if math.isfinite(value):  # tensorboardX warns of others, once for each
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    @property
    def local(self) -> Path | None:
        """The local folder of the files; None if this process does not write."""
        return self._local if self._writes else None

    def upload(self) -> None:
        """Copy the files to the run's folder if it is on a bucket.

        Raises:
          OSError: the bucket cannot be written.
        """
        if self._writes and is_remote(self._folder):
            upload(self._local, self._folder)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            # If training failed as well, its error is the cause, and this one only a symptom.
            if error is None:
                raise

    def close(self) -> None:
        """Close the file and the trackers, and draw the plot."""
        if not self._writes:
            return
        with named_errors(self._local / LOG):
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        plot_losses(self._local)
        if is_remote(self._folder):
            with self._scratch:
                self.upload()


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise if a tracker is not installed.

    Raises:
      ValueError: wandb is given and not installed.
    """
    if "wandb" in trackers and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.report_to contains wandb, which is not installed; "
            'run pip install "lorax_ft[wandb]"'
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; empty if there is no log."""
    file = folder / LOG
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text().splitlines():
        # A run that was killed may leave half a line at the end.
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def plot_losses(folder: Path) -> Path | None:
    """Draw a run's training_loss.png from its log (`plot_lines`).

    Returns:
      The file, or None if the log has no training loss.
    """
    figure = plot_lines(read_log(folder), title=folder.name)
    if figure is None:
        return None
    with named_errors(folder / PLOT):
        figure.savefig(folder / PLOT)
    return folder / PLOT


def _drop_lines(folder: Path, local: Path, *, after: int) -> list[dict[str, Any]]:
    """Write the log anew to `local` with its lines up to the step `after`; none for a new run.

    Returns:
      These lines.
    """
    kept = []
    if after:
        kept = [line for line in read_log(folder) if line["step"] <= after]
    # Written to another file first, so that a crash or a full disk leaves the old log intact.
    file = local / f".{LOG}"
    write_file(file, "".join(json.dumps(line) + "\n" for line in kept))
    file.replace(local / LOG)
    return kept


def _kind(line: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """What no other line of a log shares: the step, and which metrics the line has."""
    return line["step"], frozenset(line)
