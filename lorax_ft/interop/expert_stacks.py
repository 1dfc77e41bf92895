"""Checkpoints that hold the experts of a layer in one tensor, read and written as single experts.

gpt-oss stores, for E experts with I inputs, F hidden units and O outputs,

    experts.gate_up_proj       [E, I, 2 F]  columns gate 0, up 0, gate 1, up 1, …
    experts.gate_up_proj_bias  [E, 2 F]
    experts.down_proj          [E, F, O]
    experts.down_proj_bias     [E, O]

where other families have `experts.3.gate_proj.weight` `[F, I]` and so on for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from lorax_ft.interop.huggingface import Names, hf_module, hf_tensors, unstacked
from lorax_ft.interop.lazy_tensor import Index, LazyTensor, Tensors

STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""By the name of a stack, the projections whose columns alternate in it."""
STACK = re.compile(rf"(.*\.experts)\.({'|'.join(STACKS)})(_bias)?")


def split_experts(tensors: Tensors) -> dict[str, LazyTensor]:
    """The tensors with each stack replaced by those of its single experts."""
    split: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = STACK.fullmatch(name)
        if match is None:
            split[name] = tensor
            continue
        experts, stack, bias = match.groups()
        projections = STACKS[stack]
        leaf = "bias" if bias else "weight"
        for first, projection in enumerate(projections):
            columns = slice(first, None, len(projections))
            for i in range(tensor.shape[0]):
                split[f"{experts}.{i}.{projection}.{leaf}"] = _single(tensor, i, columns)
    return split


def _single(stack: LazyTensor, i: int, columns: slice) -> LazyTensor:
    """The columns of expert i, as `[out, in]` or, of a bias, `[out]`."""
    _, *ins, outs = stack.shape
    own_outs = len(range(outs)[columns])
    whole = (slice(i, i + 1), *[slice(None)] * len(ins), columns)

    def read(index: Index) -> np.ndarray:
        matrix = stack.read(whole)[0]
        return matrix.T[index]

    return LazyTensor((own_outs, *ins), read)


def joined_experts(
    leaves: Iterable[tuple[str, np.ndarray]], names: Names
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of leaves under the checkpoint's names, with experts in stacks.

    Args:
      leaves: slash paths, and leaves `[L, E, I, O]`, or `[L, E, O]`, of L layers; those of a
        checkpoint without experts too.
      names: the family's names, where they differ from ours.
    """
    waiting: dict[str, np.ndarray] = {}
    for path, leaf in leaves:
        module, _, name = path.rpartition("/")
        experts, _, projection = module.rpartition("/")
        if not experts.endswith("/experts"):
            yield from hf_tensors(path, leaf, names)
            continue
        waiting[path] = leaf
        stack = next(stack for stack, members in STACKS.items() if projection in members)
        paths = [f"{experts}/{member}/{name}" for member in STACKS[stack]]
        if not waiting.keys() >= set(paths):  # gate waits for up
            continue
        parts = [waiting.pop(member) for member in paths]
        end = "_bias" if name == "bias" else ""
        for logical, index in unstacked(experts.removesuffix("/experts"), leaf.shape):
            columns = np.stack([part[index] for part in parts], axis=-1)
            *leading, outs, count = columns.shape
            tensor = columns.reshape(*leading, outs * count)
            yield f"{hf_module(logical, names)}.experts.{stack}{end}", tensor
