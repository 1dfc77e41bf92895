"""Finds a config that fits: other meshes, recomputation, microbatches, a quantized base.

Each candidate is compiled, which takes a minute for a model of 7B parameters, so that few are:
those whose weights alone do not fit are left out, and the search ends at the first that fits. It
then tries what is faster on that mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from lorax_ft.config import Config, MeshConfig
from lorax_ft.plan.chips import Topology
from lorax_ft.plan.estimate import Estimate
from lorax_ft.plan.program import Program
from lorax_ft.run.remat import Remat

LIGHTER: tuple[Remat, ...] = ("mlp", "products", "none")
"""Values of model.remat that recompute less and less than "full"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config and what was found of it."""

    config: Config
    needed: float
    """Bytes of a chip; without a program at least so many."""
    program: Program | None = None
    """None if it was not compiled, because the weights alone do not fit, or could not be."""
    estimate: Estimate | None = None
    tried: bool = False
    """Whether the compiler had to do with it."""

    def fits(self, topology: Topology) -> bool:
        """Whether it fits into the memory of a chip."""
        return self.program is not None and self.needed <= topology.chip.memory


Measure = Callable[[Config], Candidate]


def search(
    measure: Measure, first: Candidate, topology: Topology, *, tries: int, experts: int = 1
) -> list[Candidate]:
    """Candidates in place of one, in the order in which they were compiled.

    Args:
      measure: compiles a config.
      first: the config as it was given.
      topology: the chips.
      tries: how many to compile, at most.
      experts: of a layer of the model.
    """
    found: list[Candidate] = []

    def attempt(config: Config) -> Candidate | None:
        """The candidate, if it is a new one and there are tries left."""
        known = [first.config, *(candidate.config for candidate in found)]
        compiled = [candidate for candidate in found if candidate.tried]
        if config in known or len(compiled) >= tries:
            return None
        found.append(measure(config))
        return found[-1]

    if not first.fits(topology):
        for config in _smaller(first.config, topology, experts):
            candidate = attempt(config)
            if candidate is not None and candidate.fits(topology):
                break
    fitting = [candidate for candidate in (first, *found) if candidate.fits(topology)]
    if fitting:
        _lighten(attempt, fitting[-1], topology, experts)
    return found


def _lighten(
    attempt: Callable[[Config], Candidate | None],
    base: Candidate,
    topology: Topology,
    experts: int,
) -> None:
    """Try configs that recompute less than one that fits, as they are faster.

    They need more memory, which weights that are split over more chips may leave.
    """
    assert base.program is not None
    weights = base.program.weights * _shards(base.config)
    meshes = [base.config, *_meshes(base.config, topology, experts)]
    for remat in LIGHTER[_place(base.config) :]:
        while meshes:
            model = dataclasses.replace(base.config.model, remat=remat)
            candidate = attempt(dataclasses.replace(meshes[0], model=model))
            if candidate is None:
                return
            if candidate.fits(topology):
                break
            others = candidate.needed - weights / _shards(meshes[0])
            # Only the weights shrink with the mesh.
            meshes = [
                each
                for each in meshes[1:]
                if others + weights / _shards(each) <= topology.chip.memory
            ]


def _shards(config: Config) -> int:
    """How many chips split the weights, beside those of `tensor`: of experts, nearly all."""
    return config.mesh.fsdp * config.mesh.expert * config.mesh.context


def fastest(candidates: list[Candidate], topology: Topology) -> Candidate | None:
    """The fastest candidate that fits, by its estimate; None: none fits."""
    fitting = [candidate for candidate in candidates if candidate.fits(topology)]
    return min(fitting, key=_seconds, default=None)


def _seconds(candidate: Candidate) -> float:
    assert candidate.estimate is not None
    return candidate.estimate.seconds


def _place(config: Config) -> int:
    """The place in `LIGHTER` of the first value that recomputes less than this config."""
    remat = config.model.remat
    return LIGHTER.index(remat) + 1 if remat in LIGHTER else 0


def _smaller(config: Config, topology: Topology, experts: int) -> Iterator[Config]:
    """Configs that need less memory, the least change first."""
    model = dataclasses.replace(config.model, remat="full")
    config = dataclasses.replace(config, model=model)
    yield config
    # Weights that are split over more chips.
    meshes = list(_meshes(config, topology, experts))
    yield from meshes
    last = meshes[-1] if meshes else config
    # Fewer rows at a time, then parts of a row, and then four bits for the base.
    yield from _microbatched(last)
    yield from _in_parts(config, topology)
    if config.quant.format == "none":
        quant = dataclasses.replace(config.quant, format="nf4")
        for each in (config, *meshes, last):
            yield dataclasses.replace(each, quant=quant)
        yield from _microbatched(dataclasses.replace(last, quant=quant))


def _meshes(config: Config, topology: Topology, experts: int) -> Iterator[Config]:
    """Meshes that split the weights over more and more chips of a slice.

    Those that split experts come first: their chips exchange tokens, and not weights.
    """
    rows = config.train.batch_size // config.train.microbatches
    mesh = config.mesh
    times = 2
    while True:
        rest = times * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
        if rest > topology.chips:
            return
        data, left = divmod(topology.devices, rest)
        if not left and rows % (rest // (mesh.context * mesh.tensor) * data) == 0:
            if experts % (times * mesh.expert) == 0 and mesh.context == 1:
                split = dataclasses.replace(mesh, data=data, expert=times * mesh.expert)
                yield dataclasses.replace(config, mesh=split)
            split = dataclasses.replace(mesh, data=data, fsdp=times * mesh.fsdp)
            yield dataclasses.replace(config, mesh=split)
        times *= 2


def _in_parts(config: Config, topology: Topology) -> Iterator[Config]:
    """The tokens of a row split over more and more chips, with one row for each such group."""
    train, length = config.train, config.data.max_length
    assert length != "auto"
    context = 2 * config.mesh.context
    while context * config.mesh.tensor <= topology.chips and length % context == 0:
        fsdp, rest = divmod(topology.chips, context * config.mesh.tensor)
        data = topology.slices
        microbatches, more_rest = divmod(train.batch_size, data * fsdp)
        if not rest and not more_rest:
            mesh = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=config.mesh.tensor)
            changed = dataclasses.replace(train, microbatches=microbatches)
            yield dataclasses.replace(config, mesh=mesh, train=changed)
        context *= 2


def _microbatched(config: Config) -> Iterator[Config]:
    """More microbatches of fewer rows, down to one row a device."""
    train, mesh = config.train, config.mesh
    microbatches = 2 * train.microbatches
    devices = max(mesh.data, 1) * mesh.fsdp * mesh.expert
    while train.batch_size % (microbatches * devices) == 0:
        changed = dataclasses.replace(train, microbatches=microbatches)
        yield dataclasses.replace(config, train=changed)
        microbatches *= 2
