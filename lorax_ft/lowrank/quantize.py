"""Quantizing the base of any linen model whose layout is known.

{"up_proj": {"kernel": W}}  →  {"up_proj": {"kernel": NF4(codes, absmax)}}
"""

from __future__ import annotations

import functools

import flax.linen as nn
import numpy as np
from jax import Array

from lorax_ft.config import QuantConfig
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.requantize import Original
from lorax_ft.mesh_axes import with_auto_axes
from lorax_ft.quant.kernels import Quantized, quantize
from lorax_ft.tree import Tree, from_modules, modules


def quantize_base(
    params: Tree,
    config: QuantConfig,
    *,
    layout: Layout,
) -> tuple[Tree, dict[str, Original]]:
    """The parameters with quantized kernels, and by path what reads the kernels as they were.

    Embeddings, output heads and routers stay in full precision. So do kernels whose axes are not in
    the order stack, in, out (some of `nn.Einsum`'s).

    Args:
      params: a tree of arrays.
      config: the format.
      layout: the layers of the model (`lorax_ft.layout`, or a loaded model's own).

    Returns:
      A new tree, and the `originals` that `add_adapters` needs for inits that change the base. They
      keep the original kernels in memory.

    Raises:
      ValueError: the format is none, a kernel is quantized already, or there is no kernel to
        quantize.
    """
    if config.format == "none":
        raise ValueError("quant.format is none; give nf4 or int8")
    layers = modules(nn.meta.unbox(params))
    originals: dict[str, Original] = {}
    for path, spec in layout.items():
        kernel = layers.get(path, {}).get("kernel")
        if isinstance(kernel, Quantized):
            raise ValueError(
                f"{path} is already quantized; give the parameters as they were loaded"
            )
        if kernel is None or not spec.quantizable:
            continue
        quantized = functools.partial(
            quantize,
            format=config.format,
            double_quant=config.double,
            n_stack=len(spec.stack),
            n_in=len(spec.ins),
        )
        leaf = with_auto_axes(quantized, kernel)
        layers[path] = layers[path] | {"kernel": leaf}
        originals[path] = _reader(kernel)
    if not originals:
        known = ", ".join(layout) or "no layer"
        raise ValueError(f"none of the layers has a kernel of axes stack, in, out: {known}")
    return from_modules(layers), originals


def _reader(kernel: Array) -> Original:
    """Reads the matrix at an index of the stack."""
    # A lambda in the loop itself would see the last kernel for every path.
    return lambda index: np.asarray(kernel[index])
