"""What a model's layers are: found by tracing the model once, never guessed from shapes.

A tree does not say whether `[3, 16, 32]` is three scanned Dense layers or one DenseGeneral.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from lorax_ft.lowrank import intercept
from lorax_ft.lowrank.spec import LayerSpec
from lorax_ft.schema import is_base
from lorax_ft.tree import Layer, Shape, Tree, flatten, modules, unflatten, with_layer_numbers

Layout = dict[str, LayerSpec]
Views = dict[str, list[dict[str, int]]]
"""By module path, the leaves that the module saw in each call, with the number of their axes."""


def layout(apply: Callable[..., Any], params: Mapping[str, Any], *example: Any) -> Layout:
    """The layers of a linen model that can be adapted, by slash path.

    Args:
      apply: `model.apply`, or any function of `{"params": params}` and the example.
      params: the parameters, or their shapes.
      *example: inputs, or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
      A `LayerSpec` for every Dense, DenseGeneral, Einsum, Conv and Embed that the trace calls. A
      method under `nn.jit` that has run with these shapes before is not traced again, so its layers
      are not seen.

    Raises:
      ValueError: a scan slices the parameters along another axis than the first. This is detected
        by their shapes, so not for a kernel with as many rows as the scan has layers.

    >>> model = nn.Dense(3)
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))["params"]
    >>> layout(model.apply, params, jax.numpy.ones((1, 2)))[""].module
    'dense'
    """
    base = _base_shapes(params)
    traced: dict[str, intercept.Traced] = {}
    attended: set[str] = set()
    views: Views = {}

    def record(
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        path = "/".join(module.path)
        if context.method_name == "attend":
            # The table is an output head too, which an adapter on the lookup would not change.
            attended.add(path)
        if context.method_name == "__call__":
            views.setdefault(path, []).append(_axes_in_view(module))
            if found := intercept.trace(module, args, kwargs):
                traced[path] = found
        return next_fun(*args, **kwargs)

    def run(params: Any, *example: Any) -> Any:
        with nn.intercept_methods(record):
            return apply({"params": params}, *example)

    jax.eval_shape(run, base, *example)
    layers = modules(base)
    specs = {}
    for path, found in traced.items():
        if path not in attended:
            specs[path] = _stacked_spec(path, found, layers[path], views)
    return specs


def _base_shapes(params: Mapping[str, Any]) -> Tree:
    """The shapes of the base's leaves; quantized kernels have those of the kernels."""
    leaves = flatten(nn.meta.unbox(params))
    shapes = {}
    for path, leaf in leaves.items():
        if is_base(path):
            shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return unflatten(shapes)


def _axes_in_view(module: nn.Module) -> dict[str, int]:
    """The number of axes of each leaf that a module sees while it is traced."""
    params = module.variables.get("params", {})
    leaves = flatten(nn.meta.unbox(params))
    return {name: leaf.ndim for name, leaf in leaves.items()}


def logical_paths(path: str, spec: LayerSpec, shape: Shape) -> list[str]:
    """The paths of a stack's matrices, `layers/3/mlp` for `layers/mlp`.

    A layer on its own has its own path, and experts share one.

    Args:
      path: the module's slash path.
      spec: its layout.
      shape: its kernel's shape.
    """
    stack, _, _ = spec.sizes(shape)
    scans = len(spec.scanned)
    experts = math.prod(stack[scans:])
    paths = []
    indices_of_scans = [range(size) for size in stack[:scans]]
    for index in itertools.product(*indices_of_scans):
        parts = path.split("/")
        insertions = zip(spec.scanned, index, strict=True)
        # From the last, so that an insertion does not move the places of the others.
        for place, i in sorted(insertions, reverse=True):
            parts.insert(place, str(i))
        matrix = with_layer_numbers("/".join(parts))
        paths += [matrix] * experts
    return paths


def _stacked_spec(
    path: str,
    traced: intercept.Traced,
    layer: Layer,
    views: Views,
) -> LayerSpec:
    """The spec of the whole leaf, from that of the slice which the model sees inside its scans."""
    name = traced.spec.weight
    shape = layer[name].shape
    local = traced.shape
    n = len(shape) - len(local)  # scans that contain the module
    if shape[n:] != local:
        raise ValueError(
            f"{path}: its kernel {shape} is seen as {local} inside the model; lift modules over "
            'the first axis of their parameters (nn.scan(variable_axes={"params": 0}))'
        )
    scanned = []
    for scan in range(n):
        # Each scan hides one axis of the leaf from what is inside it, the outermost first.
        axes_inside = len(shape) - 1 - scan
        scanned.append(_scan_place(path, name, axes_inside, views))
    return traced.spec.inside_scans(tuple(scanned))


def _scan_place(
    path: str,
    name: str,
    ndim: int,
    views: Views,
) -> int:
    """The length of the shortest path prefix whose module sees at most `ndim` axes of a leaf.

    That module is inside the scan, so the scan's index comes right behind the prefix.
    """
    parts = path.split("/")
    for n in range(len(parts) + 1):
        prefix = "/".join(parts[:n])
        inner = "/".join([*parts[n:], name])
        for view in views.get(prefix, ()):
            if inner in view and view[inner] <= ndim:
                return n
    return len(parts)
