"""Adapters on sparse MLPs as PEFT has them: all experts of a layer are one module, as is a router.

transformers 5 holds the experts of a layer as two parameters, gate_up_proj and down_proj, and a
router as a third. PEFT takes tensors of single experts and fuses them; it then has one rank and one
alpha for all of them in all layers, and needs every expert's gate and up.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lorax_ft.interop.huggingface import unstacked
from lorax_ft.interop.model_card import TITLES
from lorax_ft.interop.peft_config import is_fused
from lorax_ft.interop.peft_methods import Matrix
from lorax_ft.models.model import Model
from lorax_ft.schema import is_base
from lorax_ft.tree import Layer

EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")


def check_fused(layers: Mapping[str, Layer]) -> None:
    """Raise where PEFT has no form for what is trained: sinks, or experts other than by LoRA.

    Args:
      layers: the trained leaves by module; those of plain LoRA may have others beside them.
    """
    for path, layer in layers.items():
        if "sinks" in layer:
            raise ValueError(
                f"{path}: PEFT has no form for trained sinks, so they could not be saved; name "
                "single projections in train_whole, such as q_proj"
            )
        if not is_fused(path):
            continue
        what = _unsupported(layer)
        if what is None:
            continue
        pattern = ".*experts.*" if "experts" in path else "mlp/gate"
        raise ValueError(
            f"{path}: PEFT has no {what} of experts and routers, only LoRA, so the adapter could "
            f"not be saved; leave them out (adapter.exclude {pattern!r}, or train_whole without "
            "them)"
        )


def _unsupported(layer: Layer) -> str | None:
    """What of an expert's or a router's trained leaves PEFT has no form for; None for LoRA's."""
    if "magnitude" in layer:
        return "DoRA"
    for name in layer:
        prefix, _, _ = name.partition("_")
        if prefix != "lora" and prefix in TITLES:
            return TITLES[prefix]
    if any(map(is_base, layer)):
        return "full training"
    return None


def fit_fused(adapters: Mapping[str, Matrix], model: Model) -> dict[str, Matrix]:
    """The adapters, by logical path, with those of experts and routers in a form that PEFT fuses.

    Matrices without an adapter get one of zeros where PEFT needs one. All get the largest rank, and
    scales that differ go into B.
    """
    fused = {path: matrix for path, matrix in adapters.items() if is_fused(path)}
    if not fused:
        return dict(adapters)
    last_names = {path.rpartition("/")[2] for path in fused}
    if last_names & {"gate_proj", "up_proj"}:
        # PEFT finds down_proj's factors outside of gate_up_proj's, and those only inside of others.
        last_names |= set(EXPERT_MODULES)
    for path, (ins, outs) in _fused_shapes(model):
        _, _, last = path.rpartition("/")
        if last in last_names and path not in fused:
            fused[path] = {
                "lora_a": np.zeros((ins, 1), np.float32),
                "lora_b": np.zeros((1, outs), np.float32),
                "lora_scale": np.ones((), np.float32),
            }
    return {**adapters, **unified(fused)}


def is_filled(matrix: Matrix) -> bool:
    """Whether an adapter adds and trains nothing, like those that `fit_fused` fills up with."""
    return not matrix["lora_a"].any() and not matrix["lora_b"].any()


def unified(adapters: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """LoRA adapters with one rank, the largest, and one scale, the most common.

    >>> a, b = np.ones((3, 1)), np.ones((1, 4))
    >>> one = {"lora_a": a, "lora_b": b, "lora_scale": np.float32(2)}
    >>> two = {"lora_a": np.ones((3, 2)), "lora_b": np.ones((2, 4)), "lora_scale": np.float32(1)}
    >>> both = unified({"q": one, "k": two, "v": one})
    >>> both["k"]["lora_b"][0], both["k"]["lora_scale"].item()
    (array([0.5, 0.5, 0.5, 0.5]), 2.0)
    >>> both["q"]["lora_b"]
    array([[1., 1., 1., 1.],
           [0., 0., 0., 0.]])
    """
    rank = max(len(matrix["lora_b"]) for matrix in adapters.values())
    scales: collections.Counter[float] = collections.Counter()
    for matrix in adapters.values():
        # One that was filled up has the scale 1, which says nothing.
        if not is_filled(matrix):
            scales[matrix["lora_scale"].item()] += 1
    [(scale, _)] = scales.most_common(1)
    fitted = {}
    for path, matrix in adapters.items():
        a = matrix["lora_a"]
        b = matrix["lora_b"]
        missing = rank - len(b)
        own = matrix["lora_scale"].item()
        if own != scale:
            b = b * np.asarray(own / scale, b.dtype)
        # Ranks of zeros, in both factors, add nothing.
        fitted[path] = matrix | {
            "lora_a": np.pad(a, ((0, 0), (0, missing))),
            "lora_b": np.pad(b, ((0, missing), (0, 0))),
            "lora_scale": np.asarray(scale, np.float32),
        }
    return fitted


def _fused_shapes(model: Model) -> Iterator[tuple[str, tuple[int, int]]]:
    """The logical paths of all experts' projections and routers, with the sizes I and O of each."""
    c = model.config
    assert c.experts is not None
    count = c.experts.count
    sizes: dict[str, Any] = {"mlp/gate": (c.width, count)}
    for name in EXPERT_MODULES:
        sizes[f"mlp/experts/{name}"] = (c.width, c.mlp_width)
    sizes["mlp/experts/down_proj"] = (c.mlp_width, c.width)
    stack = (c.layers, count)
    for path, shape in sizes.items():
        for logical, _ in unstacked(f"layers/{path}", stack):
            yield logical, shape
