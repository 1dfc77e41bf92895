"""Logits of both sides for the tests with PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lorax_ft.models.model import Model
from lorax_ft.tree import Tree

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 15))


def our_logits(model: Model, params: Tree) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(TOKENS)))(params))


def their_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()
