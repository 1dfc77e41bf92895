"""Plan a run before a chip is rented: whether it fits, and how fast it could be."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.config.foreign.source import named_keys
from lorax_ft.plan.chips import parse_topology

PLOTS = (".png", ".svg", ".pdf")
"""Kinds of files that a plot can be written to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Config):
    """Plan a run: the step is compiled for the chips, of which none is needed here. Of the model
    only config.json is read. TPUs need pip install "lorax_ft[tpu-compile]"."""

    config: str | None = None
    """Config: a Python file with get_config(), a name such as pissa, a .yaml or .json file with
    our sections or of LLaMA-Factory, or PEFT's adapter_config.json. The defaults below are its
    values."""
    topology: tuple[str, ...] = ("v5e:4x4",)
    """TPU topology (v5e, v6e: v5e:4x4; v5p: v5p:4x4x4) or GPUs of one machine (a100, h100, h200:
    h100:8). With several, the batch grows with the number of chips."""
    slices: int = 1
    """Slices of this topology, connected by the data center's network; mesh.data goes across."""
    search: bool = False
    """Look for a faster config even if this one fits. One that does not fit is always replaced."""
    tries: int = 6
    """Configs to compile in the search, at most."""
    tokens: float | None = None
    """Tokens of the whole training, for its time."""
    price: float | None = None
    """US dollars an hour and chip, for the cost of these tokens."""
    json: str | None = None
    """File for all figures."""
    plot: str | None = None
    """File for a plot of several topologies (.png)."""


def main() -> None:
    """Reads the config file, then the options, then plans."""
    with cli.one_line_errors():
        args, config, source = cli.parse_run(Args)
        if not args.topology:
            raise ValueError("--topology lacks its value; give one, such as v5e:4x4 or h100:8")
        _check(args)
        topologies = [parse_topology(name, slices=args.slices) for name in args.topology]
        _prepare(max(topology.devices for topology in topologies))
        # Imports JAX, which reads the environment once.
        from lorax_ft.plan.run import plan
        from lorax_ft.run.translated import announced

        with named_keys(source):
            plan(
                announced(config, source, devices=topologies[0].devices),
                topologies,
                tries=args.tries,
                always_search=args.search,
                tokens=args.tokens,
                price=args.price,
                json_file=args.json,
                plot_file=args.plot,
            )


def _check(args: Args) -> None:
    """Raise for options that would be of no use after minutes of compiling."""
    for name in ("tokens", "price"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value:g}; it must be above 0 and finite")
    if args.price is not None and args.tokens is None:
        raise ValueError("--price is that of --tokens, which is not given")
    if args.tries < 0:
        raise ValueError(f"--tries is {args.tries}; it must be 0 or more")
    if args.plot is not None and len(args.topology) < 2:
        raise ValueError(
            "--plot shows how a plan grows with the chips; give several topologies, such as "
            "--topology v5e:2x2 v5e:4x4"
        )
    if args.plot is not None and Path(args.plot).suffix not in PLOTS:
        raise ValueError(f"--plot {args.plot}: give a file that ends in {' or '.join(PLOTS)}")
    for name in ("json", "plot"):
        file = getattr(args, name)
        if file is not None and not Path(file).parent.is_dir():
            raise ValueError(f"--{name} {file}: the folder {Path(file).parent} does not exist")
        if file is not None and Path(file).is_dir():
            raise ValueError(f"--{name} {file} is a folder; give a file")


def _prepare(devices: int) -> None:
    """Set what JAX must know: to compile here, and to ask no machine of Google for its TPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # libtpu 0.0.52 complains where these are absent, and compiles the same program with any.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Else one process of a machine may load it at a time, and a second plan is an error.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # CPUs take the place of GPUs.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
