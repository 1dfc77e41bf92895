"""Operations of a traced program: multiplications and additions of all its matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from lorax_ft.tree import Shape


def count_flops(jaxpr: Jaxpr, *, used: float = 1.0) -> float:
    """Multiplications and additions of the matrix products, all iterations of scans included.

    What is recomputed in the backward pass counts again. Elementwise operations do not count: on
    accelerators they cost memory traffic rather than arithmetic.

    Args:
      jaxpr: the program.
      used: the share of the rows of ragged products that are in a group.
    """
    return sum(_flops(equation, used) for equation in jaxpr.eqns)


def _flops(equation: JaxprEqn, used: float) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot(equation)
    if name == "ragged_dot_general":
        return used * _ragged_dot(equation)
    inner = [count_flops(jaxpr, used=used) for jaxpr in _inner(equation)]
    if name == "scan":
        return int(equation.params["length"]) * sum(inner)
    if name == "shard_map":
        # Inside are the shapes of one device; along the other axes they are whole.
        sizes = equation.params["mesh"].shape
        devices = math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
        return devices * sum(inner)
    if name == "pallas_call":
        # Blocks that a mask hides count too, so that of a causal kernel it is up to twice too many.
        steps = equation.params["grid_mapping"].grid
        return math.prod(steps) * sum(inner)
    if name == "cond":
        # One branch is taken.
        return max(inner, default=0)
    return sum(inner)


def _dot(equation: JaxprEqn) -> int:
    """2 · (size of the result) · (size of the contracted axes)."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, _, result = _shapes(equation)
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(result) * depth


def _ragged_dot(equation: JaxprEqn) -> int:
    """Each row meets the matrix of its own group only: 2 · rows · depth · columns.

    Rows behind the last group count too.
    """
    left, right, result = _shapes(equation)
    if len(result) == len(left):
        # [M, K] × [G, K, N]
        return 2 * left[0] * math.prod(right[1:])
    # [M, K] × [M, N] by groups of M: the gradient of the matrices, [G, K, N].
    return 2 * left[0] * math.prod(result[1:])


def _shapes(equation: JaxprEqn) -> tuple[Shape, Shape, Shape]:
    """The shapes of both operands and of the result."""
    variables = (*equation.invars[:2], equation.outvars[0])
    left, right, result = [tuple(getattr(each.aval, "shape", ())) for each in variables]
    return left, right, result


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs inside an equation, such as the body of a loop."""
    for value in equation.params.values():
        yield from _jaxprs(value)


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
