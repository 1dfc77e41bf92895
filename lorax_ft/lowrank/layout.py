"""What a model's layers are: read off one trace of the model, never guessed from shapes.

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
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, STEP_LEAVES, Layer
from lorax_ft.lowrank.spec import LayerSpec
from lorax_ft.tree import flatten, modules, unflatten

Layout = dict[str, LayerSpec]


def layout(apply: Callable[..., Any], params: Mapping[str, Any], *example: Any) -> Layout:
    """The layers of a linen model that can be adapted, by slash path.

    Args:
      apply: `model.apply`, or any function of `{"params": params}` and the example.
      params: the parameters, or their shapes.
      *example: inputs, or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
      A `LayerSpec` for every Dense, DenseGeneral, Einsum, Conv and Embed that the trace calls. A method under
      `nn.jit` that has run with these shapes before is not traced again, so its layers are not seen.

    Raises:
      ValueError: a scan slices the parameters along another axis than the first. Their shapes tell, so a kernel
        with as many rows as the scan has layers passes unseen.

    >>> model = nn.Dense(3)
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))["params"]
    >>> layout(model.apply, params, jax.numpy.ones((1, 2)))[""].kind
    'dense'
    """
    leaves = flatten(nn.meta.unbox(params)).items()  # as shapes, which quantized kernels have too
    plain = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves
        if _is_base(path)
    }
    full = modules(unflatten(plain))
    seen: dict[str, intercept.Traced] = {}
    attended: set[str] = set()
    views: dict[str, list[dict[str, int]]] = {}

    def record(
        next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if (
            context.method_name == "attend"
        ):  # the table is an output head too, which an adapter on the lookup is not
            attended.add("/".join(module.path))
        if context.method_name == "__call__":
            view = nn.meta.unbox(module.variables.get("params", {}))
            path = "/".join(module.path)
            views.setdefault(path, []).append(
                {name: leaf.ndim for name, leaf in flatten(view).items()}
            )
            if found := intercept.trace(module, args, kwargs):
                seen[path] = found
        return next_fun(*args, **kwargs)

    def run(params: Any, *example: Any) -> Any:
        with nn.intercept_methods(record):
            return apply({"params": params}, *example)

    jax.eval_shape(run, unflatten(plain), *example)
    return {
        path: _spec(path, traced, full[path], views)
        for path, traced in seen.items()
        if path not in attended
    }


def logical_paths(path: str, spec: LayerSpec, shape: tuple[int, ...]) -> list[str]:
    """The paths of a stack's matrices, `layers/3/mlp` for `layers/mlp`; the path itself for a layer on its own.

    Args:
      path: the module's slash path.
      spec: its layout.
      shape: its kernel's shape.
    """
    stack = spec.sizes(shape)[0]
    scans = len(spec.scanned)
    each = []
    for index in itertools.product(*map(range, stack[:scans])):
        parts = path.split("/")
        for before, i in sorted(zip(spec.scanned, index, strict=True), reverse=True):
            parts.insert(before, str(i))
        each.append("/".join(parts))
    return [name for name in each for _ in range(math.prod(stack[scans:]))]


def _is_base(path: str) -> bool:
    return path.rpartition("/")[2] not in ADAPTER_LEAVES | STEP_LEAVES


def _spec(
    path: str, traced: intercept.Traced, layer: Layer, views: dict[str, list[dict[str, int]]]
) -> LayerSpec:
    """The spec of the whole leaf, from that of the slice which the model sees inside its scans."""
    name = "embedding" if traced.spec.kind == "embed" else "kernel"
    shape, local = layer[name].shape, traced.shape
    n = len(shape) - len(local)
    if shape[n:] != local:
        raise ValueError(
            f"{path}: its kernel {shape} is seen as {local} inside the model; lift modules over the first axis "
            'of their parameters (nn.scan(variable_axes={"params": 0}))'
        )
    return traced.spec.inside_scans(
        tuple(_scanned(path, name, len(shape) - 1 - k, views) for k in range(n))
    )


def _scanned(path: str, name: str, ndim: int, views: dict[str, list[dict[str, int]]]) -> int:
    """The length of the shortest prefix of the path whose module sees the kernel with `ndim` axes or fewer."""
    parts = path.split("/")
    for n in range(len(parts) + 1):
        inner = "/".join([*parts[n:], name])
        if any(view.get(inner, ndim + 1) <= ndim for view in views.get("/".join(parts[:n]), ())):
            return n
    return len(parts)
