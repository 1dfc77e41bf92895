"""How an ordinary linen model sees adapters: its layers' calls are intercepted and go to `linear`.

The model's code does not change. A layer's product with A is the layer's own code run on A (a clone
with other features), so its dtype, precision, padding and `dot_general` are honored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from lorax_ft.lowrank.experts import ExpertDense, Grouped, Rows
from lorax_ft.lowrank.layer_call import (
    Gather,
    LayerCall,
    Promote,
    Run,
    Traced,
    block_input,
    trace_axes,
    trace_einsum,
)
from lorax_ft.lowrank.shared import shared_leaves, with_shared
from lorax_ft.lowrank.spec import LayerSpec, Module
from lorax_ft.lowrank.terms import bottleneck, check_layer, is_adapted
from lorax_ft.lowrank.watch import SeeAdapters, check_function, watched
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.soft_prompts.door import VirtualTokens, pass_door
from lorax_ft.tree import Layer

MODULES: dict[type[nn.Module], Module] = {
    nn.Dense: "dense",
    nn.DenseGeneral: "general",
    nn.Einsum: "einsum",
    ExpertDense: "experts",
    nn.Conv: "conv",
    nn.Embed: "embed",
}


def adapt(
    apply: Callable[..., Any],
    *,
    gather: Gather = lambda path, kernel: kernel,
) -> Callable[..., Any]:
    """A function like `apply` that sees the adapters in the parameters it is given.

    Args:
      apply: `model.apply` of a linen model, what `from_nnx` gave for an NNX model, or any function
        that calls one. Jit the result, not the argument.
      gather: (path, quantized kernel) -> that kernel placed on the mesh as it should be when it is
        dequantized.

    Returns:
      The function. Without adapters in the parameters it computes what `apply` does.

    Raises:
      ValueError: `apply` is an NNX model.

    A magnitude whose norm was not computed beforehand (`with_norms`) gets it inside the layer.
    """
    check_function(apply, name="adapt")

    def intercept(
        shared: Layer,
        running: list[nn.Module],
        layers: set[tuple[str, ...]],
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if not module.path:
            # The model itself, whose tree has the leaves that all layers share, or a layer's clone.
            shared.update(shared_leaves(module.variables.get("params", {})))
        if context.method_name == "__call__" and isinstance(module, VirtualTokens):
            numbers, *arrays = args
            return pass_door(dict(module.variables.get("params", {})), numbers, tuple(arrays))
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        boxed = module.variables.get("params", {})
        if type(module) not in MODULES:
            with outermost(module, running) as is_outermost:
                y = next_fun(*args, **kwargs)
            # A layer that shares its scope with this module has taken its leaves.
            if not is_outermost or bottleneck.ACTIVE not in boxed or module.path in layers:
                return y
            layer = dict(boxed)
            check_layer(layer, "/".join(module.path))
            return bottleneck.with_bottleneck(layer, block_input(args, kwargs, y), y)
        layers.add(module.path)
        layer = nn.meta.unbox(boxed)
        if not is_adapted(layer) and not isinstance(layer.get("kernel"), Quantized):
            return next_fun(*args, **kwargs)
        traced = trace(module, args, kwargs)
        if traced is None:
            path = "/".join(module.path)
            raise ValueError(f"{path} has an adapter, but this form of the layer supports none")
        check_layer(layer, "/".join(module.path))
        layer = with_shared(layer, shared, traced.spec, traced.shape)
        x, *others = args or (_input_of(args, kwargs),)
        grouped = None
        run: Run = functools.partial(_run_module, module, gather, traced.spec.weight)
        if isinstance(module, ExpertDense):
            (rows,) = others
            grouped = Grouped(rows, module.product)
            run = functools.partial(_run_experts, module, gather, grouped)
        call = LayerCall(
            path="/".join(module.path),
            traced=traced,
            run=run,
            promote=_promotion(module),
            gather=gather,
            precision=getattr(module, "precision", None),
            grouped=grouped,
        )
        return call.output(layer, x)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        # Those of each call, which the model fills before any of its layers reads them.
        own = functools.partial(intercept, {}, [], set())
        with nn.intercept_methods(own), watched(SeeAdapters(gather)):
            return apply(*args, **kwargs)

    return adapted


@contextlib.contextmanager
def outermost(module: nn.Module, running: list[nn.Module]) -> Iterator[bool]:
    """Inside, a call of a module runs; whether it is in no other of the same, as by `super()`."""
    is_outermost = not any(other is module for other in running)
    running.append(module)
    try:
        yield is_outermost
    finally:
        running.pop()


def trace(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Traced | None:
    """What a module's call says of its kernel's axes; None where no adapter can be added to it."""
    layer_type = MODULES.get(type(module))
    if layer_type is None:
        return None
    weight = LayerSpec(module=layer_type, stack=(), ins=(), outs=()).weight
    if not module.has_variable("params", weight):
        return None
    shape = nn.meta.unbox(module.variables["params"])[weight].shape
    if layer_type == "einsum":
        given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        equation = given or module.einsum_str
        return trace_einsum(equation, shape, ndim=_input_of(args, kwargs).ndim)
    n_in = len(shape) - 1
    if layer_type == "general":
        if module.batch_dims:
            return None
        n_in = 1 if isinstance(module.axis, int) else len(module.axis)
    if layer_type == "conv" and (module.feature_group_count != 1 or module.mask is not None):
        return None
    if layer_type == "experts":
        spec = LayerSpec(module="experts", stack=(0,), ins=(1,), outs=(2,), experts=1)
        return Traced(spec=spec, shape=shape)
    return trace_axes(layer_type, shape, n_in=n_in)


def _input_of(args: Any, kwargs: Mapping[str, Any]) -> Array:
    return args[0] if args else kwargs["inputs"]


def _promotion(module: nn.Module) -> Promote:
    """How a module promotes its input, kernel and bias."""

    def promote(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array, Array]:
        promoted: tuple[Array, Array, Array] = module.promote_dtype(
            x, kernel, bias, dtype=module.dtype
        )
        return promoted

    return promote


def _run_module(
    module: nn.Module,
    gather: Gather,
    weight: str,
    fields: dict[str, Any],
    kernel: Array | Quantized,
    x: Array,
) -> Array:
    """The module's own code on another kernel, without its bias."""
    if weight == "kernel":
        fields = fields | {"use_bias": False}

    def run(kernel: Array | Quantized, x: Array) -> Array:
        if isinstance(kernel, Quantized):
            path = "/".join(module.path)
            kernel = dense(gather(path, kernel))
        clone = module.clone(parent=None, name=None, **fields)
        y: Array = clone.apply({"params": {weight: kernel}}, x)  # type: ignore[assignment]
        return y

    if not isinstance(kernel, Quantized):
        return run(kernel, x)
    # Dequantize again for the backward pass, or the kernels of all layers would be kept for it.
    return jax.checkpoint(run)(kernel, x)


def _run_experts(
    module: ExpertDense,
    gather: Gather,
    grouped: Grouped,
    fields: dict[str, Any],
    kernel: Array | Quantized,
    x: Array,
) -> Array:
    """The same of experts, whose product dequantizes kernels itself, one at a time if it can."""
    rows, product = grouped
    if not isinstance(kernel, Quantized):
        clone = module.clone(parent=None, name=None, use_bias=False, **fields)
        y: Array = clone.apply({"params": {"kernel": kernel}}, x, rows)  # type: ignore[assignment]
        return y

    def multiply(kernel: Quantized, x: Array, rows: Rows) -> Array:
        kernel = gather("/".join(module.path), kernel)
        return product(x.astype(kernel.dtype), kernel, rows)

    # As in `_run_module`.
    return jax.checkpoint(multiply)(kernel, x, rows)
