"""Adapters on experts that a checkpoint stacks, as PEFT has them: `target_parameters`.

PEFT adapts a stack of E experts as one parameter of one rank R and one scale. A is `[E·R, I]`,
experts first, and B is `[O, R·E]`, ranks first. Gate and up are one parameter, so the ranks of both
stand side by side, and the rows of B alternate as the stack's columns do.

Letters: E experts, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from lorax_ft.interop.expert_stacks import STACKS, stack_of
from lorax_ft.interop.peft_methods import Matrix

Experts = dict[int, dict[str, Matrix]]
"""The adapters of one stack: by expert, then by projection."""


def without_experts(adapters: Mapping[str, Matrix]) -> tuple[dict[str, Matrix], dict[str, Experts]]:
    """The adapters that are not on experts, and those that are, by the stack's logical path."""
    others = {}
    stacks: dict[str, Experts] = {}
    for path, matrix in adapters.items():
        experts, found, rest = path.partition("/experts/")
        if not found:
            others[path] = matrix
            continue
        number, _, projection = rest.partition("/")
        stack = f"{experts}/experts/{stack_of(projection)}"
        by_expert = stacks.setdefault(stack, {})
        by_projection = by_expert.setdefault(int(number), {})
        by_projection[projection] = matrix
    return others, stacks


def stacked(path: str, experts: Experts, count: int) -> Matrix:
    """One stack's A `[E, R, I]`, B `[E, O, R]` and scale.

    The scale is that of the first adapter; where another has its own, its B makes up for that.

    Args:
      path: of the stack, such as `layers/0/mlp/experts/gate_up_proj`.
      experts: its adapters.
      count: E.
    """
    _, _, stack = path.rpartition("/")
    projections = STACKS[stack]
    scale = _any_matrix(experts)["lora_scale"]
    shares_a = all(_same_a(members) for members in experts.values())
    joined = {}
    rank = 0
    for i, members in experts.items():
        a, b = _joined(members, projections, scale, shares_a=shares_a)
        joined[i] = (a, b)
        rank = max(rank, len(b))
        ins = len(a)
        outs = b.shape[1]
    # Experts without an adapter, and ranks that an expert lacks, stay 0.
    stacked_a = np.zeros((count, rank, ins), np.float32)
    stacked_b = np.zeros((count, outs, rank), np.float32)
    for i, (a, b) in joined.items():
        own_rank = len(b)
        stacked_a[i, :own_rank] = a.T
        stacked_b[i, :, :own_rank] = b.T
    return {"lora_a": stacked_a, "lora_b": stacked_b, "lora_scale": scale}


def wrappers(parameters: Iterable[str]) -> dict[str, str]:
    """By the full name of each adapted stack, that of the module which holds its factors.

    PEFT wraps a module once for each of its parameters, the first one innermost.

    >>> wrappers(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    names = list(parameters)
    order = list(STACKS)
    found = {}
    for name in names:
        module, _, stack = name.rpartition(".")
        place = order.index(stack)
        # Each wrapper outside has the ones inside it as its base layer.
        holder = module
        for later in order[place + 1 :]:
            if f"{module}.{later}" in names:
                holder += ".base_layer"
        found[name] = holder
    return found


def target_parameters(config: dict[str, Any], parameters: Set[str]) -> dict[str, Any]:
    """An adapter_config.json whose targets are told apart by what they are, module or parameter."""
    if not parameters:
        return config
    # A target is a full name or the last part of one.
    names = set(parameters)
    for parameter in parameters:
        _, _, last = parameter.rpartition(".")
        names.add(last)
    of_modules = []
    of_parameters = []
    for target in config["target_modules"]:
        if target in names:
            of_parameters.append(target)
        else:
            of_modules.append(target)
    return config | {"target_modules": of_modules, "target_parameters": of_parameters}


def every_stack(modules: Iterable[str]) -> list[str]:
    """The parameters of stacks and routers in a model with these modules, experts one by one.

    >>> every_stack(["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj", "norm"])
    ['mlp.experts.gate_up_proj', 'norm.weight']
    """
    found = []
    for module in modules:
        experts, inside, rest = module.partition(".experts.")
        name = f"{module}.weight"
        if inside:
            _, _, projection = rest.rpartition(".")
            name = f"{experts}.experts.{stack_of(projection)}"
        found.append(name)
    # The modules of all experts give the same name; a dict keeps the order.
    return list(dict.fromkeys(found))


def one_expert(stack: Matrix) -> Matrix:
    """The leaves of a stack's first expert, for the rank and the scale that all of them have."""
    return {
        "lora_a": stack["lora_a"][0].T,
        "lora_b": stack["lora_b"][0].T,
        "lora_scale": stack["lora_scale"],
    }


def stack_tensors(matrix: Matrix) -> dict[str, np.ndarray]:
    """A `[E·R, I]` and B `[O, R·E]`, as PEFT has them."""
    a = matrix["lora_a"]  # [E, R, I]
    b = matrix["lora_b"]  # [E, O, R]
    _, _, ins = a.shape
    _, outs, _ = b.shape
    b = b.transpose(1, 2, 0)  # [O, R, E]
    return {
        "lora_A.weight": a.reshape(-1, ins),
        "lora_B.weight": b.reshape(outs, -1),
    }


def _any_matrix(experts: Experts) -> Matrix:
    """The adapter of the first projection of the first expert that has any."""
    by_projection = next(iter(experts.values()))
    return next(iter(by_projection.values()))


def _same_a(members: Mapping[str, Matrix]) -> bool:
    """Whether the projections of an expert have one A, as those that PEFT trained do."""
    first, *others = [matrix["lora_a"] for matrix in members.values()]
    return all(np.array_equal(first, other) for other in others)


def _joined(
    members: Mapping[str, Matrix],
    projections: tuple[str, ...],
    scale: np.ndarray,
    *,
    shares_a: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """A `[I, R]` and B `[R, O]` of an expert's projections together."""
    factors_a = [matrix["lora_a"] for matrix in members.values()]
    a = factors_a[0]
    if not shares_a:
        # The ranks of the projections stand side by side.
        a = np.concatenate(factors_a, axis=1)
    _, rank = a.shape
    some = next(iter(members.values()))
    _, outs = some["lora_b"].shape
    # The columns of the projections alternate, as in the stack.
    b = np.zeros((rank, outs, len(projections)), np.float32)
    row = 0
    for projection, matrix in members.items():
        own_scale = matrix["lora_scale"] / scale
        own = matrix["lora_b"] * own_scale
        end = row + len(own)
        column = projections.index(projection)
        b[row:end, :, column] = own
        if not shares_a:
            row = end
    return a, b.reshape(rank, -1)
