"""Train many adapters over one base in one program, and find the best settings."""

from __future__ import annotations

import dataclasses
import sys

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.config.foreign.source import named_keys
from lorax_ft.sweep.halving import Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Config):
    """Sweep a config: the results go to train.output with -sweep behind it."""

    config: str | None = None
    """Config: a Python file with get_config(), a name such as pissa, a .yaml or .json file with
    our sections or of LLaMA-Factory, or PEFT's adapter_config.json. The defaults below are its
    values."""
    sweep: tuple[str, ...] = ()
    """What varies, each as "section.field=values"; all combinations are trained.
    optim.learning_rate=1e-4,1e-3: these values; optim.learning_rate=1e-5..1e-2:9: nine values,
    evenly spaced by their logarithm; optim.learning_rate=1e-5..1e-2: a range for trials."""
    parallel: int = 16
    """Adapters that train together, at most; more of them train in groups, one after the other."""
    budget: Budget = "full"
    """Budget of a point.
    full: all steps; halve (successive halving): after equal shares of the steps the half of the
    settings with the higher validation loss is dropped."""
    trials: int = 0
    """Settings for optuna to draw from the ranges and lists, in generations of at most 8.
    0: all combinations. Needs pip install "lorax_ft[tune]"."""


def main() -> None:
    """Reads the config file, then the options, then sweeps."""
    with cli.one_line_errors():
        if "--multihost" in sys.argv:
            raise ValueError(
                "--multihost: a sweep runs in one process; start it on one host without it, or "
                "train its points as runs with train --multihost"
            )
        args, config, source = cli.parse_run(Args)
        # JAX takes seconds to import: --help and errors in the options should not wait for it.
        from lorax_ft.run.translated import announced
        from lorax_ft.sweep.run import sweep

        with named_keys(source):
            sweep(
                announced(config, source),
                args.sweep,
                parallel=args.parallel,
                budget=args.budget,
                trials=args.trials,
                command=cli.command_line(),
            )
