"""How an ordinary linen model sees adapters: its layers' calls are intercepted and go to `linear`.

The model's code does not change. A layer's product with A is the layer's own code run on A (a clone
with other features), so its dtype, precision, padding and `dot_general` are honored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.experts import ExpertDense, Grouped, Rows
from lorax_ft.lowrank.linear import linear
from lorax_ft.lowrank.shared import shared_leaves, with_shared
from lorax_ft.lowrank.spec import LayerSpec, Module, as_canonical
from lorax_ft.lowrank.terms import bias, check_layer, is_adapted, magnitude
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.soft_prompts.door import VirtualTokens, pass_door
from lorax_ft.tree import Layer, Shape

Gather = Callable[[str, Quantized], Quantized]
Run = Callable[[dict[str, Any], Any, Array], Array]
"""The module's own code, with other fields and another kernel (or embedding), on an input."""

MODULES: dict[type[nn.Module], Module] = {
    nn.Dense: "dense",
    nn.DenseGeneral: "general",
    nn.Einsum: "einsum",
    ExpertDense: "experts",
    nn.Conv: "conv",
    nn.Embed: "embed",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What a trace sees of a layer inside its scans."""

    spec: LayerSpec
    shape: Shape
    """The kernel's."""
    einsum: tuple[str, str, str] | None = None
    """The letters of the input, the kernel and the output."""


def adapt(
    apply: Callable[..., Any],
    *,
    gather: Gather = lambda path, kernel: kernel,
) -> Callable[..., Any]:
    """A function like `apply` that sees the adapters in the parameters it is given.

    Args:
      apply: `model.apply` of a linen model, or any function that calls it. Jit the result, not the
        argument.
      gather: (path, quantized kernel) -> that kernel placed on the mesh as it should be when it is
        dequantized.

    Returns:
      The function. Without adapters in the parameters it computes what `apply` does.

    A magnitude whose norm was not computed beforehand (`with_norms`) gets it inside the layer.
    """

    def intercept(
        shared: Layer,
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
        if context.method_name != "__call__" or type(module) not in MODULES:
            return next_fun(*args, **kwargs)
        boxed = module.variables.get("params", {})
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
        if isinstance(module, ExpertDense):
            (rows,) = others
            grouped = Grouped(rows, module.product)
            run = functools.partial(_run_experts, module, gather, grouped)
            return _adapted_call(module, traced, layer, x, run, gather, grouped=grouped)
        run = functools.partial(_run_module, module, gather, traced.spec.weight)
        return _adapted_call(module, traced, layer, x, run, gather)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        # A dict for each call, which the model fills before any of its layers reads it.
        with nn.intercept_methods(functools.partial(intercept, {})):
            return apply(*args, **kwargs)

    return adapted


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
        return _trace_einsum(module, shape, args, kwargs)
    n_in = len(shape) - 1
    if layer_type == "general":
        if module.batch_dims:
            return None
        n_in = 1 if isinstance(module.axis, int) else len(module.axis)
    if layer_type == "conv" and (module.feature_group_count != 1 or module.mask is not None):
        return None
    axes = tuple(range(len(shape)))
    if layer_type == "experts":
        spec = LayerSpec(module="experts", stack=(0,), ins=(1,), outs=(2,), experts=1)
        return Traced(spec=spec, shape=shape)
    spec = LayerSpec(module=layer_type, stack=(), ins=axes[:n_in], outs=axes[n_in:])
    return Traced(spec=spec, shape=shape)


def _input_of(args: Any, kwargs: Mapping[str, Any]) -> Array:
    return args[0] if args else kwargs["inputs"]


def _adapted_call(
    module: nn.Module,
    traced: Traced,
    layer: Layer,
    x: Array,
    run: Run,
    gather: Gather,
    *,
    grouped: Grouped | None = None,
) -> Array:
    """The layer's output by `linear`."""
    spec = traced.spec
    own_kernel = layer[spec.weight]
    # DoRA's norm is computed from the kernel in canonical order.
    canonical = as_canonical(layer, spec)
    layer = magnitude.with_norm(canonical)
    first_in = len(spec.stack)
    first_out = first_in + len(spec.ins)
    in_shape = tuple(layer["kernel"].shape[first_in:first_out])
    out_shape = tuple(layer["kernel"].shape[first_out:])
    # The module's own code expects the kernel in its own order of axes.
    layer["kernel"] = own_kernel
    if bias.BIAS in layer:
        x, layer = _promoted(module, x, layer)

    def weights(kernel: Array | Quantized) -> Array:
        if isinstance(kernel, Quantized):
            path = "/".join(module.path)
            kernel = gather(path, kernel)
        w = spec.canonical("kernel", dense(kernel))
        return w.reshape(*w.shape[:first_out], -1)

    compute = functools.partial(
        linear, in_shape=in_shape, out_shape=out_shape, weights=weights, grouped=grouped
    )
    if traced.einsum is not None:
        return _adapted_einsum(module, traced, layer, x, run, compute)

    def dot(x: Array, kernel: Array) -> Array:
        features = kernel.shape[len(spec.ins) :]
        if spec.module == "general":
            return run({"features": features}, kernel, x)
        # The other modules have one out axis, and want its size as a number.
        return run({"features": features[-1]}, kernel, x)

    return compute(layer, x, dot, precision=getattr(module, "precision", None))


def _promoted(module: nn.Module, x: Array, layer: Layer) -> tuple[Array, Layer]:
    """Input, kernel and bias in the dtype that linen promotes the three to."""
    kernel = layer["kernel"]
    quantized = isinstance(kernel, Quantized)
    # A quantized kernel takes part with its dtype alone.
    stand_in = jnp.zeros((), kernel.dtype) if quantized else kernel
    x, stand_in, promoted_bias = module.promote_dtype(
        x, stand_in, layer[bias.BIAS], dtype=module.dtype
    )
    promoted = layer | {bias.BIAS: promoted_bias}
    if not quantized:
        promoted["kernel"] = stand_in
    return x, promoted


def _adapted_einsum(
    module: nn.Module,
    traced: Traced,
    layer: Layer,
    x: Array,
    run: Run,
    compute: Callable[..., Array],
) -> Array:
    """`compute`, which is `linear`, on output axes (rest, batch, out), and then the equation's."""
    assert traced.einsum is not None
    lhs, letters, result = traced.einsum
    batch = _letters(letters, traced.spec.stack)
    ins = _letters(letters, traced.spec.ins)
    outs = _letters(letters, traced.spec.outs)
    rest = "".join(letter for letter in result if letter not in letters)
    # The rank's letter must not be one of the equation's.
    used = lhs + letters + result
    rank = next(letter for letter in LETTERS if letter not in used)
    own_order = f"{rest}{batch}{outs}"
    own_kernel = layer["kernel"]

    def dot(x: Array, kernel: Array) -> Array:
        if kernel is own_kernel:
            equation = f"{lhs},{letters}->{result}"
            y = run({"einsum_str": equation}, kernel, x)
            return jnp.einsum(f"{result}->{own_order}", y)
        # A has the kernel's in axes and the rank in place of its out axes.
        equation = f"{lhs},{batch}{ins}{rank}->{rest}{batch}{rank}"
        fields = {"einsum_str": equation, "shape": kernel.shape}
        return run(fields, kernel, x)

    y = compute(layer, x, dot, precision=module.precision)
    return jnp.einsum(f"{own_order}->{result}", y)


def _letters(letters: str, axes: tuple[int, ...]) -> str:
    """The letters of some axes."""
    return "".join(letters[axis] for axis in axes)


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


def _trace_einsum(
    module: nn.Module,
    shape: Shape,
    args: Any,
    kwargs: Mapping[str, Any],
) -> Traced | None:
    """The axes of an einsum's kernel by its equation, whose ellipses are spelled out."""
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    equation = (given or module.einsum_str).replace(" ", "")
    lhs, _, rest = equation.partition(",")
    letters, _, result = rest.partition("->")
    if "..." in letters or len(letters) != len(shape):
        return None
    if "..." in lhs:
        ndim = _input_of(args, kwargs).ndim
        ellipsis = _ellipsis_letters(lhs, lhs + letters + result, ndim)
        lhs = lhs.replace("...", ellipsis)
        result = result.replace("...", ellipsis)
    batch = []
    ins = []
    outs = []
    for axis, letter in enumerate(letters):
        if letter not in lhs and letter not in result:
            return None
        if letter not in lhs:
            outs.append(axis)
        elif letter in result:
            batch.append(axis)
        else:
            ins.append(axis)
    spec = LayerSpec(
        module="einsum",
        stack=tuple(batch),
        ins=tuple(ins),
        outs=tuple(outs),
        experts=len(batch),
        # linen's bias has the kernel's letters in the order of the result.
        bias_axes=tuple(letters.index(letter) for letter in result if letter in letters),
    )
    return Traced(spec=spec, shape=shape, einsum=(lhs, letters, result))


def _ellipsis_letters(lhs: str, used: str, ndim: int) -> str:
    """Unused letters for the axes that the ellipsis of an input with `ndim` axes stands for."""
    named = lhs.replace("...", "")
    missing = ndim - len(named)
    free = [letter for letter in LETTERS.upper() if letter not in used]
    return "".join(free[:missing])
