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

from lorax_ft.interop.expert_stacks import STACKS
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
        stack = next(stack for stack, members in STACKS.items() if projection in members)
        by_expert = stacks.setdefault(f"{experts}/experts/{stack}", {})
        by_expert.setdefault(int(number), {})[projection] = matrix
    return others, stacks


def stacked(path: str, experts: Experts, count: int) -> Matrix:
    """One stack's A `[E, R, I]`, B `[E, O, R]` and scale.

    The scale is that of the first adapter; where another has its own, its B makes up for that.

    Args:
      path: of the stack, such as `layers/0/mlp/experts/gate_up_proj`.
      experts: its adapters.
      count: E.
    """
    projections = STACKS[path.rpartition("/")[2]]
    some = next(iter(next(iter(experts.values())).values()))
    scale = some["lora_scale"]
    shares_a = all(_same_a(list(members.values())) for members in experts.values())
    joined = {i: _joined(experts[i], projections, scale, shares_a=shares_a) for i in experts}
    rank = max(a.shape[1] for a, _ in joined.values())
    ins, outs = next((a.shape[0], b.shape[1]) for a, b in joined.values())
    stacked_a = np.zeros((count, rank, ins), np.float32)
    stacked_b = np.zeros((count, outs, rank), np.float32)
    for i, (a, b) in joined.items():
        stacked_a[i, : a.shape[1]] = a.T
        stacked_b[i, :, : b.shape[0]] = b.T
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
        later = order[order.index(stack) + 1 :]
        outside = [other for other in later if f"{module}.{other}" in names]
        found[name] = module + ".base_layer" * len(outside)
    return found


def target_parameters(config: dict[str, Any], parameters: Set[str]) -> dict[str, Any]:
    """An adapter_config.json whose targets are told apart by what they are, module or parameter."""
    if not parameters:
        return config
    names = {name.rpartition(".")[2] for name in parameters} | set(parameters)
    targets = config["target_modules"]
    return config | {
        "target_modules": [target for target in targets if target not in names],
        "target_parameters": [target for target in targets if target in names],
    }


def every_stack(modules: Iterable[str]) -> list[str]:
    """The parameters of stacks and routers in a model with these modules, experts one by one.

    >>> every_stack(["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj", "norm"])
    ['mlp.experts.gate_up_proj', 'norm.weight']
    """
    found = {}
    for module in modules:
        experts, inside, rest = module.partition(".experts.")
        name = f"{module}.weight"
        if inside:
            projection = rest.rpartition(".")[2]
            stack = next((s for s, members in STACKS.items() if projection in members), None)
            name = f"{experts}.experts.{stack}"
        found[name] = True
    return list(found)


def one_expert(stack: Matrix) -> Matrix:
    """The leaves of a stack's first expert, for the rank and the scale that all of them have."""
    return {
        "lora_a": stack["lora_a"][0].T,
        "lora_b": stack["lora_b"][0].T,
        "lora_scale": stack["lora_scale"],
    }


def stack_tensors(matrix: Matrix) -> dict[str, np.ndarray]:
    """A `[E·R, I]` and B `[O, R·E]`, as PEFT has them."""
    a, b = matrix["lora_a"], matrix["lora_b"]
    b = b.transpose(1, 2, 0)  # [O, R, E]
    return {
        "lora_A.weight": a.reshape(-1, a.shape[-1]),
        "lora_B.weight": b.reshape(b.shape[0], -1),
    }


def _same_a(matrices: list[Matrix]) -> bool:
    """Whether the projections of an expert have one A, as those that PEFT trained do."""
    first = matrices[0]["lora_a"]
    return all(np.array_equal(first, matrix["lora_a"]) for matrix in matrices)


def _joined(
    members: Mapping[str, Matrix],
    projections: tuple[str, ...],
    scale: np.ndarray,
    *,
    shares_a: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """A `[I, R]` and B `[R, O]` of an expert's projections together."""
    factors_a = [matrix["lora_a"] for matrix in members.values()]
    a = factors_a[0] if shares_a else np.concatenate(factors_a, axis=1)
    some = next(iter(members.values()))
    outs = some["lora_b"].shape[1]
    b = np.zeros((a.shape[1], outs, len(projections)), np.float32)
    row = 0
    for projection, matrix in members.items():
        own = matrix["lora_b"] * (matrix["lora_scale"] / scale)
        end = row + len(own)
        b[row:end, :, projections.index(projection)] = own
        if not shares_a:
            row = end
    return a, b.reshape(len(b), -1)
