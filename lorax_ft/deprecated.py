"""Names and forms of calls that still work in this version, with a DeprecationWarning.

The public functions here take what their successors require as an option. This file goes in 0.2.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lorax_ft.lowrank import adapters, merge
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.spec import EMBEDDING, KERNEL, LayerSpec
from lorax_ft.lowrank.terms import active_leaf, is_adapted, low_rank
from lorax_ft.models.model import CausalLM
from lorax_ft.training import losses, step
from lorax_ft.tree import Layer, Tree, modules


def _with_optional_layout(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which guesses the layout from its trees if none is given."""

    @functools.wraps(function)
    def call(*args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            _warn(f"{function.__name__} without layout= is deprecated; pass layout=model.layout")
            layout = guessed_layout(*_trees([*args, *kwargs.values()]))
        return function(*args, layout=layout, **kwargs)

    return call


attach_adapters = _with_optional_layout(adapters.attach_adapters)
disable_adapters = _with_optional_layout(adapters.disable_adapters)
with_norms = _with_optional_layout(adapters.with_norms)
merge_adapters = _with_optional_layout(merge.merge_adapters)
merge_weighted = _with_optional_layout(merge.merge_weighted)
unmerge_adapters = _with_optional_layout(merge.unmerge_adapters)


def switched_off(params: Tree, base: Tree, *, layout: Layout | None = None) -> Tree:
    """Deprecated: use `disable_adapters`."""
    _warn("switched_off is deprecated; use disable_adapters")
    layout = guessed_layout(params) if layout is None else layout
    return adapters.disable_adapters(params, base, layout=layout)


@functools.wraps(step.make_train_step)
def make_train_step(
    loss: Any = None,
    tx: Any = None,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> Any:
    """The step of a loss; of a model, as before, with its supervised loss."""
    loss = options.pop("model", loss)  # its old name
    if not isinstance(loss, CausalLM):
        return step.make_train_step(loss, tx, **options | _given(layout))
    _warn("make_train_step(model, …) is deprecated; pass supervised_loss(model, …) and layout=")
    supervised = losses.supervised_loss(loss, **options)
    train_step = step.make_train_step(supervised, tx, layout=loss.layout)

    def with_tokens(state: Any, frozen: Tree, batch: Any, key: Any) -> Any:
        state, metrics = train_step(state, frozen, batch, key)
        return state, metrics | {"tokens": metrics["weight"]}

    return with_tokens


@functools.wraps(step.make_eval_step)
def make_eval_step(loss: Any = None, *, layout: Layout | None = None, **options: Any) -> Any:
    """The evaluation of a loss; of a model, as before, of its supervised loss."""
    loss = options.pop("model", loss)  # its old name
    if not isinstance(loss, CausalLM):
        return step.make_eval_step(loss, **options | _given(layout))
    _warn("make_eval_step(model, …) is deprecated; pass supervised_loss(model, …) and layout=")
    supervised = losses.supervised_loss(loss, **options)
    return step.make_eval_step(supervised, layout=loss.layout)


def guessed_layout(*trees: Tree) -> Layout:
    """The layout of adapted modules whose axes are in the order stack, in, out.

    Raises:
      ValueError: an embedding is adapted, which may be the output head too.
    """
    found: Layout = {}
    for tree in trees:
        layers = modules(tree)
        tables = [path for path, layer in layers.items() if EMBEDDING in layer]
        for path, layer in layers.items():
            if is_adapted(layer):
                found[path] = _guessed_spec(path, layer, tables)
    return found


def _guessed_spec(path: str, layer: Layer, tables: list[str]) -> LayerSpec:
    """The spec of one layer by the shapes of its leaves. `tables` are the embeddings' paths."""
    if low_rank.A not in layer or path in tables:
        raise ValueError(
            f"{path} is adapted in a way that its shapes do not explain: pass layout=model.layout"
        )
    tied_to = None
    if KERNEL not in layer and tables:
        tied_to = tables[0]
    n_stack = layer[active_leaf(layer)].ndim
    # Only LoRA's leaves existed when the layout was optional.
    n_in = layer[low_rank.A].ndim - n_stack - 1
    n_out = layer[low_rank.B].ndim - n_stack - 1
    axes = tuple(range(n_stack + n_in + n_out))
    first_out = n_stack + n_in
    return LayerSpec(
        module="dense",
        stack=axes[:n_stack],
        ins=axes[n_stack:first_out],
        outs=axes[first_out:],
        tied_to=tied_to,
    )


def _given(layout: Layout | None) -> dict[str, Any]:
    """The layout as an option, so that its absence is the function's own TypeError."""
    return {} if layout is None else {"layout": layout}


def _trees(args: Sequence[Any]) -> list[Tree]:
    """The trees among the arguments of a call, also those in a list."""
    trees: list[Tree] = []
    for arg in args:
        if isinstance(arg, dict):
            trees.append(arg)
        elif isinstance(arg, list | tuple):
            trees += [tree for tree in arg if isinstance(tree, dict)]
    return trees


def _warn(message: str) -> None:
    # Level 3 is the caller of the deprecated function.
    warnings.warn(message, DeprecationWarning, stacklevel=3)
