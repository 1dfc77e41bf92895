"""How the adapters of a sweep start: their leaves, and the base that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from lorax_ft.config import Config
from lorax_ft.data.batches import Batches
from lorax_ft.models.model import LoadedModel
from lorax_ft.run.additions import with_additions
from lorax_ft.run.progress import progress_bar
from lorax_ft.run.report import make_console
from lorax_ft.run.setup import run_statistics
from lorax_ft.sweep.axes import Point
from lorax_ft.training.state import fresh_leaves
from lorax_ft.tree import Tree, flatten, unflatten


def make_leaves(
    points: Sequence[Point], model: LoadedModel, batches: Sequence[Batches], mesh: Mesh
) -> list[tuple[Tree, Tree]]:
    """The leaves of each point that train, and the frozen ones.

    Points of the same adapter and seed, which differ in their rates only, start from the same.
    """
    made: dict[Any, tuple[Tree, Tree]] = {}
    inits = ", ".join(dict.fromkeys(point.config.adapter.init for point in points))
    with progress_bar(make_console(), f"initializing with {inits}") as advance:
        for point, its_batches in zip(points, batches, strict=True):
            config = point.config
            start = start_key(config)
            if start not in made:
                with jax.set_mesh(mesh):
                    started = with_additions(model, config)
                made[start] = fresh_leaves(
                    started,
                    config.adapter,
                    mesh=mesh,
                    # The key of a run of its own.
                    key=jax.random.fold_in(jax.random.key(config.train.seed), 0),
                    rounds=config.quant.rounds,
                    statistics=run_statistics(started, config, its_batches, mesh),
                )
            advance(1 / len(points))
    return [made[start_key(point.config)] for point in points]


def start_key(config: Config) -> tuple[Any, ...]:
    """What the leaves and the data of a point depend on: points with the same key start alike."""
    return config.adapter, config.prompt, config.train.seed


def shared_base(owned: Sequence[Tree], frozen: Sequence[Tree]) -> Tree:
    """The frozen leaves that belong to the model, the same in all points."""
    bases = []
    for own, leaves in zip(owned, frozen, strict=True):
        of_base = flatten(leaves)
        for path in flatten(own):
            of_base.pop(path, None)
        bases.append(unflatten(of_base))
    first = flatten(bases[0])
    for base in bases[1:]:
        for path, leaf in flatten(base).items():
            if not _is_same(first.get(path), leaf):
                raise ValueError(
                    f"the points of the sweep change {path} of the base, which they share; "
                    "give --adapter.keep_base, or an own sweep for each"
                )
    return bases[0]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two leaves are the same arrays in memory; a quantized one has several."""
    parts, other_parts = jax.tree.leaves(one), jax.tree.leaves(other)
    same = [part is its for part, its in zip(parts, other_parts, strict=True)]
    return all(same)
