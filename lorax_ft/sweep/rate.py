"""Runs whose learning rate is found first: by a short sweep of it, or by a rule."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.interop.bucket import output_path
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.locate import read_model_config
from lorax_ft.run.folder import check_folder, check_writable
from lorax_ft.run.loop import Result
from lorax_ft.run.loop import train as train_at_rate
from lorax_ft.run.report import make_console
from lorax_ft.sweep.agree import with_shared_base
from lorax_ft.sweep.axes import RATE, Axis, product, rounded
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.setup import Loaded, load, set_up

EXPONENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
"""The rates that are tried first: the default one times 10 to the power of these."""
START = 2e-4
"""The rate in the middle, where the config has none."""
MOST_EXTENSIONS = 3
"""How often two more rates are tried where the best one is the lowest or the highest."""
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


def train(config: Config, *, dry_run: bool = False, command: str | None = None) -> Result | None:
    """Run a fine-tuning, from the config to the saved adapter, the log and the plot.

    If `optim.learning_rate` is "find", short runs find it first, and a resumed run keeps its own.
    If it is "auto", it comes from the model's width (`rate_by_width`).

    Args:
      config: the run.
      dry_run: print what would train, the memory it takes and the first batch, and write nothing.
      command: the command line that started the run, for the model card.

    Returns:
      The result of the run; None for a dry run, and where the folder holds this run and it has
      ended.

    Raises:
      ValueError: bad input, or a loss that is not finite; files on disk are kept.
      KeyboardInterrupt: a signal ended the run, after a checkpoint if it has made a step.
      OSError: the disk is full, or the hub cannot be written.
    """
    if config.optim.learning_rate == "auto":
        config = with_rule(config)
    elif config.optim.learning_rate == "find" and dry_run:
        make_console().print(f"A dry run finds no learning rate; it shows {START:g}.")
        config = with_rate(config, START)
    elif config.optim.learning_rate == "find":
        config = with_found_rate(config)
    return train_at_rate(config, dry_run=dry_run, command=command)


def with_rule(config: Config) -> Config:
    """The config at the learning rate of `rate_by_width`; prints it with its source.

    Raises:
      ValueError: the rule does not hold for this adapter or optimizer, or there is no model.
    """
    adapter, optim = config.adapter, config.optim
    in_full = "all" in adapter.train_whole
    needs = {
        "adapter.method": (adapter.method, "lora"),
        "adapter.alpha": (f"{adapter.alpha:g}", "32"),
        "adapter.scaling": (adapter.scaling, "standard"),
    }
    if not adapter.targets and not in_full:
        raise ValueError(
            "optim.learning_rate auto is a rule for LoRA, and adapter.targets is empty; give find, "
            "or a number"
        )
    for option, (value, needed) in needs.items():
        if value != needed and not in_full:
            raise ValueError(
                f"optim.learning_rate auto is a rule for {option} {needed}, and it is {value}; "
                f"give --{option} {needed}, or a number"
            )
    if not optim.optimizer.startswith(("adam", "nadam")):
        raise ValueError(
            f"optim.learning_rate auto is a rule for Adam, and optim.optimizer is "
            f"{optim.optimizer}; give a number"
        )
    hf_config = read_model_config(config.model.path, revision=config.model.revision)
    width = decoder_config(hf_config, source=config.model.path).width
    family = str(hf_config.get("model_type", ""))
    rate = rate_by_width(width, family=family, in_full=in_full)
    make_console().print(
        f"optim.learning_rate auto: {rate:g} for a width of {width:,} "
        "(LoRA Without Regret, Schulman et al., 2025)"
    )
    return with_rate(config, rate)


def rate_by_width(width: int, *, family: str, in_full: bool = False) -> float:
    """The learning rate of LoRA with alpha 32, at any rank: ten times that of full fine-tuning.

        5e-5 · 10 · (2000 / width)^p,    p = 0.0775 for Qwen's families, 0.781 for others

    A fit over Llama's and Qwen's models: "LoRA Without Regret" (Schulman et al.,
    Thinking Machines, 2025), with the constants that its authors published as tinker-cookbook's
    `hyperparam_utils`.

    Args:
      width: the hidden size.
      family: the `model_type` of the config.json.
      in_full: the rate of full fine-tuning.

    >>> f"{rate_by_width(4096, family='llama'):.2e}"
    '2.86e-04'
    """
    exponent = 0.0775 if family.startswith("qwen") else 0.781
    full = 5e-5 * (2000 / width) ** exponent
    return rounded(full if in_full else 10 * full)


def with_found_rate(config: Config) -> Config:
    """The config with the learning rate that `find_rate` finds, or that the run to resume has."""
    # A folder that cannot be used is an error before the search, not after it.
    check_writable(output_path(config.train.output))
    previous = check_folder(config).previous
    if previous is not None:
        return with_rate(config, previous.optim.peak)
    console = make_console()
    console.print("Finding the learning rate: short runs at several rates, all in one program")
    rate, cost = find_rate(config, console=console)
    console.print(f"optim.learning_rate {rate:g} has the lowest loss of {cost.describe()}\n")
    return with_rate(config, rate)


def with_rate(config: Config, rate: float) -> Config:
    """The config at a learning rate."""
    optim = dataclasses.replace(config.optim, learning_rate=rate)
    return dataclasses.replace(config, optim=optim)


def find_rate(config: Config, *, console: Console | None = None) -> tuple[float, RateCost]:
    """The learning rate with the lowest validation loss in short runs of this config.

    A trial has the schedule of a whole run, so that its last loss is that of a decayed rate. The
    best rate of a short run tends to be the higher one: where two are close, prefer the lower.

    Args:
      config: the run; its own rate, if it has one, is the middle of those that are tried first.
      console: where to print; None: where runs print.

    Raises:
      ValueError: as for a run; there are no validation rows, or all rates diverged.
    """
    start_time = time.perf_counter()
    if console is None:
        console = make_console()
    own = config.optim.learning_rate
    middle = START if isinstance(own, str) else own
    loaded = load(config)
    whole = loaded.steps(with_rate(config, middle))
    steps = min(max(round(SHARE * whole), FEWEST_STEPS), whole)
    config = _short(with_rate(config, middle), steps)
    losses = _losses(config, [middle * 10**exponent for exponent in EXPONENTS], loaded, console)
    for _ in range(MOST_EXTENSIONS):
        best = min(losses, key=lambda rate: losses[rate])
        lowest, highest = min(losses), max(losses)
        if best not in (lowest, highest):
            break
        factor = 10**0.5 if best == highest else 10**-0.5
        losses |= _losses(config, [best * factor, best * factor**2], loaded, console)
    best = min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        raise ValueError(
            f"the loss is not finite at any of the {len(losses)} learning rates from "
            f"{min(losses):g} to {max(losses):g}; give optim.learning_rate a number"
        )
    seconds = time.perf_counter() - start_time
    return best, RateCost(steps=steps, seconds=seconds, losses=losses)


def _short(config: Config, steps: int) -> Config:
    """The config of a trial."""
    options: dict[str, Any] = {"resume": "auto", "load_best": False, "patience": 0}
    options |= {"max_minutes": None, "profile": 0}
    train = dataclasses.replace(config.train, steps=steps, eval_every=0, **options)
    return dataclasses.replace(config, train=train)


def _losses(
    config: Config,
    rates: Sequence[float],
    loaded: Loaded,
    console: Console,
) -> dict[float, float]:
    """The validation loss of each rate, by the rate; infinite where it diverged."""
    axis = Axis(field=RATE, values=tuple(map(rounded, rates)))
    points = with_shared_base(product(config, [axis]))
    job = set_up(points, loaded)
    results = run_points(job, console, folder=None, parallel=PARALLEL).results
    return {rate: results.score(k, job.steps) for k, rate in enumerate(axis.values)}
