"""What a term is: one summand or factor of the adapted layer's equation.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from lorax_ft.lowrank.experts import Grouped
from lorax_ft.lowrank.plan import Plan
from lorax_ft.quant.kernels import dense
from lorax_ft.schema import Axis
from lorax_ft.tree import Layer, Shape

Dot = Callable[[Array, Any], Array]
"""`dot(x, k)`: the layer's product of its input with a kernel that has W's in axes."""


def saved(value: Array) -> Array:
    """The value, which the backward pass needs and policies of rematerialization may save."""
    return checkpoint_name(value, "adapter")


class Product(NamedTuple):
    """How the layer multiplies."""

    dot: Dot
    in_shape: Shape
    """The sizes of W's in axes."""
    out_shape: Shape
    """The sizes of W's out axes."""
    precision: lax.PrecisionLike = None
    """Of the product with B, as the layer has it."""
    grouped: Grouped | None = None
    """Where rows are sorted by expert; None: x has an axis of experts, or there are none."""
    weights: Callable[[Any], Array] = dense
    """W of the layer's kernel as an array for `dot`, with one out axis: `[*E, *in, O]`."""

    def leaf(self, leaf: Array) -> Array:
        """A leaf of the outputs as they meet it: by row, where rows are sorted by expert."""
        return leaf if self.grouped is None else self.grouped.leaf(leaf)


def _unchanged_input(layer: Layer, x: Array) -> Array:
    return x


def _unchanged_output(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    return y


def _unchanged_base(layer: Layer, base: Layer) -> Layer:
    return base


def _nothing(*args: Any) -> Layer:
    return {}


class Term(NamedTuple):
    """A term: its leaves, and how it acts. Functions that are left out change nothing."""

    leaves: tuple[str, ...]
    """A layer has all of these leaves or none of them."""
    one_of: tuple[str, ...] = ()
    """Of these, a layer has exactly one beside them."""
    optional: tuple[str, ...] = ()
    """Leaves that a layer may have beside them."""
    needs: tuple[str, ...] = ()
    """Leaves of other terms that the layer must have too."""
    active: str | None = None
    """The leaf `[*L]` that is 0 for those matrices of a stack that are not adapted."""
    loses_base: bool = False
    """Whether W cannot be computed from merged weights, as where it multiplies W."""
    negated: tuple[str, ...] = ()
    """Leaves whose negative makes merging subtract what the term adds."""
    takes_dropout: bool = False
    """Whether its input is dropped out in training."""
    shared: tuple[str, ...] = ()
    """Leaves at the tree's root that all of its layers share (`lorax_ft.lowrank.shared`)."""
    any_rank: bool = False
    """Whether a rank may be above the sides of a matrix."""
    planned: Callable[[Plan], tuple[str, ...]] = lambda plan: ()
    """The leaves that a layer with this plan gets."""
    sizes: Callable[[Plan], dict[Axis, int]] = lambda plan: {}
    """The sizes of their axes that are neither the kernel's nor the rank."""
    initial: Callable[[Layer, Plan, dict[str, Shape], Array], Layer] = _nothing
    """Their values where no init gives them: (layer in canonical order, plan, shapes, key) ->
    leaves."""
    initial_shared: Callable[[Mapping[str, Shape], Array], Layer] = _nothing
    """The values of the shared leaves: (shapes, key) -> leaves."""
    before: Callable[[Layer, Array], Array] = _unchanged_input
    """What it does to the layer's input."""
    update: Callable[[Layer, Array], Array] | None = None
    """ΔW of a term that forms it as a whole: (layer, W `[*E, I, O]`) -> `[*E, I, O]`, in W's dtype.
    It acts before all that `after` does, and merging adds it to W."""
    after: Callable[[Layer, Array, Array, Product], Array] = _unchanged_output
    """What it makes of the output so far: (layer, x, y, product) -> y."""
    merge: Callable[[Layer, Layer], Layer] | None = _unchanged_base
    """The same on one matrix: (its leaves, kernel `[I, O]` and bias) -> both, in float32. None: no
    kernel can hold it."""
    ranks: Callable[[Layer], np.ndarray] | None = None
    """The rank of each matrix of the stack, `[L]`; None for a term without ranks."""

    @property
    def all_leaves(self) -> tuple[str, ...]:
        """Every leaf that a layer may have for this term."""
        return self.leaves + self.one_of + self.optional

    @property
    def changes_kernel(self) -> bool:
        """Whether merging does anything."""
        return self.merge is not _unchanged_base or self.update is not None


def check_no_embedding(plan: Plan) -> None:
    """Raise where a method that has no form for embeddings would adapt one."""
    if plan.spec.module == "embed":
        title = plan.config.method
        raise ValueError(f"{plan.paths[0]}: {title} is not for embeddings; exclude them")


def check_single_matrix(plan: Plan) -> None:
    """Raise where a method that forms a matrix of W's size would form one for each expert."""
    check_no_embedding(plan)
    if plan.spec.module == "experts":
        title = plan.config.method
        raise ValueError(
            f"{plan.paths[0]}: {title} would form a whole matrix for each expert at once; exclude "
            "the experts"
        )


def check_dense(plan: Plan) -> None:
    """Raise where a method whose input is a vector would adapt another layer than a dense one."""
    check_no_embedding(plan)
    if plan.spec.module != "dense":
        title = plan.config.method
        raise ValueError(
            f"{plan.paths[0]} is of the type {plan.spec.module}, and {title} is for dense layers "
            "only; exclude it"
        )
