"""Which modules a list of patterns means, and which rank and scale each of their matrices gets."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.layout import Layout, logical_paths
from lorax_ft.lowrank.spec import LayerSpec

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one module gets: ranks and scales for each matrix of its stack, 0 where it gets nothing."""

    paths: list[str]
    ranks: np.ndarray
    scales: np.ndarray
    width: int
    """R, the columns of A: the largest rank, or the largest that EVA may give."""


def plan_adapters(
    config: AdapterConfig, *, layout: Layout, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Plan]:
    """The modules that `config` adapts, with the rank and the scale of each matrix of their stacks.

    Args:
      config: patterns, ranks and alphas.
      layout: the layers of the model.
      shapes: their kernels' shapes.

    Raises:
      ValueError: a pattern matches no module, all that targets match is excluded, or a rank is above a matrix's
        smaller side.
    """
    paths = {path: logical_paths(path, spec, shapes[path]) for path, spec in layout.items()}
    _check_patterns(config, layout, paths)
    plans = {}
    for path, spec in layout.items():
        ranks = np.array([_rank(config, name, spec) for name in paths[path]])
        alphas = np.array(
            [
                first_value(config.patterns("alpha_pattern"), name, config.alpha)
                for name in paths[path]
            ]
        )
        if not ranks.any():
            continue
        stack, rows, columns = spec.sizes(shapes[path])
        if ranks.max() > min(rows, columns):
            raise ValueError(
                f"{path}: rank {ranks.max()} is above the smaller side of its matrix, {rows} × {columns}"
            )
        divisor = (
            np.sqrt(np.maximum(ranks, 1))
            if config.scaling == "rank_stabilized"
            else np.maximum(ranks, 1)
        )
        scales = np.where(ranks > 0, alphas / divisor, 0).astype(np.float32)
        spread = config.eva_rho if config.init == "eva" and spec.kind != "embed" else 1
        plans[path] = Plan(
            paths=paths[path],
            ranks=ranks.reshape(stack),
            scales=scales.reshape(stack),
            width=min(round(spread * ranks.max()), rows, columns),
        )
    if config.targets and not plans:
        raise ValueError(
            f"adapter.exclude and adapter.layers leave nothing of adapter.targets {config.targets}"
        )
    return plans


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a module: by name, by suffix (`mlp/up_proj`), or as a whole regular expression.

    Dots in place of slashes are understood, so that patterns written for PEFT work.

    >>> matches("q_proj", "layers/3/self_attn/q_proj"), matches("layers/[0-3]/.*", "layers/12/mlp/up_proj")
    (True, False)
    """
    parts = path.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
    return any(pattern in (suffix, suffix.replace("/", ".")) for suffix in suffixes) or any(
        re.fullmatch(pattern, name) is not None for name in (path, path.replace("/", "."))
    )


def is_target(path: str, *, targets: Sequence[str], by_name: bool, embed: bool) -> bool:
    """Whether `targets` match the module at `path`; "all-linear" matches all but heads, routers and embeddings."""
    return any(not (by_name or embed) if t == "all-linear" else matches(t, path) for t in targets)


def layer_index(path: str) -> int | None:
    """The index in a logical path: 3 for `layers/3/mlp` and for `Block_3/mlp`, None where there is none."""
    found = re.search(
        r"(?:^|/)(?:[^/]*_)?(\d+)/", f"{path}/" if re.search(r"(^|/)\d+$", path) else path
    )
    return int(found[1]) if found else None


def first_value(rules: Iterable[tuple[str, T]], path: str, default: T) -> T:
    """The value of the first (pattern, value) rule that matches the module at `path`."""
    return next((value for pattern, value in rules if matches(pattern, path)), default)


def check_coverage(
    patterns: Iterable[str], hit: Callable[[str], bool], *, names: Iterable[str], where: str
) -> None:
    """Raise where a pattern matches none of the modules.

    Args:
      patterns: what the user wrote.
      hit: whether a pattern matches something.
      names: the modules that exist, by logical path.
      where: the option's name, for the error.

    Raises:
      ValueError: with the modules that exist and the nearest name.
    """
    kinds = sorted({re.sub(r"/\d+(?=/|$)", "/*", name) for name in names})
    for pattern in patterns:
        if not hit(pattern):
            last = {kind.rpartition("/")[2] for kind in kinds}
            near = difflib.get_close_matches(pattern, sorted(last | set(kinds)), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}? There are" if near else "; there are"
            raise ValueError(
                f"{where}: {pattern!r} matches no module{hint} {', '.join(kinds) or 'none'}"
            )


def _rank(config: AdapterConfig, path: str, spec: LayerSpec) -> int:
    """The rank of one matrix, 0 where it is not adapted."""
    embed = spec.kind == "embed"
    chosen = is_target(path, targets=config.targets, by_name=spec.by_name, embed=embed)
    if not chosen or is_target(path, targets=config.exclude, by_name=spec.by_name, embed=embed):
        return 0
    index = layer_index(path)
    if config.layers and index not in config.layers:
        return 0
    return int(first_value(config.patterns("rank_pattern"), path, config.rank))


def _check_patterns(config: AdapterConfig, layout: Layout, paths: dict[str, list[str]]) -> None:
    known = [(name, layout[path]) for path, names in paths.items() for name in names]
    names = [name for name, _ in known]

    def hit(pattern: str) -> bool:
        return any(
            is_target(n, targets=(pattern,), by_name=s.by_name, embed=s.kind == "embed")
            for n, s in known
        )

    check_coverage(config.targets, hit, names=names, where="adapter.targets")
    check_coverage(config.exclude, hit, names=names, where="adapter.exclude")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = [p for p, _ in config.patterns(field)]
        check_coverage(
            patterns,
            lambda p: any(matches(p, n) for n in names),
            names=names,
            where=f"adapter.{field}",
        )
    indices = {index for index in map(layer_index, names) if index is not None}
    if missing := set(config.layers) - indices:
        last = max(indices, default=-1)
        raise ValueError(
            f"adapter.layers: there is no layer {min(missing)}; the model has layers 0 to {last}"
        )
