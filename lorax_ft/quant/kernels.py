"""What may stand where a kernel does: an array, or one of the quantized leaves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
from jax import Array

from lorax_ft.quant import int8, nf4
from lorax_ft.quant.double import DoubleQuantized, double
from lorax_ft.quant.int8 import Int8
from lorax_ft.quant.nf4 import NF4

Format = Literal["nf4", "int8"]
Quantized = NF4 | Int8


def dense(kernel: Array | Quantized, dtype: Any = None) -> Array:
    """The kernel as an array, of `dtype` or of its own."""
    if isinstance(kernel, Quantized):
        return kernel.dequantized(dtype)
    return kernel if dtype is None else kernel.astype(dtype)


def matrices(kernel: Array | Quantized, *, stack: int, rows: int) -> Array | Quantized:
    """The kernel with one stack axis, one in axis and one out axis, `[L, I, O]`."""
    return (
        kernel.matrices(stack, rows)
        if isinstance(kernel, Quantized)
        else kernel.reshape(stack, rows, -1)
    )


@functools.partial(jax.jit, static_argnames=("format", "double_quant", "n_stack", "n_in"))
def quantize(
    kernel: Array, *, format: Format, double_quant: bool = False, n_stack: int, n_in: int
) -> Quantized:
    """The kernel `[*L, *ins, *outs]`, quantized.

    Args:
      kernel: of any float type.
      format: "nf4" (blocks of 64) or "int8" (an absmax for each output channel).
      double_quant: whether NF4's absmax values are quantized too.
      n_stack: how many axes count matrices.
      n_in: how many in axes follow.
    """
    if format == "int8":
        return int8.quantize(kernel, n_stack=n_stack, n_in=n_in)
    leaf = nf4.quantize(kernel, n_stack=n_stack, n_in=n_in)
    return dataclasses.replace(leaf, absmax=double(leaf.absmax)) if double_quant else leaf  # type: ignore[arg-type]


def format_of(kernel: Any) -> Format | None:
    """The format of a quantized leaf; None of others."""
    return {NF4: "nf4", Int8: "int8"}.get(type(kernel))  # type: ignore[return-value]


def quantize_as(like: Quantized, kernel: Array, *, n_stack: int, n_in: int) -> Quantized:
    """The kernel `[*L, *ins, *outs]`, quantized in the format of `like`; dequantized, it has the dtype of `like`."""
    format = format_of(like)
    assert format is not None
    double_quant = isinstance(like, NF4) and isinstance(like.absmax, DoubleQuantized)
    leaf = quantize(kernel, format=format, double_quant=double_quant, n_stack=n_stack, n_in=n_in)
    return dataclasses.replace(leaf, dtype=like.dtype)
