"""What a run writes while it trains: trainer_log.jsonl, the trackers, and training_loss.png."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

LOG = "trainer_log.jsonl"
PLOT = "training_loss.png"


class Log:
    """The log of a run: one JSON object a line, and the same numbers to the trackers.

    Args:
      folder: the run's.
      trackers: "tensorboard", "wandb".
      settings: the run's config, for the trackers.
      resumed: the step to go on from; later lines, of an interrupted attempt, are dropped.
      writes: False in all but one of several processes: they would write over each other's lines.
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
        self._folder, self._writes = folder, writes
        self._board: Any = None
        self._wandb: Any = None
        if not writes:
            return
        old = [line for line in read_log(folder) if line["step"] <= resumed] if resumed else []
        kept = folder / f".{LOG}"  # beside the log, which a crash or a full disk leaves as it was
        kept.write_text("".join(json.dumps(line) + "\n" for line in old))
        kept.replace(folder / LOG)
        self._file = (folder / LOG).open("a")
        if "tensorboard" in trackers:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if "wandb" in trackers:
            import wandb

            self._wandb = wandb.init(project="lorax_ft", dir=str(folder), config=dict(settings))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line for `step`."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step} | dict(values)) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # which says more than that no plot could be drawn
                raise

    def close(self) -> None:
        """Close the file and the trackers, and draw the plot."""
        if not self._writes:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        plot_losses(self._folder)


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker that cannot be had.

    Raises:
      ValueError: wandb is named and not installed.
    """
    if "wandb" in trackers and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            'train.report_to names wandb, which is not installed; pip install "lorax_ft[wandb]"'
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, or none where there is no log."""
    file = folder / LOG
    lines = []
    for text in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed
            lines.append(json.loads(text))
    return lines


def plot_losses(folder: Path) -> Path | None:
    """SamplingParams a run's training_loss.png from its log: raw and smoothed training loss, and validation points."""
    lines = read_log(folder)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    if not train:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = np.array(train).T
    values = np.array([value for _, value in (*train, *validation)])
    log = values.min() > 0 and values.max() > 20 * values.min()
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training loss")
    if len(losses) >= 40:
        smoothed = np.exp(smooth(np.log(losses))) if log else smooth(losses)
        axes.plot(steps, smoothed, color="#08519c", linewidth=2, label="training loss, smoothed")
    if validation:
        axes.plot(
            *np.array(validation).T,
            "o-",
            color="#d94801",
            markersize=5,
            linewidth=1,
            label="validation loss",
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = folder / PLOT
    figure.savefig(path)
    return path


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, over a twentieth of all and at most 21; fewer at the ends."""
    ones = np.ones(2 * min(len(values) // 40, 10) + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
