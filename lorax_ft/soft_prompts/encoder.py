"""Encoders of soft prompts: while a prompt trains, it may be the output of a small network.

P-tuning (2103.10385) encodes a prompt by an MLP or a bidirectional LSTM, and prefix tuning
(2101.00190) a prefix by an MLP with one hidden layer, as in PEFT. What is saved is the output.

Shapes: V virtual tokens, D width of the model, H hidden width of the encoder, L layers, K key/value
heads, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.soft_prompts.door import ENCODER_INPUT, KEY, PROMPT, VALUE
from lorax_ft.tree import Layer, Shape, Tree, from_modules, modules

TO_PROMPT = ("encoder_to_prompt", "encoder_prompt_bias")
TO_PREFIX = ("encoder_to_prefix", "encoder_prefix_bias")
DENSE = (("encoder_kernel_0", "encoder_bias_0"), ("encoder_kernel_1", "encoder_bias_1"))
LSTM = (
    ("lstm_input_0", "lstm_hidden_0", "lstm_bias_0"),
    ("lstm_input_1", "lstm_hidden_1", "lstm_bias_1"),
)


def prompt_encoder_shapes(kind: str, *, tokens: int, width: int, hidden: int) -> dict[str, Shape]:
    """The leaves of an encoder, "mlp" or "lstm", of a prompt `[V, D]`."""
    shapes: dict[str, Shape] = {ENCODER_INPUT: (tokens, width)}
    if kind == "lstm":
        # Two layers of both directions, whose outputs stand beside one another.
        inputs = width
        for in_name, hidden_name, bias_name in LSTM:
            shapes[in_name] = (2, inputs, 4 * hidden)
            shapes[hidden_name] = (2, hidden, 4 * hidden)
            shapes[bias_name] = (2, 4 * hidden)
            inputs = 2 * hidden
        hidden = 2 * hidden
        kernels = [(DENSE[0], (hidden, hidden))]
    else:
        kernels = [(DENSE[0], (width, hidden)), (DENSE[1], (hidden, hidden))]
    for (kernel, bias), shape in kernels:
        shapes[kernel] = shape
        shapes[bias] = shape[1:]
    kernel, bias = TO_PROMPT
    return shapes | {kernel: (hidden, width), bias: (width,)}


def prefix_encoder_shapes(
    *, tokens: int, hidden: int, layers: int, heads: int, channels: int
) -> dict[str, Shape]:
    """The leaves of an encoder of a prefix; its input has the width K C, as in PEFT."""
    width = heads * channels
    (first, first_bias), _ = DENSE
    kernel, bias = TO_PREFIX
    outputs = (layers, 2, heads, channels)
    return {
        ENCODER_INPUT: (tokens, width),
        first: (width, hidden),
        first_bias: (hidden,),
        kernel: (hidden, *outputs),
        bias: outputs,
    }


def initial_encoder(shapes: dict[str, Shape], key: Array) -> Layer:
    """PyTorch's defaults, as in PEFT: N(0, 1) for the input, U(±1/√fan_in) for all else.

    The biases of a layer have the bound of its kernel; in an LSTM it is 1/√H.
    """
    leaves = {}
    for i, (name, shape) in enumerate(shapes.items()):
        own = jax.random.fold_in(key, i)
        if name == ENCODER_INPUT:
            leaves[name] = jax.random.normal(own, shape)
            continue
        bound = _fan_in(name, shapes) ** -0.5
        leaves[name] = jax.random.uniform(own, shape, minval=-bound, maxval=bound)
    return leaves


def encoded(params: Tree) -> Tree:
    """The parameters with what encoders compute in the place of the encoders' leaves."""
    layers = modules(params)
    found = {path: layer for path, layer in layers.items() if ENCODER_INPUT in layer}
    if not found:
        return params
    return from_modules(layers | {path: _encode(layer) for path, layer in found.items()})


def _encode(layer: Layer) -> Layer:
    """The leaves of a door from those of its encoder."""
    x = layer[ENCODER_INPUT]
    if TO_PREFIX[0] in layer:
        kernel, bias = (layer[name] for name in TO_PREFIX)
        hidden = jnp.tanh(_dense(layer, 0, x))
        prefix = jnp.einsum("vh,hlskc->slvkc", hidden, kernel) + bias.swapaxes(0, 1)[:, :, None]
        key, value = prefix
        return {KEY: key, VALUE: value}
    if LSTM[0][0] in layer:
        for names in LSTM:
            x = _bidirectional(x, *(layer[name] for name in names))
        x = jax.nn.relu(_dense(layer, 0, x))
    else:
        x = jax.nn.relu(_dense(layer, 0, x))
        x = jax.nn.relu(_dense(layer, 1, x))
    kernel, bias = (layer[name] for name in TO_PROMPT)
    return {PROMPT: x @ kernel + bias}


def _dense(layer: Layer, number: int, x: Array) -> Array:
    kernel, bias = DENSE[number]
    y: Array = x @ layer[kernel] + layer[bias]
    return y


def _bidirectional(x: Array, inputs: Array, hidden: Array, bias: Array) -> Array:
    """A layer of an LSTM in both directions: `[V, I]` to `[V, 2 H]`."""
    forward = _lstm(x, inputs[0], hidden[0], bias[0])
    backward = _lstm(x[::-1], inputs[1], hidden[1], bias[1])
    return jnp.concatenate([forward, backward[::-1]], axis=-1)


def _lstm(x: Array, inputs: Array, hidden: Array, bias: Array) -> Array:
    """`[V, I]` to `[V, H]`, with PyTorch's order of gates: input, forget, cell, output."""
    size = hidden.shape[0]

    def step(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(gates + h @ hidden, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros(size)
    _, outputs = lax.scan(step, (zeros, zeros), x @ inputs + bias)
    return outputs


def _fan_in(name: str, shapes: dict[str, Shape]) -> int:
    """What the bound of a leaf's start depends on."""
    for names in LSTM:
        if name in names:
            return shapes[names[1]][1]
    for kernel, bias in (*DENSE, TO_PROMPT, TO_PREFIX):
        if name in (kernel, bias):
            return shapes[kernel][0]
    raise ValueError(f"{name} is no leaf of an encoder")
