"""Measure how a training step's time and memory grow with rank, length, layers, rows, and more.

    python scripts/bench_growth.py --plot docs/growth.png

Random weights of SmolLM2's layer shape, LoRA on all linear layers, float32. One number grows at a
time; the others stay as in BASE. The slope of a row is that of a log-log plot between it and the
row before: 1 is proportional growth, 2 quadratic.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lorax_ft as lft
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models.model import CausalLM, abstract_params
from lorax_ft.plan.flops import count_flops
from lorax_ft.tree import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Size:
    """What may grow."""

    rank: int = 8
    tokens: int = 256
    layers: int = 6
    rows: int = 4
    adapters: int = 1
    """Adapters that train at once on a base, each with its own rows."""
    experts: int = 0
    """Experts of a layer, two of which are chosen; 0: a dense MLP."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes."""

    size: Size
    value: int
    """Of what grows."""
    seconds: float
    operations: float
    """Of matrix products."""
    temporaries: float
    """Bytes, as the compiler says: activations and gradients."""
    state: float
    """Bytes of the adapters and their moments."""


BASE = Size()
GROWTHS: dict[str, tuple[Size, tuple[int, ...]]] = {
    "rank": (BASE, (1, 8, 32, 128, 512)),
    "tokens": (dataclasses.replace(BASE, rows=1), (128, 256, 512, 1024, 2048, 4096)),
    "layers": (BASE, (3, 6, 12, 24, 48)),
    "rows": (BASE, (1, 2, 4, 8, 16)),
    "adapters": (dataclasses.replace(BASE, rows=1, tokens=64), (1, 2, 4, 8, 16)),
    "experts": (BASE, (2, 4, 8, 16, 32)),
}
STEPS = 5


def main() -> None:
    """Measure each growth, and print a table of all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--growths", nargs="+", choices=GROWTHS, default=[*GROWTHS])
    parser.add_argument("--remat", default="products", help="as model.remat")
    parser.add_argument("--plot", type=Path, help="file of a plot (.png)")
    args = parser.parse_args()
    found: dict[str, list[Cost]] = {}
    print("| grows | value | seconds | slope | GFLOP | slope | temporaries MB | slope | state MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in args.growths:
        base, values = GROWTHS[name]
        found[name] = []
        for value in values:
            print(f"{name} {value}", file=sys.stderr, flush=True)
            size = dataclasses.replace(base, **{name: value})
            found[name].append(_measure(size, value, args.remat))
            print(_row(name, found[name]), flush=True)
    if args.plot is not None:
        _plot(found, args.plot)


def _measure(size: Size, value: int, remat: str) -> Cost:
    """The median time of a step of this size, and what its program says."""
    step, arguments = _step(size, remat)
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    compiled = traced.lower().compile()
    state, *rest = arguments
    size_of_state = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, *rest))
        seconds.append(time.perf_counter() - began)
    return Cost(
        size=size,
        value=value,
        seconds=statistics.median(seconds[1:]),
        operations=count_flops(traced.jaxpr.jaxpr),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        state=size_of_state,
    )


def _step(size: Size, remat: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A training step, and its arguments: state, frozen, batch, key."""
    decoder = decoder_config(_fields(size), source="the benchmark", remat=remat)
    model = CausalLM(config=decoder)
    key = jax.random.key(0)
    leaves = {}
    for i, (path, leaf) in enumerate(flatten(abstract_params(decoder)).items()):
        leaves[path] = 0.02 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
    base = unflatten(leaves)
    adapter = lft.AdapterConfig(rank=size.rank)
    tx = lft.make_optimizer(lft.OptimConfig(), steps=1000)
    frozen = lft.partition(lft.add_adapters(base, adapter, layout=model.layout, key=key))[1]

    def new_state(key: Any) -> lft.TrainState:
        params = lft.add_adapters(base, adapter, layout=model.layout, key=key)
        trained, _ = lft.partition(params)
        return lft.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))

    shape: tuple[int, ...] = (1, size.rows, size.tokens)
    if size.adapters > 1:
        shape = (size.adapters, *shape)
    tokens = jax.random.randint(key, shape, 0, decoder.vocab_size)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "weights": jnp.ones(shape, jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(size.tokens, dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }
    loss = lft.supervised_loss(model, packed=False)
    step = lft.make_train_step(loss, tx, layout=model.layout)
    if size.adapters == 1:
        return step, (new_state(key), frozen, batch, key)
    keys = jax.random.split(key, size.adapters)
    states = jax.vmap(new_state)(keys)
    return jax.vmap(step, in_axes=(0, None, 0, 0)), (states, frozen, batch, keys)


def _fields(size: Size) -> dict[str, Any]:
    """The config.json of a model of this size."""
    fields: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    if size.experts:
        fields |= {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": 512,
            "num_local_experts": size.experts,
            "num_experts_per_tok": 2,
        }
    return fields


def _row(name: str, costs: Sequence[Cost]) -> str:
    cost = costs[-1]
    cells = [name, str(cost.value)]
    for measure, unit in (("seconds", 1.0), ("operations", 1e9), ("temporaries", 1e6)):
        cells += [f"{getattr(cost, measure) / unit:.4g}", _slope(costs, measure)]
    cells.append(f"{cost.state / 1e6:.4g}")
    return f"| {' | '.join(cells)} |"


def _slope(costs: Sequence[Cost], measure: str) -> str:
    """The slope of a log-log plot between the last two."""
    if len(costs) < 2:
        return ""
    before, last = costs[-2:]
    growth = math.log(getattr(last, measure) / getattr(before, measure))
    return f"{growth / math.log(last.value / before.value):.2f}"


def _plot(found: dict[str, list[Cost]], file: Path) -> None:
    """A panel for each growth: how many times the first value each cost is."""
    from matplotlib.figure import Figure

    lines = {
        "seconds": ("seconds", "o-", "#08519c"),
        "operations": ("products", "^-", "#238b45"),
        "temporaries": ("memory of temporaries", "s--", "#d94801"),
    }
    figure = Figure(figsize=(11, 6.5), dpi=120, layout="constrained")
    panels = figure.subplots(2, math.ceil(len(found) / 2), squeeze=False).flatten()
    for axes, (name, costs) in zip(panels, found.items(), strict=False):
        values = [cost.value for cost in costs]
        proportional = [value / values[0] for value in values]
        axes.plot(values, proportional, ":", color="gray", label="in proportion")
        for measure, (label, style, color) in lines.items():
            first = getattr(costs[0], measure)
            growth = [getattr(cost, measure) / first for cost in costs]
            axes.plot(values, growth, style, color=color, label=label)
        axes.set_title(name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.yaxis.set_major_formatter("{x:g} ×")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    main()
