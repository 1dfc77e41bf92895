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
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lorax_ft.interop.huggingface import Names, hf_module, hf_tensors, unstacked
from lorax_ft.interop.lazy_tensor import Index, LazyTensor, Tensors

STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""By the name of a stack, the projections whose columns alternate in it."""
_ANY_STACK = "|".join(STACKS)
STACK = re.compile(rf"(.*\.experts)\.({_ANY_STACK})(_bias)?")


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
        count = tensor.shape[0]
        for first, projection in enumerate(projections):
            columns = slice(first, None, len(projections))
            for i in range(count):
                name_of_one = f"{experts}.{i}.{projection}.{leaf}"
                split[name_of_one] = _single(tensor, i, columns)
    return split


def stack_of(projection: str) -> str | None:
    """The name of the stack that holds a projection of experts; None: none does."""
    for stack, members in STACKS.items():
        if projection in members:
            return stack
    return None


def _single(stack: LazyTensor, i: int, columns: slice) -> LazyTensor:
    """The columns of expert i, as `[out, in]` or, of a bias, `[out]`."""
    _, *ins, outs = stack.shape
    own_outs = len(range(outs)[columns])
    expert = slice(i, i + 1)
    all_ins = [slice(None)] * len(ins)  # a bias has no inputs
    whole = (expert, *all_ins, columns)

    def read(index: Index) -> np.ndarray:
        # The columns alternate in the file, so a matrix is read whole.
        matrix = stack.read(whole)[0]
        return matrix.T[index]

    return LazyTensor((own_outs, *ins), read)


def joined_experts(
    leaves: Iterable[tuple[str, np.ndarray]],
    names: Names,
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
        stack = stack_of(projection)
        if stack is None:
            raise ValueError(f"{path}: no stack of experts holds {projection}")
        paths = [f"{experts}/{member}/{name}" for member in STACKS[stack]]
        if not waiting.keys() >= set(paths):  # gate waits for up
            continue
        parts = [waiting.pop(member) for member in paths]
        end = "_bias" if name == "bias" else ""
        mlp = experts.removesuffix("/experts")
        for logical, index in unstacked(mlp, leaf.shape):
            matrices = [part[index] for part in parts]
            module = hf_module(logical, names)
            yield f"{module}.experts.{stack}{end}", _alternating(matrices)


def _alternating(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Matrices `[..., O]` as one, whose columns are theirs in turn."""
    columns = np.stack(matrices, axis=-1)  # [..., O, matrices]
    *leading, outs, count = columns.shape
    return columns.reshape(*leading, outs * count)
