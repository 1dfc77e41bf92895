"""The meaning of the axes of a layer's kernel, and of the factors beside it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jax import Array

from lorax_ft.lowrank.linear import Layer
from lorax_ft.quant.kernels import Quantized

Kind = Literal["dense", "general", "einsum", "conv", "embed"]
ORDERED = frozenset(
    {"kernel", "lora_a", "lora_b", "lora_a0", "lora_b0"}
)  # leaves with in or out axes in the kernel's order


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer that can be adapted: the meaning of its kernel's axes."""

    kind: Kind
    stack: tuple[int, ...]
    """Axes that count layers of a scan, then experts."""
    ins: tuple[int, ...]
    """Axes that are contracted with the input."""
    outs: tuple[int, ...]
    """Axes of the output."""
    experts: int = 0
    """How many of the stack axes count experts."""
    scanned: tuple[int, ...] = ()
    """For each scan that the layer stands in, the parts of the path before its index."""
    by_name: bool = False
    """Whether "all-linear" leaves it out: an output head, a router."""

    def canonical(self, name: str, leaf: Any) -> Any:
        """The leaf called `name` with its axes in the order stack, in, out; r stands for the axes it replaces.

        Quantized kernels have them in that order already.
        """
        if isinstance(leaf, Quantized):
            return leaf
        axes = self._axes(name)
        return leaf.transpose([sorted(axes).index(axis) for axis in axes])

    def restored(self, name: str, leaf: Array) -> Array:
        """The inverse of `canonical`: in A and B too, axes stand in the kernel's order, r for the first replaced."""
        axes = self._axes(name)
        return leaf.transpose([axes.index(axis) for axis in sorted(axes)])

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """The stack's shape, and the numbers of rows and columns of each matrix, of a kernel of `shape`."""
        stack, ins, outs = (
            tuple(shape[i] for i in axes) for axes in (self.stack, self.ins, self.outs)
        )
        return stack, math.prod(ins), math.prod(outs)

    def inside_scans(self, scanned: tuple[int, ...]) -> LayerSpec:
        """The spec of the stacked kernel, where this is that of the slice inside scans."""
        n = len(scanned)
        stack, ins, outs = (
            tuple(n + axis for axis in axes) for axes in (self.stack, self.ins, self.outs)
        )
        return dataclasses.replace(
            self, stack=(*range(n), *stack), ins=ins, outs=outs, scanned=scanned
        )

    def _axes(self, name: str) -> tuple[int, ...]:
        ins = self.ins[:1] if name in ("lora_b", "lora_b0") else self.ins
        outs = self.outs[:1] if name in ("lora_a", "lora_a0") else self.outs
        return self.stack + ins + outs


def as_canonical(layer: Layer, spec: LayerSpec | None) -> Layer:
    """The layer with its base weight under the name `kernel`, and all axes in the order stack, in, out."""
    renamed = {"kernel" if name == "embedding" else name: leaf for name, leaf in layer.items()}
    if spec is None:
        return renamed
    return renamed | {n: spec.canonical(n, leaf) for n, leaf in renamed.items() if n in ORDERED}
