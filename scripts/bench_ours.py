"""The variants of this library that `bench.py` measures, each in its own process.

python scripts/bench_ours.py VARIANT --model MODEL --batch 4 --tokens 256
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from bench_peft import INVOCATION, NEW, PROMPT, serve
from jax import Array

import lorax_ft as lft
from lorax_ft.interop.gguf import read_gguf
from lorax_ft.interop.huggingface import decoder_config, read_folder
from lorax_ft.lowrank.activation import with_invocation
from lorax_ft.models.decoder import Decoder
from lorax_ft.models.model import LoadedModel
from lorax_ft.tree import Tree

STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "rslora": {"adapter": {"scaling": "rank_stabilized"}},
    "lora_plus": {"optim": {"lora_plus_ratio": 16.0}},
    "pissa": {"adapter": {"init": "pissa"}},
    "dora": {"adapter": {"dora": True}},
    "qlora": {"quant": {"format": "nf4"}},
    "qlora_single": {"quant": {"format": "nf4", "double": False}},
    "qlora_int8": {"quant": {"format": "int8"}},
    "qdora": {"quant": {"format": "nf4"}, "adapter": {"dora": True}},
    "full": {"adapter": {"targets": (), "train_whole": ("all",)}},
    **{
        f"lora_remat_{remat}": {"model": {"remat": remat}}
        for remat in ("none", "products", "mlp", "full")
    },
}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "ia3": {"adapter": {"method": "ia3", "feedforward": ("down_proj",)}},
    "miss": {"adapter": {"method": "miss"}},
    "vera": {"adapter": {"method": "vera", "rank": 256}},
    "loha": {"adapter": {"method": "loha"}},
    "lokr": {"adapter": {"method": "lokr"}},
    "shira": {"adapter": {"method": "shira"}},
    "hira": {"adapter": {"method": "hira"}},
    "oft": {"adapter": {"method": "oft"}},
    "bottleneck": {"adapter": {"method": "bottleneck"}},
    "tokens": {"tokens": {"trained": 16}},
    "alora": {"invocation": {"ids": INVOCATION}},
    "prompt_tuning": {"adapter": {"targets": ()}, "prompt": {"kind": "prompt"}},
    "p_tuning": {"adapter": {"targets": ()}, "prompt": {"kind": "prompt", "encoder": "mlp"}},
    "p_tuning_v2": {"adapter": {"targets": ()}, "prompt": {"kind": "prefix"}},
    "prefix_tuning": {"adapter": {"targets": ()}, "prompt": {"kind": "prefix", "encoder": "mlp"}},
}
"""The other methods, each with as much as its default trains."""
INITS: dict[str, dict[str, Any]] = {
    "pissa_exact": {"init": "pissa"},
    "pissa_niter_4": {"init": "pissa", "svd_iterations": 4},
    "lora_start": {},
}
SERVES: dict[str, dict[str, Any]] = {
    "load": {"what": "load"},
    "load_nf4": {"what": "load", "quant": "nf4"},
    "load_int8": {"what": "load", "quant": "int8"},
    "decode_1": {"what": "decode", "rows": 1},
    "decode_8": {"what": "decode", "rows": 8},
    "merge": {"what": "merge"},
}
COMPILES = {f"lora_layers_{layers}": layers for layers in (2, 8, 30)}
PRODUCTS = 20  # matrix products per measurement of their speed
Facts = dict[str, Any]


def main() -> None:
    """Build a variant, then serve its calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=[*STEPS, *METHODS, *INITS, *SERVES, *COMPILES])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", required=True, type=int)
    parser.add_argument("--tokens", required=True, type=int)
    args = parser.parse_args()
    shape = (1, args.batch, args.tokens)
    if args.variant in INITS:
        start = _start(args.model, INITS[args.variant])
        serve(lambda: start, {})
    elif args.variant in SERVES:
        call = _serving(args.model, **SERVES[args.variant])
        serve(lambda: call, {})
    elif args.variant in STEPS or args.variant in METHODS:
        step, facts = _step(args.model, {**STEPS, **METHODS}[args.variant], shape)
        serve(lambda: step, facts)
    else:
        serve(lambda: lambda: None, _compiling(args.model, COMPILES[args.variant], shape))


def model_config(path: str) -> dict[str, Any]:
    """The config.json of a Hugging Face folder, or its equivalent from a .gguf file."""
    return read_gguf(Path(path))[0] if path.endswith(".gguf") else read_folder(Path(path))[0]


def make_product() -> Callable[[], float]:
    """A function that measures a float32 product [1024, 576] x [576, 1536] in GFLOP/s."""
    x, w = jnp.ones((1024, 576)), jnp.ones((576, 1536))
    product = jax.jit(jnp.matmul).lower(x, w).compile()

    def rate() -> float:
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            product(x, w).block_until_ready()
        return PRODUCTS * 2 * 1024 * 576 * 1536 / (time.perf_counter() - began) / 1e9

    return rate


def _step(
    path: str, changes: dict[str, dict[str, Any]], shape: tuple[int, ...]
) -> tuple[Callable[[], None], Facts]:
    """A compiled training step, and the time and memory of its compilation."""
    config = lft.Config(
        model=lft.ModelConfig(path=path, **changes.get("model", {})),
        adapter=lft.AdapterConfig(**{"rank": 8} | changes.get("adapter", {})),
        optim=lft.OptimConfig(**changes.get("optim", {})),
        quant=lft.QuantConfig(**changes.get("quant", {})),
        prompt=lft.PromptConfig(**changes.get("prompt", {})),
    )
    remat: Any = config.model.remat
    if remat == "auto":
        remat = "products"  # what a run of this size takes
    model = lft.load_model(path, dtype=config.model.dtype, remat=remat, quant=config.quant)
    tx = lft.make_optimizer(config.optim, steps=1000)
    virtual = 0
    if config.prompt.kind != "none":
        virtual = config.prompt.virtual_tokens
        key = jax.random.key(3)
        with_prompt = lft.add_soft_prompt(model.params, config.prompt, model, key=key)
        model = dataclasses.replace(model, params=with_prompt)
    if "tokens" in changes:
        ids = range(changes["tokens"]["trained"])
        with_tokens = lft.add_trainable_tokens(model.params, ids, model)
        model = dataclasses.replace(model, params=with_tokens)
    invocation = changes.get("invocation", {}).get("ids", ())
    if invocation:
        model = dataclasses.replace(model, params=with_invocation(model.params, invocation))
    state, frozen = _state(model, config.adapter, tx)
    # The parameters are in state and frozen; PiSSA changed the base, so this would be a copy.
    model = dataclasses.replace(model, params={})
    batch, key = _batch(model.config.vocab_size, shape, virtual=virtual), jax.random.key(2)
    batch["tokens"] = (
        batch["tokens"].at[..., : len(invocation)].set(jnp.array(invocation, jnp.int32))
    )
    compiled, facts = _compile(model, tx, state, frozen, batch)
    facts["trained"] = sum(leaf.size for leaf in jax.tree.leaves(state.trained)) / 1e6

    def step() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch, key))
        if not jnp.isfinite(metrics["loss"]):
            raise FloatingPointError("the loss is not finite")

    return step, facts


def _start(path: str, changes: dict[str, Any]) -> Callable[[], None]:
    """A function that adds adapters of rank 16."""
    model = lft.load_model(path)
    config = lft.AdapterConfig(rank=16, **changes)
    layout, key = model.layout, jax.random.key(1)
    return lambda: jax.block_until_ready(
        lft.add_adapters(model.params, config, layout=layout, key=key)
    )


def _serving(path: str, *, what: str, rows: int = 0, quant: Any = "none") -> Callable[[], Any]:
    """Loading, generating NEW tokens after PROMPT tokens per row, or merging rank-16 adapters."""
    if what == "load":
        return lambda: jax.block_until_ready(
            lft.load_model(path, quant=lft.QuantConfig(format=quant)).params
        )
    model = lft.load_model(path)
    if what == "merge":
        params = lft.add_adapters(
            model.params, lft.AdapterConfig(rank=16), layout=model.layout, key=jax.random.key(1)
        )
        return lambda: jax.block_until_ready(lft.merge_adapters(params, layout=model.layout))
    prompts = [list(range(100 + row, 100 + row + PROMPT)) for row in range(rows)]
    return lambda: lft.generate(model, model.params, prompts, max_new_tokens=NEW, stop_ids=())


def _compiling(path: str, layers: int, shape: tuple[int, ...]) -> Facts:
    """The cost of compiling LoRA's step for a number of layers, from shapes without weights."""
    remat = "products"
    sizes = dataclasses.replace(
        decoder_config(model_config(path), source=path, remat=remat), layers=layers
    )
    batch = _batch(sizes.vocab_size, shape)
    init = Decoder(sizes).init
    model = LoadedModel(
        config=sizes, params=jax.eval_shape(init, jax.random.key(0), batch["tokens"][0])["params"]
    )
    tx = lft.make_optimizer(lft.OptimConfig(), steps=1000)

    def start(params: Tree) -> tuple[lft.TrainState, Tree]:
        return _state(dataclasses.replace(model, params=params), lft.AdapterConfig(rank=8), tx)

    state, frozen = jax.eval_shape(start, model.params)
    return _compile(model, tx, state, frozen, batch)[1]


def _state(
    model: LoadedModel, config: lft.AdapterConfig, tx: optax.GradientTransformation
) -> tuple[lft.TrainState, Tree]:
    params = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(1))
    trained, frozen = lft.partition(params, whole=config.train_whole, freeze=config.freeze)
    return lft.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained)), frozen


def _compile(
    model: LoadedModel,
    tx: optax.GradientTransformation,
    state: lft.TrainState,
    frozen: Tree,
    batch: dict[str, Array],
) -> tuple[Any, Facts]:
    """The step, compiled ahead of time; seconds to trace and compile, and GB of temporaries."""
    jitted = jax.jit(
        lft.make_train_step(lft.supervised_loss(model, packed=False), tx, layout=model.layout),
        donate_argnums=0,
    )
    began = time.perf_counter()
    lowered = jitted.lower(state, frozen, batch, jax.random.key(2))
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    facts = {"trace": traced - began, "compile": done - traced}
    if memory := compiled.memory_analysis():  # some backends do not report it
        facts["temporaries"] = memory.temp_size_in_bytes / 1e9
    return compiled, facts


def _batch(vocabulary: int, shape: tuple[int, ...], *, virtual: int = 0) -> dict[str, Array]:
    """Random tokens `[1, B, T]`, one sample per row; all count in the loss.

    Behind as many virtual tokens of a soft prompt, which do not.
    """
    texts = jax.random.randint(jax.random.key(0), shape, 0, vocabulary)
    prompt = jnp.broadcast_to(vocabulary + jnp.arange(virtual), (*shape[:-1], virtual))
    tokens = jnp.concatenate([prompt, texts], axis=-1)
    shape = tokens.shape
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "weights": (tokens < vocabulary).astype(jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }


if __name__ == "__main__":
    main()
