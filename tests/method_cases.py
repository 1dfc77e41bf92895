"""The table of methods (one line each) that all method tests run on, and their helpers."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from lorax_ft import AdapterConfig
from lorax_ft.lowrank.layout import logical_paths
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.lowrank.statistics import needed_statistics
from lorax_ft.schema import METHODS
from lorax_ft.tree import Tree, modules

INITS: dict[str, dict[str, Any]] = {
    "kaiming": {"init": "kaiming"},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "pissa_randomized": {"init": "pissa", "svd_iterations": 2},
    "pissa_kept": {"init": "pissa", "keep_base": True},
    "olora": {"init": "olora"},
    "milora": {"init": "milora"},
    "orthogonal": {"init": "orthogonal", "rank": 4},
    "eva": {"init": "eva"},
    "corda": {"init": "corda"},
    "corda_first_kept": {"init": "corda", "corda_mode": "ipm", "keep_base": True},
    # It needs 2 r singular vectors, and the matrix has 5.
    "lora_ga": {
        "init": "lora_ga",
        "rank": 2,
    },
    "lora_one": {"init": "lora_one", "lora_one_gamma": 1.0},
}
DENSE = (".*/(up|down)(_proj)?",)
"""Layers with one in axis and one out axis, in all models."""
TABLE: dict[str, dict[str, Any]] = {
    f"{init}-{scaling}{'-dora' if dora else ''}": {**fields, "scaling": scaling, "dora": dora}
    for (init, fields), scaling, dora in itertools.product(
        INITS.items(), ("standard", "rank_stabilized"), (False, True)
    )
}
TABLE |= {
    "ia3-standard": {"method": "ia3"},
    "ia3_input-standard": {"method": "ia3", "feedforward": DENSE},
    "miss-standard": {"method": "miss"},
    "vera-standard": {"method": "vera"},
    "shira-standard": {"method": "shira"},
    "mica-standard": {"init": "mica", "freeze": ("lora_b",)},
    "loha-standard": {"method": "loha"},
    "lokr-standard": {"method": "lokr", "rank": 1, "targets": DENSE},
    "hira-standard": {"method": "hira"},
    "oft-standard": {"method": "oft", "oft_block_size": 8, "targets": DENSE},
}
EVERYWHERE = (
    "kaiming-standard",
    "gaussian-standard-dora",
    "pissa-rank_stabilized",
    "ia3-standard",
    "miss-standard",
    "pissa_kept-rank_stabilized-dora",
)
MODELS = ("vit_scanned", "convolutions", "einsums", "boxed")
VARIANTS = ("decoder_untied", "vit_unrolled", "vit_rematted")
CASES = [
    *(("decoder", method) for method in TABLE),
    *itertools.product(MODELS, EVERYWHERE),
    *((model, EVERYWHERE[-1]) for model in VARIANTS),
    *itertools.product(
        ("convolutions", "einsums"), ("eva-standard", "corda-standard", "lora_one-standard-dora")
    ),
]
TARGETS = {
    "decoder": ("all-linear", "lm_head"),
    "decoder_untied": ("all-linear", "lm_head", "embed_tokens"),
}
KEY = jax.random.key(7)
Adapted = Callable[..., Tree]


def adapter_config(model: str, method: str, **fields: Any) -> AdapterConfig:
    """The config of a method of the table on a model of the zoo."""
    own = {"targets": TARGETS.get(model, ("all-linear",))} | TABLE[method]
    used = METHODS[own.get("method", "lora")]
    common = {"rank": 3, "alpha": 6.0}
    own = {name: value for name, value in common.items() if name in used} | own
    return AdapterConfig(**(own | fields))


def random_statistics(case: Any, config: AdapterConfig) -> dict[str, np.ndarray]:
    """Random statistics in the shapes that the init needs.

    A matrix gets the same values in a stack and alone; covariances are positive definite.
    """
    layers = modules(nn.meta.unbox(case.params))
    shapes = {path: base_shape(layers, path, spec) for path, spec in case.layout.items()}
    found = {}
    for path, needed in needed_statistics(
        config, nn.meta.unbox(case.params), layout=case.layout
    ).items():
        names = enumerate(logical_paths(path, case.layout[path], shapes[path]))
        seeds = [zlib.crc32(name.encode()) + (i if name == path else 0) for i, name in names]
        drawn = np.stack(
            [np.random.default_rng(seed).normal(size=needed.shape[-2:]) for seed in seeds]
        )
        g = drawn.reshape(needed.shape).astype(np.float32)
        found[path] = g if config.init.startswith("lora") else g @ g.swapaxes(-1, -2)
    return found


def changes_base(method: str) -> bool:
    return method.startswith(("pissa", "milora", "olora", "loftq", "corda", "lora_ga"))


def distance(got: Array, want: Array) -> float:
    """The maximum difference, relative to the maximum value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())
