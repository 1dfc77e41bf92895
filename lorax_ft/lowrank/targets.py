"""Which modules a list of patterns means, and which rank and scale each of their matrices gets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import flax.linen as nn
import numpy as np

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.layout import Layout, TracedLayout, blocks_of, logical_paths
from lorax_ft.lowrank.patterns import (
    check_coverage,
    first_value,
    is_target,
    layer_index,
    matches,
)
from lorax_ft.lowrank.plan import Plan, Start
from lorax_ft.lowrank.spec import LayerSpec, base_shape
from lorax_ft.lowrank.terms import TERMS
from lorax_ft.schema import init_schema, leaf_schema
from lorax_ft.tree import Layer, Shape, Tree, modules


def plan_adapters(
    config: AdapterConfig,
    params: Tree,
    *,
    layout: Layout,
    changes_base: bool | None = None,
) -> dict[str, Plan]:
    """The modules that `config` adapts, with the rank and scale of each matrix of their stacks.

    Args:
      config: patterns, ranks and alphas.
      params: the model's parameters, or their shapes.
      layout: the layers of the model.
      changes_base: whether the init changes the base; None: as the row of `config.init` says.

    Raises:
      ValueError: a pattern matches no module, everything that targets match is excluded, or a rank
        is above a matrix's smaller side, or its larger one for a random init.
    """
    if changes_base is None:
        changes_base = init_schema(config.init).changes_base
    layers = modules(nn.meta.unbox(params))
    unseen = layout.unseen if isinstance(layout, TracedLayout) else {}
    of_blocks = _targets_of_blocks(config, layers, layout)
    layout = {**layout, **_named_blocks(config, of_blocks, layers, layout)}
    shapes = {}
    paths = {}
    for path, spec in layout.items():
        shapes[path] = base_shape(layers, path, spec)
        paths[path] = logical_paths(path, spec, shapes[path])
    _check_patterns(config, layout, paths, unseen)
    plans = {}
    for path, spec in layout.items():
        targets = of_blocks if spec.module == "block" else config.targets
        ranks = np.array([_rank(config, name, spec, targets) for name in paths[path]])
        if not ranks.any():
            continue
        start = _start(config, spec, layers.get(path, {}), changes_base=changes_base)
        plans[path] = _plan(config, path, spec, paths[path], ranks, shapes[path], start)
    if config.targets and not plans:
        raise ValueError(
            f"adapter.exclude and adapter.layers leave none of adapter.targets {config.targets}"
        )
    _check_within_targets(config, layout, plans)
    return plans


def _plan(
    config: AdapterConfig,
    path: str,
    spec: LayerSpec,
    paths: list[str],
    ranks: np.ndarray,
    shape: Shape,
    start: Start,
) -> Plan:
    """The plan of one module, of whose matrices some have ranks above 0."""
    stack, rows, columns = spec.sizes(shape)
    largest = int(ranks.max())
    rules = config.patterns("alpha_pattern")
    alphas = np.array([first_value(rules, name, config.alpha) for name in paths])
    divisor = np.maximum(ranks, 1)
    if config.scaling == "rank_stabilized":
        divisor = np.sqrt(divisor)
    scales = np.where(ranks > 0, alphas / divisor, 0)
    scales = scales.astype(np.float32)
    width = largest
    if config.init == "eva" and spec.module != "embed":
        # EVA may give a matrix up to ρ r directions.
        most = round(config.eva_rho * largest)
        width = min(most, rows, columns)
    plan = Plan(
        spec=spec,
        paths=paths,
        ranks=ranks.reshape(stack),
        scales=scales.reshape(stack),
        width=width,
        rows=rows,
        columns=columns,
        config=config,
        start=start,
    )
    if _has_limited_rank(plan):
        _check_rank(config, path, largest, rows, columns)
    return plan


def _has_limited_rank(plan: Plan) -> bool:
    """Whether the plan has leaves with a rank that must not exceed the sides of the matrix."""
    terms = [term for term in TERMS if not term.any_rank]
    leaves = [name for term in terms for name in term.planned(plan)]
    return any("rank" in leaf_schema(name).axes for name in leaves)


def _check_rank(config: AdapterConfig, path: str, rank: int, rows: int, columns: int) -> None:
    """Raise where a module's matrices are too small for its largest rank."""
    if config.method == "lora" and init_schema(config.init).any_rank:
        side, most = "larger", max(rows, columns)
    else:
        side, most = "smaller", min(rows, columns)
    if rank > most:
        _, _, name = path.rpartition("/")
        raise ValueError(
            f"{path}: rank {rank} is above the {side} side of its matrix, {rows} × {columns}; "
            f"lower adapter.rank, or give --adapter.rank_pattern {name}={most}"
        )


def _start(
    config: AdapterConfig,
    spec: LayerSpec,
    layer: Layer,
    *,
    changes_base: bool,
) -> Start:
    """Where a module's init subtracts A₀ B₀: nowhere, from the base, or in the forward."""
    if spec.module == "embed" or not changes_base:
        return "none"
    # A tied head's kernel is the embedding's, which must stay.
    is_tied = spec.weight not in layer
    return "kept" if config.keep_base or is_tied else "in_base"


def _targets_of_blocks(
    config: AdapterConfig,
    layers: Mapping[str, Layer],
    layout: Layout,
) -> tuple[str, ...]:
    """The targets that match no layer, and may so mean whole modules."""
    specs = {}
    for path, spec in layout.items():
        for name in logical_paths(path, spec, base_shape(layers, path, spec)):
            specs[name] = spec
    return tuple(
        target
        for target in config.targets
        if not any(is_target(name, spec, (target,)) for name, spec in specs.items())
    )


def _named_blocks(
    config: AdapterConfig,
    targets: tuple[str, ...],
    layers: Mapping[str, Layer],
    layout: Layout,
) -> Layout:
    """The whole modules that these targets match.

    Raises:
      ValueError: no bottleneck can stand beside one of them, or the method is another.
    """
    refused = layout.refused if isinstance(layout, TracedLayout) else {}
    found = {}
    for target in targets:
        for path, spec in blocks_of(layout).items():
            names = logical_paths(path, spec, base_shape({}, path, spec))
            if any(matches(target, name) for name in names):
                found[path] = spec
                _check_bottleneck(config, target, path, layout)
        for path, why in refused.items():
            names = _names_of_refused(path, layers, layout)
            if not any(matches(target, name) for name in names):
                continue
            _check_bottleneck(config, target, path, layout)
            if config.method == "bottleneck":
                raise ValueError(
                    f"adapter.targets: {target!r} matches {path}, which {why}, so that no "
                    f"bottleneck can stand beside it; {_instead(path, layout)}"
                )
    return found if config.method == "bottleneck" else {}


def _names_of_refused(path: str, layers: Mapping[str, Layer], layout: Layout) -> list[str]:
    """The logical paths of a module that has no spec: it is in the scans of the layers near it."""
    parts = path.split("/")

    def shared_parts(other: str) -> int:
        pairs = zip(parts, other.split("/"), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    nearest = max(layout, key=shared_parts, default=None)
    if nearest is None:
        return [path]
    spec = layout[nearest]
    scanned = tuple(place for place in spec.scanned if place <= shared_parts(nearest))
    spec_of_scans = dataclasses.replace(spec, scanned=scanned)
    return logical_paths(path, spec_of_scans, base_shape(layers, nearest, spec))


def _check_bottleneck(config: AdapterConfig, target: str, path: str, layout: Layout) -> None:
    """Raise where a method for layers alone would adapt a module that has some."""
    has_layers = any(name.startswith(f"{path}/") for name in layout)
    if config.method != "bottleneck" and has_layers:
        raise ValueError(
            f"adapter.targets: {target!r} matches {path}, a whole module, and {config.method} "
            f"adapts layers; {_instead(path, layout)}"
        )


def _instead(path: str, layout: Layout) -> str:
    """What to target in the place of a module: the layers in it."""
    inside = [name.rpartition("/")[2] for name in layout if name.startswith(f"{path}/")]
    return f"name its layers: {' '.join(dict.fromkeys(inside))}" if inside else "name a layer"


def _rank(
    config: AdapterConfig,
    path: str,
    spec: LayerSpec,
    targets: tuple[str, ...],
) -> int:
    """The rank of one matrix, 0 where it is not adapted."""
    # `exclude` wins over `targets`.
    if not is_target(path, spec, targets) or is_target(path, spec, config.exclude):
        return 0
    if config.layers and layer_index(path) not in config.layers:
        return 0
    return int(first_value(config.patterns("rank_pattern"), path, config.rank))


def _check_within_targets(config: AdapterConfig, layout: Layout, plans: Mapping[str, Plan]) -> None:
    """Raise where an option for some of the targets matches none of them."""
    specs = {name: layout[path] for path, plan in plans.items() for name in plan.paths}

    def targeted(pattern: str) -> bool:
        return any(is_target(name, spec, (pattern,)) for name, spec in specs.items())

    for field, patterns in config.patterns_within_targets().items():
        check_coverage(patterns, targeted, names=specs, where=f"adapter.{field}")


def _check_patterns(
    config: AdapterConfig,
    layout: Layout,
    paths: dict[str, list[str]],
    unseen: Mapping[str, str],
) -> None:
    """Raise where an option matches nothing in the model."""
    specs = {name: layout[path] for path, names in paths.items() for name in names}

    def targeted(pattern: str) -> bool:
        return any(is_target(name, spec, (pattern,)) for name, spec in specs.items())

    def matched(pattern: str) -> bool:
        return any(matches(pattern, name) for name in specs)

    for field, patterns in config.module_patterns().items():
        where = f"adapter.{field}"
        check_coverage(patterns, targeted, names=specs, where=where, unseen=unseen)
    rank_patterns = [pattern for pattern, _ in config.patterns("rank_pattern")]
    check_coverage(rank_patterns, matched, names=specs, where="adapter.rank_pattern")
    alpha_patterns = [pattern for pattern, _ in config.patterns("alpha_pattern")]
    check_coverage(alpha_patterns, matched, names=specs, where="adapter.alpha_pattern")
    indices = set()
    for name in specs:
        index = layer_index(name)
        if index is not None:
            indices.add(index)
    if missing := set(config.layers) - indices:
        last = max(indices, default=-1)
        raise ValueError(
            f"adapter.layers: there is no layer {min(missing)}; the model has layers 0 to {last}"
        )
