"""What a model's layers are: found by tracing the model once, never guessed from shapes.

A tree does not say whether `[3, 16, 32]` is three scanned Dense layers or one DenseGeneral.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from lorax_ft.lowrank import intercept
from lorax_ft.lowrank.layer_call import Traced, trace_block
from lorax_ft.lowrank.spec import LayerSpec
from lorax_ft.lowrank.watch import SeeCalls, check_function, check_tree, watched
from lorax_ft.schema import is_base
from lorax_ft.tree import Layer, Shape, Tree, flatten, join, modules, unflatten, with_layer_numbers

Layout = dict[str, LayerSpec]
View = dict[str, Shape]
"""The leaves at and below a module as it sees them in a call, with their shapes."""
Views = dict[str, list[View]]
"""By module path, those of each call."""


class TracedLayout(Layout):
    """The layout that a trace found, and what it did not find."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen: dict[str, str] = {}
        """Why the model's other matrices cannot be adapted, by slash path."""
        self.blocks: Layout = {}
        """The modules beside which a bottleneck can stand, by slash path. They are no layers, so
        they are not among the items; `layout[path]` finds them."""
        self.refused: dict[str, str] = {}
        """What the other modules do that a bottleneck cannot stand beside, by slash path."""

    def __missing__(self, path: str) -> LayerSpec:
        return self.blocks[path]

    def copy(self) -> TracedLayout:
        """The same layout, for changes."""
        return self | {}

    def __or__(self, other: Mapping[str, LayerSpec]) -> TracedLayout:  # type: ignore[override]
        """This layout with the layers of another; of both, what the traces did not find."""
        return _union(self, other)

    def __ror__(self, other: Mapping[str, LayerSpec]) -> TracedLayout:  # type: ignore[override]
        """The same, where the other is a plain dict."""
        return _union(other, self)

    def __ior__(self, other: Mapping[str, LayerSpec]) -> TracedLayout:  # type: ignore[override]
        """The same in place."""
        joined = _union(self, other)
        self.update(joined)
        vars(self).update(vars(joined))
        return self


def _union(*layouts: Mapping[str, LayerSpec]) -> TracedLayout:
    """The layers and notes of several layouts; the last wins."""
    joined = TracedLayout()
    for each in layouts:
        joined.update(each)
        if isinstance(each, TracedLayout):
            joined.unseen.update(each.unseen)
            joined.blocks.update(each.blocks)
            joined.refused.update(each.refused)
    return joined


def layout(apply: Callable[..., Any], params: Mapping[str, Any], *example: Any) -> TracedLayout:
    """The layers of a Flax model that can be adapted, by slash path.

    Args:
      apply: `model.apply` of a linen model, what `from_nnx` gave for an NNX model, or any function
        of `{"params": params}` and the example that calls one.
      params: the parameters, or their shapes.
      *example: inputs, or their shapes (`jax.ShapeDtypeStruct`).

    Returns:
      A `LayerSpec` for every Dense, DenseGeneral, Einsum, Conv and Embed that the trace calls (in
      NNX Linear, LinearGeneral, Einsum, Conv and Embed). Its `unseen` says of the model's
      other matrices why they cannot be adapted, and its `blocks` are the modules of several layers
      beside which a bottleneck can stand. A method under `nn.jit` that has run with these shapes
      before is not traced again, so its layers are not seen.

    Raises:
      ValueError: `apply` is an NNX model, or one inside linen has all the layers; or a scan slices
        the parameters along another axis than the first. This is detected by their shapes, so not
        for a kernel with as many rows as the scan has layers.

    >>> model = nn.Dense(3)
    >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))["params"]
    >>> layout(model.apply, params, jax.numpy.ones((1, 2)))[""].module
    'dense'
    """
    check_function(apply, name="layout")
    check_tree(params, name="layout")
    base = _base_shapes(params)
    calls = _Calls()

    def run(params: Any, *example: Any) -> Any:
        with nn.intercept_methods(calls.record_linen), watched(calls.watch):
            return apply({"params": params}, *example)

    jax.eval_shape(run, base, *example)
    layers = modules(base)
    found = TracedLayout()
    for path, traced in calls.traced.items():
        # A linen module inside an NNX model (nnx.bridge.ToNNX) has a path of its own.
        is_known = traced.spec.weight in layers.get(path, {})
        if is_known and path not in calls.unseen:
            found[path] = _stacked_spec(path, traced, layers, calls.views)
    found.unseen = _unseen(layers, found, calls.unseen)
    known = flatten(base).keys()
    for path, (view, block) in calls.blocks.items():
        # As above. A module that shares its scope with a layer has the layer's path.
        if path in found or not known >= {join(path, name) for name in view}:
            continue
        spec = _stacked_block(path, view, block, layers, calls.views)
        if isinstance(spec, LayerSpec):
            found.blocks[path] = spec
        else:
            found.refused[path] = spec
    if not found and calls.bridged:
        raise ValueError(
            f"{calls.bridged[0] or 'the model'} is an NNX model inside linen (nnx.bridge.ToLinen), "
            "whose layers cannot be seen; write apply, params = lft.from_nnx(model) with the NNX "
            "model itself"
        )
    return found


class _Calls:
    """What the calls of a model's layers say, recorded while it is traced."""

    def __init__(self) -> None:
        self.traced: dict[str, Traced] = {}
        self.unseen: dict[str, str] = {}
        """Why modules cannot be adapted, by slash path."""
        self.views: Views = {}
        """Of linen modules."""
        self.bridged: list[str] = []
        """The paths of NNX modules inside linen."""
        self.blocks: dict[str, tuple[View, Traced | str]] = {}
        """What modules that are no layers see, and what their calls say, by slash path."""
        self.running: list[nn.Module] = []
        self.watch = SeeCalls(self.called, self.unseen.__setitem__, self.called_block)

    def called(self, path: str, traced: Traced | None) -> None:
        """Record the call of a layer."""
        if traced is None:
            self.unseen[path] = "this form of the layer supports no adapter"
        else:
            self.traced[path] = traced

    def called_block(self, path: str, view: View, block: Traced | str) -> None:
        """Record the call of a module that is no layer."""
        _, before = self.blocks.get(path, (view, block))
        if isinstance(before, Traced) and before != block:
            block = "is called in several ways"
        self.blocks[path] = (view, block if isinstance(before, Traced) else before)

    def record_linen(
        self,
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        """The interceptor of linen's methods."""
        module = context.module
        path = "/".join(module.path)
        if context.method_name == "attend":
            # An adapter on the lookup would not change it.
            self.unseen[path] = "its table is an output head too (attend)"
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        view = _view(module)
        self.views.setdefault(path, []).append(view)
        if type(module) in intercept.MODULES:
            self.called(path, intercept.trace(module, args, kwargs))
            return next_fun(*args, **kwargs)
        if type(module).__module__.startswith("flax.nnx"):
            self.bridged.append(path)
            return next_fun(*args, **kwargs)
        with intercept.outermost(module, self.running) as is_outermost:
            output = next_fun(*args, **kwargs)
        if path and view and is_outermost:
            self.called_block(path, view, trace_block(args, kwargs, output))
        return output


def _unseen(
    layers: Mapping[str, Layer],
    found: Layout,
    reasons: Mapping[str, str],
) -> dict[str, str]:
    """Why the matrices that are not in the layout cannot be adapted; `reasons` are by module."""
    unseen = {}
    for path, layer in layers.items():
        if path in found:
            continue
        for name, leaf in layer.items():
            if len(leaf.shape) > 1:
                default = "no call of a layer that takes adapters uses it"
                unseen[join(path, name)] = reasons.get(path, default)
    return unseen


def _base_shapes(params: Mapping[str, Any]) -> Tree:
    """The shapes of the base's leaves; quantized kernels have those of the kernels."""
    leaves = flatten(nn.meta.unbox(params))
    shapes = {}
    for path, leaf in leaves.items():
        if is_base(path):
            shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return unflatten(shapes)


def _view(module: nn.Module) -> View:
    """The leaves that a module sees while it is traced."""
    params = module.variables.get("params", {})
    leaves = flatten(nn.meta.unbox(params))
    return {name: leaf.shape for name, leaf in leaves.items()}


def blocks_of(layout: Layout) -> Layout:
    """The modules of a layout that are no layers, beside which a bottleneck can stand."""
    return layout.blocks if isinstance(layout, TracedLayout) else {}


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
    traced: Traced,
    layers: Mapping[str, Layer],
    views: Views,
) -> LayerSpec:
    """The spec of the whole leaf, from that of the slice which the model sees inside its scans."""
    name = traced.spec.weight
    shape = layers[path][name].shape
    local = traced.shape
    n = len(shape) - len(local)  # scans that contain the module
    if shape[n:] != local:
        raise ValueError(
            f"{path}: its kernel {shape} is seen as {local} inside the model; lift modules over "
            'the first axis of their parameters (nn.scan(variable_axes={"params": 0}), '
            "nnx.scan(in_axes=0))"
        )
    return traced.spec.inside_scans(_scans(path, name, shape, n, layers, views))


def _stacked_block(
    path: str,
    view: View,
    traced: Traced | str,
    layers: Mapping[str, Layer],
    views: Views,
) -> LayerSpec | str:
    """The same for a module that is no layer, by the leaves in it; or why there is none."""
    if isinstance(traced, str):
        return traced
    stacks = set()
    for name, local in view.items():
        parent, _, leaf = join(path, name).rpartition("/")
        shape = layers[parent][leaf].shape
        n = len(shape) - len(local)
        if shape[n:] != local:
            return "is in a scan over another axis of its parameters than the first"
        stacks.add(shape[:n])
    if len(stacks) > 1:
        return "has parameters of which a scan slices some alone"
    (stack,) = stacks
    spec = traced.spec.inside_scans(_scans(path, name, shape, n, layers, views))
    return dataclasses.replace(spec, block_shape=stack + traced.shape)


def _scans(
    path: str,
    name: str,
    shape: Shape,
    n: int,
    layers: Mapping[str, Layer],
    views: Views,
) -> tuple[int, ...]:
    """For each of n scans that contain the module at `path`, its place in the path.

    Args:
      path: of the module.
      name: the path of a leaf in it.
      shape: of that leaf.
      n: how many scans slice it.
      layers: the leaves of all modules.
      views: of linen modules.
    """
    scanned = []
    for scan in range(n):
        # Each scan hides one axis of the leaf from what is inside it, the outermost first.
        axes_inside = len(shape) - 1 - scan
        if path in views:
            scanned.append(_scan_place(path, name, axes_inside, views))
        else:
            scanned.append(_stack_place(path, name, scan, layers))
    return tuple(scanned)


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
            if inner in view and len(view[inner]) <= ndim:
                return n
    return len(parts)


def _stack_place(path: str, name: str, axis: int, layers: Mapping[str, Layer]) -> int:
    """The same where modules have no path inside a scan, as in NNX: by what is stacked together.

    It is the length of the shortest prefix whose leaves all have the stack's axis, or of a longer
    one with the same leaves: of {encoder: {blocks: {up, down}}} the blocks.
    """
    parent, _, leaf = join(path, name).rpartition("/")
    size = layers[parent][leaf].shape[axis]
    parts = path.split("/")
    place, count = len(parts), 0
    for n in range(1, len(parts)):
        prefix = "/".join(parts[:n])
        leaves = flatten(_below(layers, prefix)).values()
        stacked = all(leaf.shape[axis : axis + 1] == (size,) for leaf in leaves)
        if stacked and count in (0, len(leaves)):
            place, count = n, len(leaves)
    return place


def _below(layers: Mapping[str, Layer], prefix: str) -> dict[str, Layer]:
    """The modules at or below a path."""
    return {path: layer for path, layer in layers.items() if f"{path}/".startswith(f"{prefix}/")}
