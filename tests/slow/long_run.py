"""Trains for thousands of steps as a user does, and draws what grows: memory, step time, the log.

    nice -n 10 python tests/slow/long_run.py --steps 5000 --plot docs/long_run.png

A run of the embedded model with a log, evaluations and checkpoints. A thread looks at the process
every second. The last line compares the second tenth of the run with the last one; the first tenth
has the compiling. The exit status is 1 if something grew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

import lorax_ft as lft
from lorax_ft.config import load_config
from lorax_ft.run.log import LOG

MOST_GROWTH = {"resident MB": 0.05, "live arrays MB": 0.001, "ms per step": 0.5}
"""How much more the last tenth may have than the second; times vary on a machine that is shared."""
MOST_LOG = 400
"""Bytes of the log for each step."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a look at the process found."""

    step: int
    seconds: float
    resident: float
    """Bytes of memory."""
    arrays: float
    """Bytes of the arrays of JAX that are alive."""
    log: float
    """Bytes."""


class Observer(threading.Thread):
    """Looks at this process every second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._log = folder / LOG
        self._ended = threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        """Look until the end."""
        while not self._ended.wait(1):
            text = self._log.read_text() if self._log.exists() else ""
            lines = text.splitlines()
            if not text.endswith("\n") or not json.loads(lines[-1])["step"]:
                continue
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sample = Sample(
                step=json.loads(lines[-1])["step"],
                seconds=time.monotonic(),
                resident=pages * resource.getpagesize(),
                arrays=sum(array.nbytes for array in jax.live_arrays()),
                log=len(text),
            )
            self.samples.append(sample)

    def end(self) -> list[Sample]:
        """Stop looking."""
        self._ended.set()
        self.join()
        return self.samples


def curves(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Steps and values `[samples, 2]` of each thing, by name."""
    times = []
    for before, after in itertools.pairwise(samples):
        if after.step > before.step:
            seconds = (after.seconds - before.seconds) / (after.step - before.step)
            times.append((after.step, 1000 * seconds))
    found = {
        "resident MB": [(sample.step, sample.resident / 1e6) for sample in samples],
        "live arrays MB": [(sample.step, sample.arrays / 1e6) for sample in samples],
        "ms per step": times,
        "log KB": [(sample.step, sample.log / 1e3) for sample in samples],
    }
    return {name: np.array(points) for name, points in found.items()}


def growth(curve: np.ndarray, steps: int) -> tuple[float, float]:
    """The medians of the second tenth of the steps, and of the last."""
    at, values = curve.T
    second = values[(at > 0.1 * steps) & (at <= 0.2 * steps)]
    return float(np.median(second)), float(np.median(values[at > 0.9 * steps]))


def draw(found: dict[str, np.ndarray], file: str) -> None:
    """A panel for each curve."""
    figure = Figure(figsize=(8, 8), dpi=110, layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(4, 1, sharex=True), found.items(), strict=True):
        axes.plot(*curve.T, color="#08519c", linewidth=1)
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.3 * np.percentile(curve[:, 1], 99))
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(file)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--plot")
    args = parser.parse_args()
    config = load_config("lora")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "run")
        every = max(args.steps // 50, 1)
        train = dataclasses.replace(
            config.train,
            output=str(out),
            steps=args.steps,
            batch_size=4,
            eval_every=every,
            save_every=every,
            load_best=True,
        )
        evaluation = dataclasses.replace(config.eval, rows=16, samples=0, exact_match_rows=0)
        observer = Observer(out)
        observer.start()
        lft.train(dataclasses.replace(config, train=train, eval=evaluation))
        samples = observer.end()
    found = curves(samples)
    if args.plot:
        draw(found, args.plot)
    grew = samples[-1].log > MOST_LOG * args.steps
    medians = {name: growth(curve, args.steps) for name, curve in found.items()}
    for name, most in MOST_GROWTH.items():
        second, last = medians[name]
        grew |= last > (1 + most) * second
    print(json.dumps({"samples": len(samples), "bytes of log": samples[-1].log} | medians))
    sys.exit(grew)


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    main()
