"""A learning rate found by a short sweep of `optim.learning_rate`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.run.report import make_console
from lorax_ft.sweep.agree import with_shared_base
from lorax_ft.sweep.axes import Axis, product, rounded
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.setup import load, set_up

RATE = "optim.learning_rate"
EXPONENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
"""The rates that are tried: the config's own times 10 to the power of these."""
SHARE = 0.05
"""The steps of a trial, as a share of the run's."""
FEWEST_STEPS = 20
PARALLEL = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateCost:
    """What finding a rate took, and what it showed."""

    steps: int
    """The steps of each trial."""
    seconds: float
    """With compilation; the model was loaded for it too."""
    losses: Mapping[float, float]
    """The validation loss of each rate at the end of its trial; infinite where it diverged."""

    def describe(self) -> str:
        """The cost in words.

        >>> RateCost(steps=20, seconds=12.3, losses={1e-4: 2.0, 1e-3: 1.0}).describe()
        '2 rates, 20 steps each, 12 s'
        """
        return f"{len(self.losses)} rates, {self.steps} steps each, {self.seconds:.0f} s"


def find_rate(config: Config, *, console: Console | None = None) -> tuple[float, RateCost]:
    """The learning rate with the lowest validation loss in short runs of this config.

    A trial has the schedule of a whole run, so that its last loss is that of a decayed rate. The
    best rate of a short run tends to be the higher one: where two are close, prefer the lower.

    Args:
      config: the run; its own rate is the middle of those that are tried.
      console: where to print; None: where runs print.

    Raises:
      ValueError: as for a run; there are no validation rows, or all rates diverged.
    """
    start_time = time.perf_counter()
    if console is None:
        console = make_console()
    loaded = load(config)
    steps = max(round(SHARE * loaded.steps(config)), FEWEST_STEPS)
    steps = min(steps, loaded.steps(config))
    train = dataclasses.replace(
        config.train,
        steps=steps,
        eval_every=0,
        resume=False,
        load_best=False,
        patience=0,
    )
    own = config.optim.learning_rate
    rates = tuple(rounded(own * 10**exponent) for exponent in EXPONENTS)
    axis = Axis(field=RATE, values=rates)
    points = with_shared_base(product(dataclasses.replace(config, train=train), [axis]))
    job = set_up(points, loaded)
    results = run_points(job, console, folder=None, parallel=PARALLEL).results
    losses = {rate: results.score(k, steps) for k, rate in enumerate(rates)}
    best = min(losses, key=lambda rate: losses[rate])
    seconds = time.perf_counter() - start_time
    return best, RateCost(steps=steps, seconds=seconds, losses=losses)
