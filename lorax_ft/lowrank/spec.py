"""What the axes of a layer's kernel mean, and of the leaves beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jax import Array

from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import Axis, leaf_schema
from lorax_ft.tree import Layer, Shape

Module = Literal["dense", "general", "einsum", "experts", "conv", "embed", "block"]
Axes = tuple[int, ...]
KERNEL = "kernel"
EMBEDDING = "embedding"
BIAS = "bias"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer that can be adapted: the meaning of its kernel's axes.

    Or a whole module (a "block"), beside which a bottleneck can stand. It has no kernel of its own;
    its axes are those of a kernel from its inputs to its outputs.
    """

    module: Module
    """The linen module: Dense, DenseGeneral, Einsum, our ExpertDense, Conv or Embed, or a block."""
    stack: Axes
    """Axes that count layers of a scan, then experts."""
    ins: Axes
    """Axes that are contracted with the input."""
    outs: Axes
    """Axes of the output."""
    experts: int = 0
    """How many of the stack axes count experts."""
    scanned: tuple[int, ...] = ()
    """For each scan that contains the layer, the number of path parts before its index."""
    by_name: bool = False
    """Whether "all-linear" leaves it out: an output head, a router."""
    tied_to: str | None = None
    """The path of the embedding whose table, transposed, is this layer's kernel, where it has none
    of its own."""
    bias_axes: Axes | None = None
    """For each axis of the bias, the kernel's axis of the same meaning; None: stack, then out."""
    block_shape: Shape | None = None
    """Of a block: the shape that its kernel would have."""

    @property
    def weight(self) -> str:
        """The name of the layer's own matrix."""
        return EMBEDDING if self.module == "embed" else KERNEL

    @property
    def quantizable(self) -> bool:
        """Whether `quant.format` quantizes the kernel.

        Embeddings, output heads and routers stay in full precision. So do kernels whose axes are
        not in the order stack, in, out, since quantized leaves have no other order.
        """
        axes = self.stack + self.ins + self.outs
        in_order = axes == tuple(range(len(axes)))
        return in_order and not self.by_name and self.module != "embed"

    def canonical(self, name: str, leaf: Any) -> Any:
        """The leaf called `name` with its axes in the order stack, in, rank, out.

        An adapter's vectors and quantized kernels have them in that order already.
        """
        axes = self._stored_axes(name)
        if isinstance(leaf, Quantized) or axes is None:
            return leaf
        stored, canonical = axes
        order = _places(canonical, among=stored)
        return leaf.transpose(order)

    def restored(self, name: str, leaf: Any) -> Any:
        """The inverse of `canonical`."""
        axes = self._stored_axes(name)
        if isinstance(leaf, Quantized) or axes is None:
            return leaf
        stored, canonical = axes
        order = _places(stored, among=canonical)
        return leaf.transpose(order)

    def sizes(self, shape: Shape) -> tuple[Shape, int, int]:
        """The stack's shape, and the rows and columns of each matrix, of a kernel of `shape`."""
        stack = _picked(shape, self.stack)
        rows = math.prod(_picked(shape, self.ins))
        columns = math.prod(_picked(shape, self.outs))
        return stack, rows, columns

    def leaf_shape(self, name: str, kernel: Shape, *, sizes: Mapping[Axis, int]) -> Shape:
        """The shape, in canonical order, of a leaf beside a kernel whose own shape is `kernel`.

        `sizes` are those of the axes that are not the kernel's, such as the rank.
        """
        axes = self.stack + self.ins + self.outs
        canonical = _picked(kernel, axes)
        return self.canonical_shape(name, canonical, sizes=sizes)

    def canonical_shape(self, name: str, kernel: Shape, *, sizes: Mapping[Axis, int]) -> Shape:
        """The same beside a kernel whose shape is given in canonical order."""
        first_in = len(self.stack)
        first_out = first_in + len(self.ins)
        of_kernel: dict[Axis, Shape] = {
            "stack": kernel[:first_in],
            "in": kernel[first_in:first_out],
            "out": kernel[first_out:],
        }
        shape: Shape = ()
        for axis in leaf_schema(name).axes:
            shape += of_kernel[axis] if axis in of_kernel else (sizes[axis],)
        return shape

    def stored_shape(self, name: str, canonical: Shape) -> Shape:
        """The shape that `restored` gives to a leaf of this canonical shape."""
        axes = self._stored_axes(name)
        if axes is None:
            return canonical
        stored, canonical_axes = axes
        order = _places(stored, among=canonical_axes)
        return _picked(canonical, order)

    def inside_scans(self, scanned: tuple[int, ...]) -> LayerSpec:
        """The spec of the stacked kernel; `self` is that of the slice that the scans see."""
        n = len(scanned)
        # Each scan stacks its slices along a new first axis.
        scans = tuple(range(n))

        def behind_scans(axes: Axes) -> Axes:
            return tuple(n + axis for axis in axes)

        bias_axes = None
        if self.bias_axes is not None:
            bias_axes = scans + behind_scans(self.bias_axes)
        return dataclasses.replace(
            self,
            stack=scans + behind_scans(self.stack),
            ins=behind_scans(self.ins),
            outs=behind_scans(self.outs),
            bias_axes=bias_axes,
            scanned=scanned,
        )

    def _stored_axes(self, name: str) -> tuple[Axes, Axes] | None:
        """The kernel's axes that a leaf's stand for, as they are stored and in canonical order.

        None for a leaf that is stored in canonical order.
        """
        if name == BIAS and self.bias_axes is not None:
            return self.bias_axes, self.stack + self.outs
        if not _keeps_kernel_order(name):
            return None
        canonical = self._kernel_axes(name)
        stored = tuple(sorted(canonical))
        return stored, canonical

    def _kernel_axes(self, name: str) -> Axes:
        """For each axis of the leaf, the axis of the kernel whose place it takes.

        The rank takes the place of the first of the axes that it replaces.
        """
        axes = leaf_schema(name).axes
        ins = self.ins
        outs = self.outs
        if "in" not in axes:
            # Such as B: its rank stands where the first input axis does.
            ins = ins[:1]
        if "out" not in axes:
            # Such as A.
            outs = outs[:1]
        return self.stack + ins + outs


def _picked(shape: Shape, axes: Axes) -> Shape:
    """The sizes of some axes of a shape."""
    return tuple(shape[axis] for axis in axes)


def _places(axes: Axes, *, among: Axes) -> Axes:
    """The places that some axes have in another order of the same axes."""
    return tuple(among.index(axis) for axis in axes)


def _keeps_kernel_order(name: str) -> bool:
    """Whether the axes of a leaf follow its kernel's order: those of matrices do."""
    axes = leaf_schema(name).axes
    # A matrix has stack, in or rank, and out or rank; a vector lacks one of them.
    return len(axes) == 3 and set(axes) <= {"stack", "in", "rank", "out"}


def as_canonical(layer: Layer, spec: LayerSpec) -> Layer:
    """The layer with its matrix under the name "kernel" and all axes in canonical order."""
    canonical: Layer = {}
    for name, leaf in layer.items():
        if name == EMBEDDING:
            name = KERNEL
        canonical[name] = spec.canonical(name, leaf)
    return canonical


def base_kernel(layers: Mapping[str, Layer], path: str, spec: LayerSpec) -> Array | Quantized:
    """The base weight of the layer at `path`, in its own order of axes.

    Args:
      layers: the leaves by module path (`lorax_ft.tree.modules`).
      path: the module's slash path.
      spec: its layout; a layer without a kernel has the table that `tied_to` names.

    Raises:
      ValueError: there is no such weight.
    """
    layer = layers.get(path, {})
    if spec.weight in layer:
        return layer[spec.weight]
    if spec.tied_to is None:
        raise ValueError(
            f"{path or 'the layer'} has no {spec.weight}; are these the model's parameters?"
        )
    table = layers[spec.tied_to][EMBEDDING]
    return table.T


def base_shape(layers: Mapping[str, Layer], path: str, spec: LayerSpec) -> Shape:
    """The shape of `base_kernel`, also where `layers` hold shapes only; of a block, its own."""
    if spec.block_shape is not None:
        return spec.block_shape
    layer = layers.get(path, {})
    if spec.weight not in layer and spec.tied_to is not None:
        table = layers[spec.tied_to][EMBEDDING]
        # The head's kernel is the table transposed.
        return table.shape[::-1]
    return layer[spec.weight].shape


def with_kernel(layers: Mapping[str, Layer], path: str, spec: LayerSpec) -> Layer:
    """The layer at `path` in canonical order, with the tied kernel where it has none of its own."""
    layer = layers.get(path, {})
    kernel = base_kernel(layers, path, spec)
    return as_canonical(layer | {spec.weight: kernel}, spec)
