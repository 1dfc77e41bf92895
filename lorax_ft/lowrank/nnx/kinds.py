"""The layers of NNX that can be adapted: where their weight is, and their own code on another one.

Letters as in `lorax_ft.lowrank.layer_call`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array

from lorax_ft.lowrank.layer_call import Gather, LayerCall, Traced, trace_axes, trace_einsum
from lorax_ft.lowrank.spec import BIAS, EMBEDDING, KERNEL, Module
from lorax_ft.mesh_axes import all_axes_are_auto
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.tree import Shape


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a class of NNX modules is."""

    module: Module
    """The linen module that computes the same."""
    attribute: str
    """The name of the `nnx.Param` that holds its weight."""

    @property
    def weight(self) -> str:
        """The name of the weight in the tree of parameters."""
        return EMBEDDING if self.module == "embed" else KERNEL


KINDS: dict[type[nnx.Module], Kind] = {
    nnx.Linear: Kind("dense", "kernel"),
    nnx.LinearGeneral: Kind("general", "kernel"),
    nnx.Einsum: Kind("einsum", "kernel"),
    nnx.Conv: Kind("conv", "kernel"),
    nnx.Embed: Kind("embed", "embedding"),
}


def kind_of(module: nnx.Module, kinds: Mapping[type[nnx.Module], Kind]) -> Kind | None:
    """The kind of a module: that of a class in `kinds` whose `__call__` it has."""
    for cls, kind in kinds.items():
        same_call = isinstance(module, cls) and own_method(type(module)) is own_method(cls)
        # Some make a frozen weight a variable of another class.
        if same_call and isinstance(vars(module)[kind.attribute], nnx.Param):
            return kind
    return None


OWN = "lorax_ft_own"
"""The attribute of a method in place of a class's own (`hooks.hooked`) that holds its own."""


def own_method(cls: type, name: str = "__call__") -> Any:
    """The method that a class has or inherits, as it lies in the class, also while it is hooked."""
    method = inspect.getattr_static(cls, name)
    return getattr(method, OWN, method)


def own_call(module: nnx.Module, cls: type | None = None) -> Any:
    """The bound `__call__` of a module without its hook: that of its class, or of a base class."""
    method = own_method(cls or type(module))
    return method.__get__(module, type(module)) if hasattr(method, "__get__") else method


def trace(module: Any, kind: Kind, x: Array, extra: Mapping[str, Any]) -> Traced | None:
    """What a module's call says of its kernel's axes; None where no adapter can be added to it.

    Args:
      module: the module.
      kind: its kind.
      x: the call's input.
      extra: the call's other arguments.
    """
    shape: Shape = getattr(module, kind.attribute).get_value().shape
    bias = getattr(module, BIAS, None)
    if kind.module == "einsum":
        equation = extra.get("einsum_str") or module.einsum_str
        traced = trace_einsum(equation, shape, ndim=x.ndim)
        if traced is None or bias is None:
            return traced
        assert traced.spec.bias_axes is not None
        # nnx.Einsum takes a bias of any shape with as many elements.
        expected = tuple(shape[axis] for axis in traced.spec.bias_axes)
        return traced if bias.get_value().shape == expected else None
    n_in = len(shape) - 1
    if kind.module == "general":
        if module.batch_axis:
            return None
        n_in = len(module.in_features)
    if kind.module == "conv" and (module.feature_group_count != 1 or module.mask is not None):
        return None
    return trace_axes(kind.module, shape, n_in=n_in)


def bound(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
    """The input of a layer's call, which is its first argument, and the others by name.

    Args:
      call: the class's `__call__`, with self bound.
      args: the call's arguments.
      kwargs: the same.
    """
    arguments = dict(inspect.signature(call).bind(*args, **kwargs).arguments)
    first = next(iter(arguments))
    return arguments.pop(first), arguments


def layer_call(
    module: Any,
    kind: Kind,
    traced: Traced,
    extra: Mapping[str, Any],
    *,
    path: str,
    gather: Gather,
) -> LayerCall:
    """A call of the module, with `extra` as its arguments beside the input."""
    graphdef, state = nnx.split(module)
    dtype = getattr(module, "dtype", None)
    own_promote = getattr(module, "promote_dtype", promote_dtype)

    def on_kernel(fields: dict[str, Any], kernel: Array | Quantized, x: Array) -> Array:
        if isinstance(kernel, Quantized):
            kernel = dense(gather(path, kernel))
        clone: Any = nnx.merge(graphdef, state)
        variable = getattr(clone, kind.attribute)
        setattr(clone, kind.attribute, variable.replace(kernel))
        _set_fields(clone, fields)
        arguments = dict(extra)
        arguments.pop("einsum_str", None)
        if kernel.shape != traced.shape or all_axes_are_auto():
            # It is the sharding of the output of the layer's own kernel, on Explicit axes.
            arguments.pop("out_sharding", None)
        y: Array = own_call(clone)(x, **arguments)
        return y

    def run(fields: dict[str, Any], kernel: Array | Quantized, x: Array) -> Array:
        if not isinstance(kernel, Quantized):
            return on_kernel(fields, kernel, x)
        # Dequantize again for the backward pass, or the kernels of all layers would be kept for it.
        return jax.checkpoint(lambda kernel, x: on_kernel(fields, kernel, x))(kernel, x)

    def promote(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array, Array]:
        promoted: tuple[Array, Array, Array] = own_promote((x, kernel, bias), dtype=dtype)
        return promoted

    return LayerCall(
        path=path,
        traced=traced,
        run=run,
        promote=promote,
        gather=gather,
        precision=getattr(module, "precision", None),
    )


def _set_fields(clone: Any, fields: Mapping[str, Any]) -> None:
    """Make a module compute its product alone, with these of linen's fields."""
    if hasattr(clone, BIAS):
        clone.bias = nnx.data(None)
    if hasattr(clone, "use_bias"):
        clone.use_bias = False
    if "einsum_str" in fields:
        clone.einsum_str = fields["einsum_str"]
    if "features" in fields and hasattr(clone, "features"):
        clone.features = fields["features"]
