"""Kernels in any format: a plain array, or one of the quantized leaves."""

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
    """The kernel as an array of `dtype`, by default of its own dtype."""
    if isinstance(kernel, Quantized):
        return kernel.dequantized(dtype)
    if dtype is None:
        return kernel
    return kernel.astype(dtype)


def matrices(kernel: Array | Quantized, *, stack: int, rows: int) -> Array | Quantized:
    """The kernel as `[L, I, O]`, with L = `stack` and I = `rows`."""
    if isinstance(kernel, Quantized):
        return kernel.matrices(stack, rows)
    return kernel.reshape(stack, rows, -1)


@functools.partial(jax.jit, static_argnames=("format", "double_quant", "n_stack", "n_in"))
def quantize(
    kernel: Array,
    *,
    format: Format,
    double_quant: bool = False,
    n_stack: int,
    n_in: int,
) -> Quantized:
    """Quantizes the kernel `[*L, *ins, *outs]`.

    Args:
      kernel: an array of any float dtype.
      format: "nf4" (an absmax for each block of 64) or "int8" (an absmax for each output channel).
      double_quant: whether to quantize NF4's absmax values too; int8 ignores it.
      n_stack: the number of stack axes.
      n_in: the number of in axes, which follow them.
    """
    if format == "int8":
        return int8.quantize(kernel, n_stack=n_stack, n_in=n_in)
    leaf = nf4.quantize(kernel, n_stack=n_stack, n_in=n_in)
    if not double_quant:
        return leaf
    # nf4.quantize returns absmax as a plain array; the field's type also allows DoubleQuantized.
    return dataclasses.replace(leaf, absmax=double(leaf.absmax))  # type: ignore[arg-type]


def format_of(kernel: Any) -> Format | None:
    """The format of a quantized leaf; None for anything else."""
    if isinstance(kernel, NF4):
        return "nf4"
    if isinstance(kernel, Int8):
        return "int8"
    return None


def quantize_as(
    like: Quantized,
    kernel: Array,
    *,
    n_stack: int,
    n_in: int,
) -> Quantized:
    """Quantizes the kernel `[*L, *ins, *outs]` in the format, and with the dtype, of `like`."""
    format = format_of(like)
    assert format is not None
    double_quant = isinstance(like, NF4) and isinstance(like.absmax, DoubleQuantized)
    leaf = quantize(
        kernel,
        format=format,
        double_quant=double_quant,
        n_stack=n_stack,
        n_in=n_in,
    )
    return dataclasses.replace(leaf, dtype=like.dtype)
