"""Which leaves train, and in which group of the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lorax_ft.lowrank.linear import ADAPTER_LEAVES, STEP_LEAVES
from lorax_ft.lowrank.targets import check_coverage, matches
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, flatten, from_modules, modules, split


def label(params: Tree, *, whole: Sequence[str] = (), freeze: Sequence[str] = ()) -> Tree:
    """Each leaf's group for the optimizer.

    `lora_a`, `lora_b`, `magnitude`; `weight` and `vector` for the matrices and for the biases and norms of
    modules that train whole; else `frozen`.

    Args:
      params: a tree with adapters.
      whole: patterns of modules whose own weights train; "all" matches every one.
      freeze: names of adapter leaves that stay where they start, such as `lora_a` in LoRA-FA (2308.03303).

    Raises:
      ValueError: a pattern matches no module.
    """
    layers = modules(params)
    bases = [path for path, layer in layers.items() if layer.keys() - ADAPTER_LEAVES - STEP_LEAVES]
    patterns = [p for p in whole if p != "all"]
    check_coverage(
        patterns,
        lambda p: any(fully_trained(path, (p,)) for path in bases),
        names=bases,
        where="train_whole",
    )

    def group(path: str, name: str) -> str:
        if name in ("lora_a", "lora_b", "magnitude"):
            return "frozen" if name in freeze else name
        if name in ADAPTER_LEAVES | STEP_LEAVES or not fully_trained(path, whole):
            return "frozen"
        if isinstance(layers[path][name], Quantized):
            raise ValueError(
                f"{path} is quantized, so its own weights do not train; leave it out of train_whole"
            )
        return "weight" if name in ("kernel", "embedding") else "vector"

    return from_modules(
        {path: {name: group(path, name) for name in layer} for path, layer in layers.items()}
    )


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
      by: "training": what trains, and what is frozen. "ownership": what belongs to the fine-tuning
        (frozen scales, factors and starts too), and what belongs to the base.
      whole: patterns of modules whose own weights train, as for `label`: a config's `train_whole`.
      freeze: names of adapter leaves that do not train, as for `label`: a config's `freeze`.
    """
    labels = flatten(label(params, whole=whole, freeze=freeze))

    def mine(path: str) -> bool:
        return labels[path] != "frozen" or (
            by == "ownership" and path.rpartition("/")[2] in ADAPTER_LEAVES
        )

    return split(params, mine)


def fully_trained(path: str, whole: Sequence[str]) -> bool:
    """Whether the patterns `whole` match the module at `path`, or one that it stands in."""
    parts = path.split("/")
    parents = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        pattern == "all" or any(matches(pattern, parent) for parent in parents) for pattern in whole
    )
