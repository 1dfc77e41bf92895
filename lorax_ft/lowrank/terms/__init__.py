"""The terms of an adapted layer's equation, in the equation's order. Each file is one of them.

    y = l ⊙ (b + (m / n) · (x W − s₀ x A₀ B₀ + s x̃ A B) + x̃ ΔW)

ΔW is that of MiSS, VeRA, LoHa, LoKr, SHiRA or HiRA, OFT rotates x first, and a bottleneck acts on
the sum. Trained tokens have values of their own in the place of y's.

A layer is computed (`linear`) and merged (`merged_layer`) by folding over those terms whose leaves
it has. The file of a term says which leaves it needs, how it acts and how it merges.
"""

from __future__ import annotations

from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import (
    bias,
    bottleneck,
    dropout,
    hira,
    ia3,
    kept_start,
    loha,
    lokr,
    low_rank,
    magnitude,
    miss,
    oft,
    shira,
    tokens,
    vera,
)
from lorax_ft.lowrank.terms.term import Term
from lorax_ft.schema import Axis, Place, is_adapter, leaf_schema
from lorax_ft.tree import Layer

TERMS: tuple[Term, ...] = (
    dropout.TERM,
    kept_start.TERM,
    low_rank.TERM,
    magnitude.TERM,
    miss.TERM,
    vera.TERM,
    loha.TERM,
    lokr.TERM,
    shira.TERM,
    hira.TERM,
    oft.TERM,
    bias.TERM,
    bottleneck.TERM,
    ia3.TERM,
    tokens.TERM,
)


def terms_of(layer: Layer) -> list[Term]:
    """The terms that a layer has, in the equation's order.

    Raises:
      ValueError: as `check_layer`.
    """
    check_layer(layer)
    return [term for term in TERMS if term.leaves[0] in layer]


def check_layer(layer: Layer, path: str = "") -> None:
    """Raise where a layer's leaves of a term are not complete, or exclude one another.

    Args:
      layer: the layer's leaves.
      path: the module's slash path, for the error.

    Raises:
      ValueError: with the leaf that is there and the one that is missing or one too many.
    """
    for term in TERMS:
        found = [name for name in term.all_leaves if name in layer]
        missing = [name for name in (*term.leaves, *term.needs) if name not in layer]
        chosen = [name for name in term.one_of if name in layer]
        if term.one_of and not chosen:
            missing.append(term.one_of[0])
        if found and missing:
            problem = f"the leaf {found[0]!r} but no {missing[0]!r}; the two belong together"
        elif len(chosen) > 1:
            problem = f"the leaves {chosen[0]!r} and {chosen[1]!r}, of which it may have one"
        else:
            continue
        where = f"{path}: " if path else ""
        raise ValueError(
            f"{where}this layer has {problem} (build adapters with lorax_ft.add_adapters or "
            "load_peft)"
        )


def planned_leaves(plan: Plan) -> list[str]:
    """The leaves that a module with this plan gets."""
    return [name for term in TERMS for name in term.planned(plan)]


def own_sizes(plan: Plan) -> dict[Axis, int]:
    """The sizes of the axes of a module's leaves that are not its kernel's."""
    sizes: dict[Axis, int] = {"rank": plan.width}
    for term in TERMS:
        if term.planned(plan):
            sizes |= term.sizes(plan)
    return sizes


def is_adapted(layer: Layer) -> bool:
    """Whether a layer has adapter leaves of its own."""
    return any(is_adapter(name) and leaf_schema(name).place is Place.MODULE for name in layer)


def active_leaf(layer: Layer) -> str:
    """The name of the leaf `[*L]` that says which matrices of an adapted stack are adapted."""
    return next(term.active for term in terms_of(layer) if term.active is not None)


def scale_leaves(layer: Layer) -> list[str]:
    """The names of a layer's leaves `[*L]` that turn its terms off where they are 0."""
    names = [term.active for term in TERMS if term.active in layer]
    if kept_start.SCALE in layer:
        names.append(kept_start.SCALE)
    return names
