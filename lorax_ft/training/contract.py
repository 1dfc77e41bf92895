"""What must hold for a fine-tuning to be one, checked when a run starts and after its first updates.

Adapters fail in silence: a layer the loss never reads, a scale of zero, a factor that never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

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
    read = _read(jaxpr)
    paths = [
        "/".join(str(key.key) for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(trained)[0]
    ]
    if unread := [path for path, var in zip(paths, jaxpr.invars, strict=True) if var not in read]:
        raise ValueError(
            f"the loss never reads {_some(unread)}: these layers are called in a way that adapters cannot see; "
            "leave them out (adapter.exclude), or call them as linen layers inside adapt(apply)"
        )


def check_scales(params: Tree) -> None:
    """Raise where all scales of an adapted module are 0, so that its adapter does nothing.

    Raises:
      ValueError: with the modules' paths.
    """
    scales = {path: leaf for path, leaf in flatten(params).items() if path.endswith("lora_scale")}
    if zero := [
        path.removesuffix("/lora_scale")
        for path, scale in scales.items()
        if not bool(jnp.any(scale != 0))
    ]:
        raise ValueError(
            f"the scale of {_some(zero)} is 0, so the adapter does nothing; set adapter.alpha above 0"
        )


def check_frozen(params: Tree, freeze: Sequence[str]) -> None:
    """Raise where a factor that does not train starts at 0, so that A B stays 0 for ever, and no magnitude trains.

    Args:
      params: a tree with adapters.
      freeze: the names of the factors that do not train (`adapter.freeze`).

    Raises:
      ValueError: with those leaves' paths.
    """
    without = {path: layer for path, layer in modules(params).items() if "magnitude" not in layer}
    leaves = {
        f"{path}/{name}": layer[name]
        for path, layer in without.items()
        for name in freeze
        if name in layer
    }
    if zero := [path for path, leaf in leaves.items() if not bool(jnp.any(leaf != 0))]:
        raise ValueError(
            f"{_some(zero)} starts at 0, and adapter.freeze keeps it there, so the adapter does nothing; "
            "leave out either the module or the freezing"
        )


def moved(before: Tree, after: Tree, *, rate: Array | float) -> dict[str, Array]:
    """For each leaf by slash path, whether it is finite, and whether any element of it changed; jit it.

    An update at a learning rate below what float32 can add to the leaf counts as a change.
    """
    old, new = flatten(before), flatten(after)

    def report(old: Array, new: Array) -> Array:
        lost = rate < jnp.finfo(jnp.float32).eps * jnp.max(jnp.abs(old))
        return jnp.stack([jnp.isfinite(new).all(), (old != new).any() | lost])

    return {path: report(old[path], new[path]) for path in new}


def check_moved(report: dict[str, Any], *, updates: int) -> None:
    """Raise where a leaf that the last update should have moved has not, or is not finite.

    With B = 0 the first gradient of A is exactly zero (on an embedding, where A = 0, the other way round), so after
    the first update one of the two factors has moved, and after the second every leaf that trains has.

    Args:
      report: what `moved` returned for the last update, fetched.
      updates: updates since the adapters started.

    Raises:
      ValueError: with the paths of those leaves.
    """
    if broken := [path for path, (finite, _) in report.items() if not finite]:
        raise ValueError(
            f"after update {updates}, {_some(broken)} holds values that are not finite; lower the learning rate"
        )
    if updates >= 2:
        still = [path for path, (_, changed) in report.items() if not changed]
    else:
        pairs = {
            path.rpartition("/")[0]
            for path in report
            if path.rpartition("/")[2] in ("lora_a", "lora_b")
        }
        factors = {
            p: [report[f"{p}/{n}"] for n in ("lora_a", "lora_b") if f"{p}/{n}" in report]
            for p in pairs
        }
        still = [p for p in sorted(pairs) if not any(changed for _, changed in factors[p])]
    if still:
        raise ValueError(
            f"after update {updates}, {_some(still)} did not move: a gradient is zero or a learning rate too small"
        )


def _read(jaxpr: Any) -> set[Any]:
    """The variables of a jaxpr that some equation uses; one that an inner jaxpr ignores does not count."""
    used = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for eqn in jaxpr.eqns:
        inner = [_open(value) for value in eqn.params.values() if hasattr(_open(value), "eqns")]
        aligned = next((j for j in inner if len(j.invars) == len(eqn.invars)), None)
        reads = _read(aligned) if aligned else set()
        for i, var in enumerate(eqn.invars):
            if not hasattr(var, "val") and (aligned is None or aligned.invars[i] in reads):
                used.add(var)
    return used


def _open(value: Any) -> Any:
    return getattr(value, "jaxpr", value)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
