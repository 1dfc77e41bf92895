"""Compare methods fairly: same data, order and steps, at one common rate and each at its best."""

from __future__ import annotations

import dataclasses

from lorax_ft import cli
from lorax_ft.comparison.methods import DEFAULT
from lorax_ft.config import Config
from lorax_ft.config.foreign.source import named_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Config):
    """Compare methods: the report goes to train.output with -comparison behind it."""

    config: str | None = None
    """Config: a Python file with get_config(), a name such as pissa, a .yaml or .json file with
    our sections or of LLaMA-Factory, or PEFT's adapter_config.json. The defaults below are its
    values."""
    methods: tuple[str, ...] = DEFAULT
    """Methods to compare, or all. "r64=lora adapter.rank=64 adapter.alpha=128" is one with other
    settings, under the name r64. The reference is lora, or the first one without it."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates to try for each method, the smallest first. Where the best one is at the edge,
    up to three more are tried."""
    common_rate: float = 1e-3
    """One of the rates, at which all methods are compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the compared runs: initialization, order of the rows, noise."""
    search_seeds: int = 1
    """Seeds that are trained at every rate; the others only at the best and the common one."""
    benchmark: str | None = None
    """Folder of multiple-choice questions (MMLU, C-Eval or CMMLU). The runs train on dev and half
    of the questions, an eighth chooses the rates, and the rest gives the accuracy by category."""
    benchmark_limit: int | None = None
    """Questions of each subject to use, from the first."""
    parallel: int = 16
    """Runs that train together, at most."""


def main() -> None:
    """Reads the config file, then the options, then compares."""
    with cli.one_line_errors():
        args, config, source = cli.parse_run(Args)
        # JAX takes seconds to import: --help and errors in the options should not wait for it.
        from lorax_ft.comparison.design import Design
        from lorax_ft.comparison.run import compare
        from lorax_ft.run.translated import announced

        design = Design(
            rates=args.rates,
            common_rate=args.common_rate,
            seeds=args.seeds,
            search_seeds=args.search_seeds,
            benchmark=args.benchmark,
            benchmark_limit=args.benchmark_limit,
        )
        with named_keys(source):
            compare(
                announced(config, source),
                design,
                methods=args.methods,
                parallel=args.parallel,
                command=cli.command_line(),
            )
