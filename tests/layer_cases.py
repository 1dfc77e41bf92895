"""One linear layer: its equations written out, random leaves, and its input after dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft import linear
from lorax_ft.tree import Tree


def reference(layer: dict[str, Array], x: Array, *, x_dropped: Array | None = None) -> Array:
    """The output y of a linear layer in float64, computed from the merged weight."""
    w, s = layer["kernel"], layer.get("lora_scale", 0.0)
    if "start_scale" in layer:
        w = w - layer["start_scale"] * layer["lora_a0"] @ layer["lora_b0"]
    change = s * layer["lora_a"] @ layer["lora_b"]
    dropped = x if x_dropped is None else x_dropped
    if "magnitude" not in layer:
        y = x @ w + dropped @ change
    else:
        g = layer["magnitude"] / jax.lax.stop_gradient(jnp.sqrt(jnp.sum((w + change) ** 2, axis=0)))
        y = x @ w + (g - 1) * (dropped @ w) + g * (dropped @ change)
    return y + layer["bias"]


def random_layer(
    rng: np.random.Generator, *, dora: bool, kept: bool, rows: int = 6, columns: int = 5
) -> Tree:
    shapes = {
        "kernel": (rows, columns),
        "bias": (columns,),
        "lora_a": (rows, 3),
        "lora_b": (3, columns),
    }
    if kept:
        shapes |= {"lora_a0": (rows, 3), "lora_b0": (3, columns)}
    if dora:
        shapes |= {"magnitude": (columns,)}
    layer = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {
        "lora_scale": np.asarray(0.7)
    }
    return layer | ({"start_scale": np.asarray(0.7)} if kept else {})


def dropped_input(drop: Tree, x: Array) -> Array:
    """The dropped-out input x̃, read from a layer whose adapter branch is the identity."""
    eye = jnp.eye(x.shape[-1])
    layer = {
        "kernel": (0 * eye).astype(x.dtype),
        "lora_a": eye,
        "lora_b": eye,
        "lora_scale": jnp.float32(1),
    }
    return linear(layer | drop, x, jnp.matmul)
