"""Checks that a fine-tuning trains anything, made when a run starts and after its first updates.

Adapters fail silently: a layer that the loss never reads, a scale of 0, a factor that stays at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.terms import active_leaf, is_adapted, low_rank, magnitude
from lorax_ft.schema import leaf_name, leaf_schema
from lorax_ft.tree import Tree, flatten, modules


def check_read(loss: Callable[[Tree], Any], trained: Tree) -> None:
    """Raise where the loss never reads a trained leaf. Traces the loss once and computes nothing.

    Args:
      loss: a function of the trained leaves.
      trained: the leaves, or their shapes.

    Raises:
      ValueError: with the paths of the leaves that no equation of the traced loss uses.
    """
    jaxpr = jax.make_jaxpr(loss)(trained).jaxpr
    read = _read_variables(jaxpr)
    # The inputs of a jaxpr are the leaves of its arguments, in the order of flattening.
    leaves, _ = jax.tree_util.tree_flatten_with_path(trained)
    unread = []
    for (keys, _), variable in zip(leaves, jaxpr.invars, strict=True):
        if variable not in read:
            names = [str(key.key) for key in keys]
            unread.append("/".join(names))
    if unread:
        raise ValueError(
            f"the loss never reads {_some(unread)}: these layers are called in a way that adapters "
            "cannot see; exclude them (adapter.exclude), or call them as Flax's layers inside "
            "adapt(apply)"
        )


def check_active(params: Tree) -> None:
    """Raise where no matrix of an adapted module is active, such as where all scales are 0.

    Raises:
      ValueError: with the modules' paths.
    """
    idle = []
    for path, layer in modules(params).items():
        if not is_adapted(layer):
            continue
        active = layer[active_leaf(layer)]
        if not bool(jnp.any(active != 0)):
            idle.append(path)
    if idle:
        raise ValueError(
            f"the scale of {_some(idle)} is 0, so the adapter does nothing; "
            "set adapter.alpha above 0"
        )


def check_frozen(params: Tree, freeze: Sequence[str]) -> None:
    """Raise where a factor that does not train starts at 0, so that A B stays 0 forever.

    A magnitude that trains beside them is enough.

    Args:
      params: a tree with adapters.
      freeze: the names of the factors that do not train (`adapter.freeze`).

    Raises:
      ValueError: with those leaves' paths.
    """
    zero = []
    for path, layer in modules(params).items():
        if magnitude.MAGNITUDE in layer:
            continue
        for name in freeze:
            if name in layer and not bool(jnp.any(layer[name] != 0)):
                zero.append(f"{path}/{name}")
    if zero:
        raise ValueError(
            f"{_some(zero)} starts at 0, and adapter.freeze keeps it there, so the adapter does "
            "nothing; exclude the module, or do not freeze the factor"
        )


def moved(before: Tree, after: Tree, *, rate: Array | float) -> dict[str, Array]:
    """For each leaf by slash path, whether it is finite, and whether any element of it changed.

    Jit it. An update at a learning rate below what float32 can add to the leaf counts as a change.
    """
    old = flatten(before)
    new = flatten(after)
    report = {}
    for path, leaf in new.items():
        largest = jnp.max(jnp.abs(old[path]))
        resolution = jnp.finfo(jnp.float32).eps * largest
        has_moved = (old[path] != leaf).any()
        # An update of this size is lost in the rounding of the leaf.
        is_lost = rate < resolution
        changed = has_moved | is_lost
        is_finite = jnp.isfinite(leaf).all()
        report[path] = jnp.stack([is_finite, changed])
    return report


def check_moved(report: Mapping[str, Any], *, updates: int) -> None:
    """Raise where a leaf that the last update should have moved has not, or is not finite.

    With B = 0 the first gradient of A is exactly zero (on an embedding, where A = 0, it is B's). So
    after the first update one of the two factors has moved, and after the second every leaf has.

    Args:
      report: what `moved` returned for the last update, fetched.
      updates: updates since the adapters started.

    Raises:
      ValueError: with the paths of those leaves.
    """
    broken = [path for path, (finite, _) in report.items() if not finite]
    if broken:
        raise ValueError(
            f"after update {updates}, {_some(broken)} holds values that are not finite; "
            "lower the learning rate"
        )
    if updates >= 2:
        still = [path for path, (_, changed) in report.items() if not changed and _must(path)]
    else:
        still = _idle_modules(report)
    if still:
        raise ValueError(
            f"after update {updates}, {_some(still)} did not move: its gradient is zero, or the "
            "learning rate is too small"
        )


def _must(path: str) -> bool:
    """Whether any batch moves the leaf; rows of tokens move where a batch has one of the tokens."""
    return "token" not in leaf_schema(leaf_name(path)).axes


def _idle_modules(report: Mapping[str, Any]) -> list[str]:
    """The modules with factors of which none changed."""
    changed_by_module: dict[str, list[bool]] = {}
    for path, (_, changed) in report.items():
        module, _, name = path.rpartition("/")
        if name in low_rank.FACTORS:
            changed_by_module.setdefault(module, []).append(bool(changed))
    idle = []
    for path, changes in changed_by_module.items():
        if not np.any(changes):
            idle.append(path)
    return sorted(idle)


def _read_variables(jaxpr: Any) -> set[Any]:
    """The variables of a jaxpr that some equation uses.

    One that is passed to an inner jaxpr which ignores it does not count.
    """
    used = {variable for variable in jaxpr.outvars if not _is_literal(variable)}
    for equation in jaxpr.eqns:
        inner = _inner_jaxpr(equation)
        inner_reads = set() if inner is None else _read_variables(inner)
        for i, variable in enumerate(equation.invars):
            if _is_literal(variable):
                continue
            if inner is None or inner.invars[i] in inner_reads:
                used.add(variable)
    return used


def _inner_jaxpr(equation: Any) -> Any:
    """The jaxpr that an equation calls with its own inputs, if it calls one."""
    for value in equation.params.values():
        # Some primitives hold a jaxpr, others one that is closed over its constants.
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _some(paths: Sequence[str]) -> str:
    """The first few paths, and how many more there are."""
    shown = ", ".join(paths[:4])
    more = len(paths) - 4
    if more <= 0:
        return shown
    return f"{shown} and {more} more"
