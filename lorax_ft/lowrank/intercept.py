"""How an ordinary linen model sees adapters: its layers' calls are intercepted, and `linear` answers.

The model's code knows nothing of it. A layer's product with A is the layer's own code run on A (a
clone with other features), so its dtype, precision, padding and `dot_general` are honored.
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

from lorax_ft.lowrank.linear import ADAPTER_LEAVES, Layer, column_norm, linear
from lorax_ft.lowrank.spec import Kind, LayerSpec, as_canonical
from lorax_ft.quant.kernels import Quantized, dense

Gather = Callable[[str, Quantized], Quantized]
Run = Callable[[dict[str, Any], str, Any, Array], Array]
"""The module's own code with other fields, on another kernel (or embedding) and an input."""

KINDS: dict[type[nn.Module], Kind] = {
    nn.Dense: "dense",
    nn.DenseGeneral: "general",
    nn.Einsum: "einsum",
    nn.Conv: "conv",
    nn.Embed: "embed",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What a trace saw of a layer inside its scans: its kernel's shape, the meaning of its axes, its equation."""

    spec: LayerSpec
    shape: tuple[int, ...]
    einsum: tuple[str, str, str] | None = None
    """The letters of the input, the kernel and the output."""


def adapt(
    apply: Callable[..., Any], *, gather: Gather = lambda path, kernel: kernel
) -> Callable[..., Any]:
    """A function like `apply` that sees the adapters in the parameters it is given.

    Args:
      apply: `model.apply` of a linen model, or any function that calls it. Jit the result, not the argument.
      gather: by a layer's path, its quantized kernel as it is to lie on a mesh before it is dequantized.

    Returns:
      The function; with no adapter in the parameters it computes what `apply` does.

    A magnitude whose norm was not computed beforehand (`with_norms`) gets it inside the layer.
    """

    def intercept(
        next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name != "__call__" or type(context.module) not in KINDS:
            return next_fun(*args, **kwargs)
        layer = nn.meta.unbox(context.module.variables.get("params", {}))
        if not ADAPTER_LEAVES & layer.keys() and not isinstance(layer.get("kernel"), Quantized):
            return next_fun(*args, **kwargs)
        traced = trace(context.module, args, kwargs)
        if traced is None:
            raise ValueError(
                f"{'/'.join(context.module.path)} has an adapter, but this form of the layer takes none"
            )
        run = functools.partial(_run, context.module, gather)
        return _adapted(context.module, traced, layer, args[0] if args else kwargs["inputs"], run)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return apply(*args, **kwargs)

    return adapted


def trace(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Traced | None:
    """What a module's call says of its kernel's axes; None where it is no layer that can be adapted."""
    kind = KINDS.get(type(module))
    if kind is None or not module.has_variable(
        "params", "embedding" if kind == "embed" else "kernel"
    ):
        return None
    shape = nn.meta.unbox(module.variables["params"])[
        "embedding" if kind == "embed" else "kernel"
    ].shape
    axes = tuple(range(len(shape)))
    n_in = len(axes) - 1
    if kind == "einsum":
        return _trace_einsum(module, shape, args, kwargs)
    if kind == "general":
        if module.batch_dims:
            return None
        n_in = 1 if isinstance(module.axis, int) else len(module.axis)
    if kind == "conv" and (module.feature_group_count != 1 or module.mask is not None):
        return None
    return Traced(
        spec=LayerSpec(kind=kind, stack=(), ins=axes[:n_in], outs=axes[n_in:]), shape=shape
    )


def _adapted(module: nn.Module, traced: Traced, layer: Layer, x: Array, run: Run) -> Array:
    """The layer's output by `linear`."""
    spec = traced.spec
    name = "embedding" if spec.kind == "embed" else "kernel"
    own_order, layer = layer[name], as_canonical(layer, spec)
    if "magnitude" in layer and "norm" not in layer:
        layer["norm"] = column_norm(layer)
    layer["kernel"] = own_order
    if "bias" in layer:  # the layer's output has the type of input, kernel and bias together
        quantized = isinstance(own_order, Quantized)
        kernel = jnp.zeros((), own_order.dtype) if quantized else own_order
        x, kernel, layer["bias"] = module.promote_dtype(
            x, kernel, layer["bias"], dtype=module.dtype
        )
        layer["kernel"] = own_order if quantized else kernel
    if traced.einsum is not None:
        return _adapted_einsum(module, traced, layer, x, run)

    def dot(x: Array, kernel: Array) -> Array:
        features = kernel.shape[len(spec.ins) :]
        fields: dict[str, Any] = {"features": features if spec.kind == "general" else features[0]}
        return run(fields, name, kernel, x)

    return linear(layer, x, dot, precision=getattr(module, "precision", None))


def _adapted_einsum(module: nn.Module, traced: Traced, layer: Layer, x: Array, run: Run) -> Array:
    """`linear` on an output of axes (rest, batch, out), which are put in the equation's order at the end."""
    assert traced.einsum is not None
    lhs, letters, result = traced.einsum
    batch, ins, outs = (
        "".join(letters[i] for i in axes)
        for axes in (traced.spec.stack, traced.spec.ins, traced.spec.outs)
    )
    rest = "".join(c for c in result if c not in letters)
    rank = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in lhs + letters + result)

    def dot(x: Array, kernel: Array) -> Array:
        if kernel is layer["kernel"]:
            y = run({"einsum_str": f"{lhs},{letters}->{result}"}, "kernel", kernel, x)
            return jnp.einsum(f"{result}->{rest}{batch}{outs}", y)
        equation = f"{lhs},{batch}{ins}{rank}->{rest}{batch}{rank}"
        return run({"einsum_str": equation, "shape": kernel.shape}, "kernel", kernel, x)

    if "bias" in layer:
        ordered = "".join(c for c in result if c in letters)
        layer["bias"] = jnp.einsum(f"{ordered}->{batch}{outs}", layer["bias"])
    return jnp.einsum(
        f"{rest}{batch}{outs}->{result}", linear(layer, x, dot, precision=module.precision)
    )


def _run(
    module: nn.Module,
    gather: Gather,
    fields: dict[str, Any],
    name: str,
    kernel: Array | Quantized,
    x: Array,
) -> Array:
    """The module's own code on another kernel, without its bias."""
    if name == "kernel":
        fields = fields | {"use_bias": False}

    def run(kernel: Array | Quantized, x: Array) -> Array:
        if isinstance(kernel, Quantized):
            kernel = dense(gather("/".join(module.path), kernel))
        y: Array = module.clone(parent=None, name=None, **fields).apply(
            {"params": {name: kernel}}, x
        )  # type: ignore
        return y

    # A kernel is dequantized again for the backward pass, or those of all layers would be kept for it.
    return jax.checkpoint(run)(kernel, x) if isinstance(kernel, Quantized) else run(kernel, x)


def _trace_einsum(
    module: nn.Module, shape: tuple[int, ...], args: Any, kwargs: Mapping[str, Any]
) -> Traced | None:
    equation = (args[1] if len(args) > 1 else kwargs.get("einsum_str")) or module.einsum_str
    lhs, _, rest = equation.replace(" ", "").partition(",")
    letters, _, result = rest.partition("->")
    x = args[0] if args else kwargs["inputs"]
    if "..." in letters or len(letters) != len(shape):
        return None
    if "..." in lhs:  # spell the ellipsis out
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in lhs + letters + result]
        spelled = "".join(free[: x.ndim - len(lhs.replace("...", ""))])
        lhs, result = lhs.replace("...", spelled), result.replace("...", spelled)
    axes = {c: i for i, c in enumerate(letters)}
    if any(c not in lhs and c not in result for c in letters):
        return None
    batch = tuple(i for c, i in axes.items() if c in lhs and c in result)
    ins = tuple(i for c, i in axes.items() if c in lhs and c not in result)
    outs = tuple(i for c, i in axes.items() if c not in lhs)
    spec = LayerSpec(kind="einsum", stack=batch, ins=ins, outs=outs, experts=len(batch))
    return Traced(spec=spec, shape=shape, einsum=(lhs, letters, result))
