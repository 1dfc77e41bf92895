"""One call of an adapted layer, in any framework: its product goes to `linear`.

A layer's product with A is the layer's own code run on A, so its dtype, precision, padding and
`dot_general` are honored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.experts import Grouped
from lorax_ft.lowrank.linear import linear
from lorax_ft.lowrank.spec import LayerSpec, Module, as_canonical
from lorax_ft.lowrank.terms import bias, magnitude
from lorax_ft.mesh_axes import in_auto_axes
from lorax_ft.quant.kernels import Quantized, dense
from lorax_ft.tree import Layer, Shape

Gather = Callable[[str, Quantized], Quantized]
Run = Callable[[dict[str, Any], Any, Array], Array]
"""The layer's own code, with other fields and another kernel (or embedding), on an input."""
Promote = Callable[[Array, Array, Array], tuple[Array, Array, Array]]

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What a trace sees of a layer inside its scans."""

    spec: LayerSpec
    shape: Shape
    """The kernel's."""
    einsum: tuple[str, str, str] | None = None
    """The letters of the input, the kernel and the output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A call of a layer of the model."""

    path: str
    traced: Traced
    run: Run
    promote: Promote
    """Input, kernel and bias in the dtype that the layer promotes the three to."""
    gather: Gather
    precision: Any = None
    grouped: Grouped | None = None
    """The experts of the rows, for a layer of experts."""

    def output(self, layer: Layer, x: Array) -> Array:
        """The layer's output by `linear`.

        Args:
          layer: its leaves, with the axes that a call inside its scans sees.
          x: its input.
        """
        return in_auto_axes(self._output, layer, x, like=self._own_product)

    def _own_product(self, layer: Layer, x: Array) -> Array:
        """The layer's product with its own kernel."""
        fields = {}
        if self.traced.einsum is not None:
            lhs, letters, result = self.traced.einsum
            fields["einsum_str"] = f"{lhs},{letters}->{result}"
        return self.run(fields, layer[self.traced.spec.weight], x)

    def _output(self, layer: Layer, x: Array) -> Array:
        spec = self.traced.spec
        own_kernel = layer[spec.weight]
        # DoRA's norm is computed from the kernel in canonical order.
        canonical = as_canonical(layer, spec)
        layer = magnitude.with_norm(canonical)
        first_in = len(spec.stack)
        first_out = first_in + len(spec.ins)
        in_shape = tuple(layer["kernel"].shape[first_in:first_out])
        out_shape = tuple(layer["kernel"].shape[first_out:])
        # The layer's own code expects the kernel in its own order of axes.
        layer["kernel"] = own_kernel
        if bias.BIAS in layer:
            x, layer = self._promoted(x, layer)

        def weights(kernel: Array | Quantized) -> Array:
            if isinstance(kernel, Quantized):
                kernel = self.gather(self.path, kernel)
            w = spec.canonical("kernel", dense(kernel))
            return w.reshape(*w.shape[:first_out], -1)

        compute = functools.partial(
            linear, in_shape=in_shape, out_shape=out_shape, weights=weights, grouped=self.grouped
        )
        if self.traced.einsum is not None:
            return self._einsum(layer, x, compute)

        def dot(x: Array, kernel: Array) -> Array:
            features = kernel.shape[len(spec.ins) :]
            if spec.module == "general":
                return self.run({"features": features}, kernel, x)
            # The other layers have one out axis, and want its size as a number.
            return self.run({"features": features[-1]}, kernel, x)

        return compute(layer, x, dot, precision=self.precision)

    def _promoted(self, x: Array, layer: Layer) -> tuple[Array, Layer]:
        """The input, and the layer with promoted kernel and bias."""
        kernel = layer["kernel"]
        quantized = isinstance(kernel, Quantized)
        # A quantized kernel takes part with its dtype alone.
        stand_in = jnp.zeros((), kernel.dtype) if quantized else kernel
        x, stand_in, promoted_bias = self.promote(x, stand_in, layer[bias.BIAS])
        promoted = layer | {bias.BIAS: promoted_bias}
        if not quantized:
            promoted["kernel"] = stand_in
        return x, promoted

    def _einsum(self, layer: Layer, x: Array, compute: Callable[..., Array]) -> Array:
        """`compute`, which is `linear`, on output axes (rest, batch, out), then the equation's."""
        assert self.traced.einsum is not None
        lhs, letters, result = self.traced.einsum
        batch = _letters(letters, self.traced.spec.stack)
        ins = _letters(letters, self.traced.spec.ins)
        outs = _letters(letters, self.traced.spec.outs)
        rest = "".join(letter for letter in result if letter not in letters)
        # The rank's letter must not be one of the equation's.
        used = lhs + letters + result
        rank = next(letter for letter in LETTERS if letter not in used)
        own_order = f"{rest}{batch}{outs}"
        own_kernel = layer["kernel"]

        def dot(x: Array, kernel: Array) -> Array:
            if kernel is own_kernel:
                equation = f"{lhs},{letters}->{result}"
                y = self.run({"einsum_str": equation}, kernel, x)
                return jnp.einsum(f"{result}->{own_order}", y)
            # A has the kernel's in axes and the rank in place of its out axes.
            equation = f"{lhs},{batch}{ins}{rank}->{rest}{batch}{rank}"
            fields = {"einsum_str": equation, "shape": kernel.shape}
            return self.run(fields, kernel, x)

        y = compute(layer, x, dot, precision=self.precision)
        return jnp.einsum(f"{own_order}->{result}", y)


def trace_axes(layer_type: Module, shape: Shape, *, n_in: int) -> Traced:
    """A layer whose kernel has its in axes first, and then its out axes."""
    axes = tuple(range(len(shape)))
    spec = LayerSpec(module=layer_type, stack=(), ins=axes[:n_in], outs=axes[n_in:])
    return Traced(spec=spec, shape=shape)


def arrays_of(args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arrays with axes among a call's arguments, in their order."""
    try:
        leaves = jax.tree.leaves((args, list(kwargs.values())))
    except ValueError:  # keys of a dict that cannot be sorted
        return []
    # Keys of random numbers have no axes, and `nn.remat` makes arrays of numbers.
    return [leaf for leaf in leaves if isinstance(leaf, Array | np.ndarray) and leaf.ndim]


def block_input(args: Any, kwargs: Mapping[str, Any], y: Array) -> Array:
    """The array that a bottleneck beside a module takes: the one of its output's shape.

    Raises:
      ValueError: several arrays have it, which the trace of the layout has not seen.
    """
    inputs = [x for x in arrays_of(args, kwargs) if x.shape == y.shape]
    if len(inputs) != 1:
        raise ValueError(
            f"a module with a bottleneck beside it is called with {len(inputs)} arrays of its "
            f"output's shape {y.shape}; one of them alone must be its input"
        )
    return inputs[0]


def trace_block(args: Any, kwargs: Mapping[str, Any], output: Any) -> Traced | str:
    """What a call says of a module that is no layer; or why no bottleneck can stand beside it."""
    inputs = arrays_of(args, kwargs)
    if len(inputs) != 1:
        return f"is called with {len(inputs)} arrays, not one"
    if not isinstance(output, Array):
        return f"gives a {type(output).__name__}, not one array"
    (x,) = inputs
    if x.shape != output.shape:
        return f"gives {output.shape} of {x.shape}, not an array of the same shape"
    shape = (x.shape[-1], x.shape[-1])
    spec = LayerSpec(module="block", stack=(), ins=(0,), outs=(1,), by_name=True)
    return Traced(spec=spec, shape=shape)


def trace_einsum(equation: str, shape: Shape, *, ndim: int) -> Traced | None:
    """The axes of an einsum's kernel by its equation, whose ellipses are spelled out.

    Args:
      equation: of the input and the kernel.
      shape: the kernel's.
      ndim: how many axes the input has.

    Returns:
      None where no adapter can be added to such a kernel.
    """
    equation = equation.replace(" ", "")
    lhs, _, rest = equation.partition(",")
    letters, _, result = rest.partition("->")
    if "..." in letters or len(letters) != len(shape):
        return None
    if "..." in lhs:
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
        # Flax's bias has the kernel's letters in the order of the result.
        bias_axes=tuple(letters.index(letter) for letter in result if letter in letters),
    )
    return Traced(spec=spec, shape=shape, einsum=(lhs, letters, result))


def _letters(letters: str, axes: tuple[int, ...]) -> str:
    """The letters of some axes."""
    return "".join(letters[axis] for axis in axes)


def _ellipsis_letters(lhs: str, used: str, ndim: int) -> str:
    """Unused letters for the axes that the ellipsis of an input with `ndim` axes stands for."""
    named = lhs.replace("...", "")
    missing = ndim - len(named)
    free = [letter for letter in LETTERS.upper() if letter not in used]
    return "".join(free[:missing])
