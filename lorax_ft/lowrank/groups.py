"""Which leaves train, and in which group of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorax_ft.lowrank.patterns import check_coverage, matches
from lorax_ft.lowrank.terms import check_layer
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import Owner, is_adapter, is_base, leaf_schema
from lorax_ft.tree import Tree, flatten, from_modules, modules, split

FROZEN = "frozen"


def label(params: Tree, *, whole: Sequence[str] = (), freeze: Sequence[str] = ()) -> Tree:
    """Each leaf's group for the optimizer: a value of `lorax_ft.schema.Group`, or "frozen".

    Args:
      params: a tree with adapters.
      whole: patterns of modules whose own weights train in full; "all" matches every one.
      freeze: names of adapter leaves that do not train, such as `lora_a` in LoRA-FA (2308.03303).

    Raises:
      ValueError: a pattern matches no module, or a quantized module is to train in full.
    """
    layers = modules(params)
    # Only a module with weights of its own can train in full.
    bases = [path for path, layer in layers.items() if any(map(is_base, layer))]
    patterns = [pattern for pattern in whole if pattern != "all"]

    def hit(pattern: str) -> bool:
        return any(fully_trained(path, (pattern,)) for path in bases)

    check_coverage(patterns, hit, names=bases, where="adapter.train_whole")
    labels: dict[str, Tree] = {}
    for path, layer in layers.items():
        trains_whole = fully_trained(path, whole)
        labels[path] = {name: _group(name, trains_whole, freeze) for name in layer}
        is_quantized = any(isinstance(leaf, Quantized) for leaf in layer.values())
        if trains_whole and is_quantized:
            raise ValueError(
                f"{path} is quantized, so its own weights cannot train; remove it from train_whole"
            )
    return from_modules(labels)


def partition(
    params: Tree,
    *,
    by: Literal["training", "ownership"] = "training",
    whole: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> tuple[Tree, Tree]:
    """Two trees, to be put together again by `combine`.

    Args:
      params: a tree with adapters.
      by: "training": the leaves that train, and the frozen ones. "ownership": the leaves that
        belong to the fine-tuning (frozen scales, factors and starts too), and those of the base.
      whole: patterns of modules whose own weights train in full: a config's `train_whole`.
      freeze: names of adapter leaves that do not train: a config's `freeze`.

    Raises:
      ValueError: as `label`, or leaves that belong together are not all there.
    """
    for path, layer in modules(params).items():
        check_layer(layer, path)
    labels = flatten(label(params, whole=whole, freeze=freeze))

    def in_first(path: str) -> bool:
        if by == "ownership" and is_adapter(path):
            return True
        return labels[path] != FROZEN

    return split(params, in_first)


def adapter_leaves_of(params: Tree) -> Tree:
    """The leaves that belong to adapters."""
    adapters, _ = split(params, is_adapter)
    return adapters


def fully_trained(path: str, whole: Sequence[str]) -> bool:
    """Whether the patterns `whole` match the module at `path`, or one that contains it."""
    if "all" in whole:
        return True
    parts = path.split("/")
    # The module itself, and every module that contains it.
    for end in range(1, len(parts) + 1):
        prefix = "/".join(parts[:end])
        if any(matches(pattern, prefix) for pattern in whole):
            return True
    return False


def _group(name: str, trains_whole: bool, freeze: Sequence[str]) -> str:
    """The group of a leaf of a module whose own weights train in full, or not."""
    row = leaf_schema(name)
    trains = name not in freeze
    if row.owner is Owner.BASE:
        trains = trains_whole
    # A leaf without a group, such as a scale, never trains.
    if row.group is None or not trains:
        return FROZEN
    return row.group.value
