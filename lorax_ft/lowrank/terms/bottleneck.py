"""Bottleneck adapters: a small network behind a layer (1902.00751, 2005.00247) or beside it.

    y = h + max(0, ũ A + a) B + b,    h = x W + b₀,    u = h behind the layer, or x beside it

Houlsby's stand behind o_proj and down_proj, Pfeiffer's behind down_proj alone; beside a layer it is
the parallel adapter (2110.04366), which differs from LoRA by the ReLU and the biases. Its paper has
it beside the whole MLP: h is then what a module computes of its one input, whatever is inside. No
kernel can hold them, so they are merged into nothing. Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_ft.lowrank.inits.context import within_ranks
from lorax_ft.lowrank.inits.random import uniform_a
from lorax_ft.lowrank.keys import drawn
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import low_rank
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term, check_dense
from lorax_ft.mesh_axes import in_auto_axes
from lorax_ft.tree import Layer, Shape

BEHIND, BESIDE = "bottleneck_a_output", "bottleneck_a_input"
B = "bottleneck_b"
BIAS_A, BIAS_B = "bottleneck_bias_a", "bottleneck_bias_b"
ACTIVE = "bottleneck_active"


def planned(plan: Plan) -> tuple[str, ...]:
    """A, B and their biases, where the method is a bottleneck."""
    if plan.config.method != "bottleneck":
        return ()
    if plan.spec.module != "block":
        check_dense(plan)
    a = BEHIND if plan.config.bottleneck_input == "output" else BESIDE
    return (a, B, BIAS_A, BIAS_B, ACTIVE)


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """A uniform in ±1/√inputs as LoRA's, and B and the biases 0: the base is unchanged at first."""
    if ACTIVE not in shapes:
        return {}
    name = BEHIND if BEHIND in shapes else BESIDE
    inputs = plan.columns if name == BEHIND else plan.rows
    sample_a = functools.partial(uniform_a, rows=inputs, rank=plan.width)
    drawn_a = drawn(key, plan.paths, name, sample_a)
    zeros = jnp.zeros((len(plan.paths), plan.width, plan.columns), jnp.float32)
    a, b = within_ranks((drawn_a, zeros), plan.ranks.reshape(-1))
    return {
        name: a.reshape(shapes[name]),
        B: b.reshape(shapes[B]),
        BIAS_A: jnp.zeros(shapes[BIAS_A], jnp.float32),
        BIAS_B: jnp.zeros(shapes[BIAS_B], jnp.float32),
        ACTIVE: jnp.asarray(plan.ranks > 0, jnp.float32),
    }


def with_bottleneck(
    layer: Layer,
    x: Array,
    y: Array,
    *,
    precision: lax.PrecisionLike = None,
) -> Array:
    """h + max(0, ũ A + a) B + b, of a layer or of a whole module.

    Args:
      layer: the bottleneck's leaves.
      x: the input, `[..., I]`.
      y: h, `[..., O]`.
      precision: of the products.
    """
    change = functools.partial(_with_bottleneck, precision=precision)
    # Not the modules inside a module.
    leaves = {name: leaf for name, leaf in layer.items() if not isinstance(leaf, Mapping)}
    result: Array = in_auto_axes(change, leaves, x, y, like=lambda layer, x, y: y)
    return result


def _with_bottleneck(layer: Layer, x: Array, y: Array, precision: lax.PrecisionLike) -> Array:
    u, a = (y, layer[BEHIND]) if BEHIND in layer else (x, layer[BESIDE])

    def dense(u: Array, kernel: Array, bias: Array) -> Array:
        product_with_kernel = jnp.matmul(u, kernel.astype(y.dtype), precision=precision)
        return product_with_kernel + bias.astype(y.dtype)

    hidden = jax.nn.relu(dense(dropped(layer, u).astype(y.dtype), a, layer[BIAS_A]))
    change = dense(hidden, layer[B], layer[BIAS_B])
    # 0 for the layers of a stack that have none; their bias would train otherwise.
    return y + layer[ACTIVE].astype(y.dtype) * change


def after(layer: Layer, x: Array, y: Array, product: Product) -> Array:
    """The output of a layer with its bottleneck."""
    return with_bottleneck(layer, x, y, precision=product.precision)


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    a = layer[BEHIND] if BEHIND in layer else layer[BESIDE]
    return low_rank.used_ranks(a, layer[B], layer[ACTIVE])


TERM = Term(
    leaves=(B, BIAS_A, BIAS_B, ACTIVE),
    one_of=(BEHIND, BESIDE),
    active=ACTIVE,
    takes_dropout=True,
    planned=planned,
    initial=initial,
    after=after,
    merge=None,
    ranks=ranks,
)
