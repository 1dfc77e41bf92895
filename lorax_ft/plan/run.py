"""A plan from a config to its report: what `lorax-ft plan` calls."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.files import write_file
from lorax_ft.interop.locate import read_model_config
from lorax_ft.plan.chips import Topology
from lorax_ft.plan.estimate import estimate
from lorax_ft.plan.plot import plot_scaling
from lorax_ft.plan.program import (
    DoesNotFitError,
    abstract_arguments,
    make_mesh,
    make_model,
    measure,
)
from lorax_ft.plan.report import as_json, options, print_plan, print_scaling, print_search
from lorax_ft.plan.search import Candidate, fastest, search
from lorax_ft.run.remat import choose, scales_outputs, tokens_a_device
from lorax_ft.run.report import make_console

Planned = tuple[Topology, Candidate]


def plan(
    config: Config,
    topologies: Sequence[Topology],
    *,
    tries: int = 6,
    always_search: bool = False,
    tokens: float | None = None,
    price: float | None = None,
    json_file: str | None = None,
    plot_file: str | None = None,
) -> list[Planned]:
    """Compile the step of a config for chips that are not here, and say what it takes.

    Args:
      config: a run; of the model only config.json is read.
      topologies: the chips. With several, the batch grows with their number (weak scaling).
      tries: configs to compile in the place of one that does not fit, at most.
      always_search: whether to look for a faster one if it fits, too.
      tokens: of the whole training.
      price: US dollars an hour and chip.
      json_file: where to write the figures.
      plot_file: where to write a plot of several topologies.

    Returns:
      For each topology the config to take: the given one, or the fastest one found that fits.

    Raises:
      ValueError: the config does not fit the model or the topology.
    """
    console = make_console()
    fields = read_model_config(config.model.path, revision=config.model.revision)
    runs = [(topology, _scaled(config, topology, topologies[0])) for topology in topologies]
    for topology, scaled in runs:
        # What is wrong with the last is said before the first is compiled, which takes minutes.
        make_mesh(scaled, topology)
    planned = []
    for topology, scaled in runs:
        found = _plan_one(
            console,
            scaled,
            topology,
            fields,
            tries=tries,
            always_search=always_search,
            tokens=tokens,
            price=price,
        )
        planned.append((topology, found))
    if len(planned) > 1:
        print_scaling(console, planned)
        if plot_file is not None:
            plot_scaling(planned, Path(plot_file))
    if json_file is not None:
        figures = [as_json(candidate, topology) for topology, candidate in planned]
        write_file(Path(json_file), json.dumps(figures, indent=1) + "\n")
    return planned


def _plan_one(
    console: Console,
    config: Config,
    topology: Topology,
    fields: Mapping[str, Any],
    *,
    tries: int,
    always_search: bool,
    tokens: float | None,
    price: float | None,
) -> Candidate:
    """The plan for one topology."""

    def measured(config: Config) -> Candidate:
        with console.status(f"Compiling for {topology.name} …"):
            return _measure(config, topology, fields)

    config = _with_remat(config, topology, fields)
    first = measured(config)
    print_plan(console, first, topology, tokens=tokens, price=price)
    if first.fits(topology) and not always_search:
        return first
    experts = make_model(fields, config, topology, source=config.model.path).config.experts
    count = experts.count if experts else 1
    others = search(measured, first, topology, tries=tries, experts=count)
    best = fastest([first, *others], topology)
    print_search(console, others, best, topology)
    if best is None or best is first:
        return first
    print_plan(console, best, topology, tokens=tokens, price=price)
    console.print(f"Options: {options(best.config, config)}", soft_wrap=True)
    return best


def _with_remat(config: Config, topology: Topology, fields: Mapping[str, Any]) -> Config:
    """The config with the rematerialization that a run on such chips would choose."""
    if config.model.remat != "auto":
        return config
    model = make_model(fields, config, topology, source=config.model.path)
    mesh = make_mesh(config, topology)
    shapes = abstract_arguments(model, config, mesh)
    held = sharding.bytes_a_device((shapes.state, shapes.frozen))
    assert isinstance(config.data.max_length, int)
    tokens = tokens_a_device(config, mesh, config.data.max_length)
    free = topology.chip.memory - held
    kind = choose(
        model.config,
        tokens,
        memory=free,
        on_cpu=False,
        expert_devices=config.mesh.expert,
        scaled=scales_outputs(config),
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=kind))


def _measure(config: Config, topology: Topology, fields: Mapping[str, Any]) -> Candidate:
    """What a config needs, and how fast it could be."""
    model = make_model(fields, config, topology, source=config.model.path)
    mesh = make_mesh(config, topology)
    shapes = abstract_arguments(model, config, mesh)
    held = sharding.bytes_a_device((shapes.state, shapes.frozen, shapes.batch))
    # Minutes of compiling would say the same.
    if held > topology.chip.memory:
        return Candidate(config=config, needed=held)
    try:
        program = measure(model, config, mesh)
    except DoesNotFitError as error:
        return Candidate(config=config, needed=error.needed, tried=True)
    return Candidate(
        config=config,
        needed=program.total,
        program=program,
        estimate=estimate(program, config, topology),
        tried=True,
    )


def _scaled(config: Config, topology: Topology, first: Topology) -> Config:
    """The config with as many rows a chip as on the first topology.

    Raises:
      ValueError: that is no whole number of rows.
    """
    batch = config.train.batch_size
    rows, rest = divmod(batch * topology.devices, first.devices)
    if rest:
        unit = first.devices // math.gcd(first.devices, topology.devices)
        raise ValueError(
            f"train.batch_size {batch} on the {first.devices} chips of {first.name} is no whole "
            f"number of rows on the {topology.devices} of {topology.name}; give a multiple of "
            f"{unit}, or the smallest topology first"
        )
    train = dataclasses.replace(config.train, batch_size=rows)
    return dataclasses.replace(config, train=train)
