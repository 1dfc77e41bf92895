"""A plan in words and tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.plan.chips import GB, Topology
from lorax_ft.plan.estimate import Estimate
from lorax_ft.plan.program import Program
from lorax_ft.plan.search import Candidate
from lorax_ft.run.report import make_table


def print_plan(
    console: Console,
    candidate: Candidate,
    topology: Topology,
    *,
    tokens: float | None,
    price: float | None,
) -> None:
    """Print what a config takes, whether it fits, and how fast it could be.

    Args:
      console: where to print.
      candidate: the config.
      topology: the chips.
      tokens: of the whole training, for its time and cost.
      price: US dollars an hour and chip.
    """
    chip = topology.chip
    console.print(f"\n[bold]{describe(candidate.config, topology)}[/bold]")
    program, estimate = candidate.program, candidate.estimate
    if program is None or estimate is None:
        what = "The step needs" if candidate.tried else "Weights, adapters and optimizer alone take"
        console.print(
            f"{what} {candidate.needed / GB:.2f} GB a chip, more than the "
            f"{chip.memory / GB:.2f} GB of a {chip.label}: it does not fit.",
            style="yellow",
        )
        return
    table = make_table(f"Memory of a chip ({chip.label})")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, size in memory_parts(program).items():
        table.add_row(name, f"{size / GB:.3f}")
    console.print(table)
    left = chip.memory - program.total
    if left >= 0:
        console.print(f"It fits: {left / GB:.2f} of {chip.memory / GB:.2f} GB are left.")
    else:
        console.print(
            f"It does not fit: it needs {-left / GB:.2f} GB more than the "
            f"{chip.memory / GB:.2f} GB of a chip.",
            style="yellow",
        )
    _print_network(console, program)
    _print_speed(console, program, estimate, tokens=tokens, chips=topology.devices, price=price)
    if not chip.is_tpu:
        console.print(
            "Compiled for CPUs in the place of GPUs: temporaries and traffic are estimates."
        )


def _print_network(console: Console, program: Program) -> None:
    """Print what a chip receives from others in a step."""
    if not program.traffic.count:
        return
    table = make_table("Received by a chip in a step")
    for header in ("collective", "times", "GB"):
        table.add_column(header, justify="left" if header == "collective" else "right")
    for kind, times in program.traffic.count.items():
        table.add_row(kind, f"{times:,}", f"{program.traffic.received[kind] / GB:.3f}")
    console.print(table)


def _print_speed(
    console: Console,
    program: Program,
    estimate: Estimate,
    *,
    tokens: float | None,
    chips: int,
    price: float | None,
) -> None:
    """Print the roofline of a step."""
    console.print(
        f"A step of {estimate.tokens:,} tokens: {program.flops / 1e12:.1f} TFLOP a chip. At peak "
        f"speeds arithmetic takes {estimate.compute:.3f} s, memory {estimate.memory:.3f} s, "
        f"the network {estimate.network:.3f} s: {estimate.seconds:.3f} s if they overlap (bound "
        f"by {estimate.bound}), {estimate.longest:.3f} s if not. "
        "These are estimates, not measurements."
    )
    console.print(f"At best {estimate.tokens_per_second:,.0f} tokens/s.")
    if tokens is None:
        return
    hours = tokens / estimate.tokens_per_second / 3600
    cost = f" and ${hours * chips * price:,.2f}" if price is not None else ""
    console.print(f"{tokens:,.0f} tokens: at least {hours:,.2f} hours{cost}.")


def memory_parts(program: Program) -> dict[str, int]:
    """The bytes of a chip by part; they add up to `Program.total`."""
    parts = {
        "weights": program.weights,
        "adapters": program.trained,
        "optimizer": program.moments,
        "batch": program.batch,
    }
    # Small matrices fill whole tiles of a chip's memory.
    parts["padding of these"] = program.arguments - sum(parts.values())
    parts["temporaries: activations, gradients, gathered weights"] = program.temporaries
    parts["total"] = program.total
    return parts


def describe(config: Config, topology: Topology) -> str:
    """A config in a line: chips, mesh, batch, recomputation, format."""
    train, mesh = config.train, config.mesh
    data = mesh.data
    if data == -1:
        data = topology.devices // (mesh.fsdp * mesh.expert * mesh.context * mesh.tensor)
    axes = f"data={data} fsdp={mesh.fsdp} tensor={mesh.tensor}"
    for name in ("expert", "context"):
        if getattr(mesh, name) > 1:
            axes += f" {name}={getattr(mesh, name)}"
    parts = [
        f"{topology.devices} × {topology.chip.label}",
        f"mesh {axes}",
        f"{train.batch_size} rows of {config.data.max_length} tokens",
        f"remat {config.model.remat}",
    ]
    if train.microbatches > 1:
        parts.append(f"{train.microbatches} microbatches")
    if config.quant.format != "none":
        parts.append(f"base in {config.quant.format}")
    return ", ".join(parts)


def print_search(
    console: Console, candidates: Sequence[Candidate], best: Candidate | None, topology: Topology
) -> None:
    """Print what was tried, and the options of the best one."""
    table = make_table("Tried")
    for header in ("config", "GB a chip", "s a step", ""):
        table.add_column(header, overflow="fold")
    for candidate in candidates:
        more = "" if candidate.tried else "over "
        seconds = "" if candidate.estimate is None else f"{candidate.estimate.seconds:.3f}"
        verdict = "fits" if candidate.fits(topology) else "does not fit"
        config = describe(candidate.config, topology).partition(", ")[2]
        table.add_row(config, f"{more}{candidate.needed / GB:.2f}", seconds, verdict)
    console.print(table)
    if best is None:
        console.print(
            "Nothing that was tried fits: take more chips, or shorter rows (data.max_length).",
            style="yellow",
        )


def options(config: Config, given: Config) -> str:
    """The command-line options that turn one config into another."""
    parts = []
    for section in dataclasses.fields(config):
        own, others = getattr(config, section.name), getattr(given, section.name)
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            if value != getattr(others, field.name):
                parts.append(f"--{section.name}.{field.name} {value}")
    return " ".join(parts)


def as_json(candidate: Candidate, topology: Topology) -> dict[str, Any]:
    """A candidate's figures as JSON values."""
    program, estimate = candidate.program, candidate.estimate
    values: dict[str, Any] = {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.devices,
        "config": json.loads(candidate.config.to_json()),
        "fits": candidate.fits(topology),
    }
    if program is not None and estimate is not None:
        values["bytes_a_chip"] = memory_parts(program)
        values["flops_a_chip"] = program.flops
        values["collectives"] = dataclasses.asdict(program.traffic)
        values["compile_seconds"] = program.seconds
        roofline = dataclasses.asdict(estimate)
        values["estimate"] = {**roofline, "seconds": estimate.seconds, "longest": estimate.longest}
    return values


def print_scaling(console: Console, planned: Sequence[tuple[Topology, Candidate]]) -> None:
    """Print how the estimate grows with the number of chips."""
    table = make_table("As many rows on each chip")
    for header in ("topology", "chips", "GB a chip", "GB received", "s a step", "efficiency"):
        table.add_column(header, justify="left" if header == "topology" else "right")
    for topology, candidate in planned:
        program, estimate = candidate.program, candidate.estimate
        if program is None or estimate is None:
            table.add_row(topology.name, str(topology.devices), "does not fit", "", "", "")
            continue
        table.add_row(
            topology.name,
            str(topology.devices),
            f"{program.total / GB:.2f}",
            f"{program.traffic.total / GB:.2f}",
            f"{estimate.seconds:.3f}",
            f"{estimate.efficiency:.0%}",
        )
    console.print(table)
