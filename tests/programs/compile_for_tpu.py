"""Compile a training step ahead of time for a TPU topology, and print its memory as JSON.

    TPU_SKIP_MDS_QUERY=1 python tests/programs/compile_for_tpu.py \\
        '{"topology": "v5e:2x2", "config": {...}, ...}'

Needs libtpu (the extra tpu-compile), but no TPU. It is a separate process, because libtpu prints
messages whenever JAX starts.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.models.model import CausalLM, abstract_params
from lorax_ft.quant.kernels import quantize
from lorax_ft.training.losses import supervised_loss
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.state import abstract_state
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import Tree, flatten, split, unflatten


def main() -> None:
    """The first argument is JSON: topology, config (`Config.to_json`), a model's config.json."""
    options = json.loads(sys.argv[1])
    config = Config.from_json(json.dumps(options["config"]))
    m = config.model
    # Given by name, because auto looks at the backend of this process, which is a CPU.
    decoder = decoder_config(
        options["decoder"], source="the test", dtype=m.dtype, attention="xla", remat=m.remat
    )
    model = CausalLM(config=decoder)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options["topology"])
    mesh = sharding.make_mesh(config.mesh, devices=topology.devices)
    state, frozen, batch = abstract_arguments(model, config, mesh)
    kernels, _ = split(frozen, lambda path: path.endswith(("/kernel", "/embedding")))
    began = time.perf_counter()
    compiled = compile_step(model, config, mesh, state, frozen, batch)
    memory = compiled.memory_analysis()
    report = {
        "seconds": time.perf_counter() - began,
        "chips": mesh.size,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "frozen_bytes": total_bytes(frozen),
        "kernel_bytes": total_bytes(kernels),
        "kernel_bytes_a_chip": bytes_a_chip(kernels),
        "state_bytes": total_bytes(state),
        "frozen_bytes_a_chip": bytes_a_chip(frozen),
        "state_bytes_a_chip": bytes_a_chip(state),
        "gathered": gathered(compiled.as_text()),
        "kernels": sorted({tuple(leaf.shape) for leaf in jax.tree.leaves(kernels)}),
    }
    print(json.dumps(report))


def abstract_arguments(
    model: CausalLM, config: Config, mesh: Mesh
) -> tuple[TrainState, Tree, Tree]:
    """The shapes and shardings of the state, the frozen leaves and the batch."""
    base = {
        path: _base_leaf(path, leaf, config, model)
        for path, leaf in flatten(abstract_params(model.config)).items()
    }
    tx = make_optimizer(config.optim, steps=100)
    state, frozen = abstract_state(
        unflatten(base), config.adapter, tx, layout=model.layout, mesh=mesh
    )
    train = config.train
    shape = (train.microbatches, train.batch_size // train.microbatches, config.data.max_length)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    dtypes |= {"positions": jnp.int32, "segment_ids": jnp.int32}
    batch_place = sharding.batch_sharding(mesh, microbatched=True)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_place)
        for name, dtype in dtypes.items()
    }
    return state, frozen, batch


def _base_leaf(path: str, leaf: Any, config: Config, model: CausalLM) -> Any:
    leaf = jax.ShapeDtypeStruct(leaf.shape, config.model.dtype)
    q = config.quant
    module, _, name = path.rpartition("/")
    # A convolution has a kernel, but no place in the layout.
    is_linear = name == "kernel" and module in model.layout
    is_kernel = is_linear and model.layout[module].quantizable
    if q.format == "none" or not is_kernel:
        return leaf
    n = leaf.ndim - 2
    return jax.eval_shape(
        lambda w: quantize(w, format=q.format, double_quant=q.double, n_stack=n, n_in=1), leaf
    )


def compile_step(
    model: CausalLM, config: Config, mesh: Mesh, state: TrainState, frozen: Tree, batch: Tree
) -> Any:
    """The step, compiled as `lorax_ft.run.setup.compile_step` does it."""
    loss = supervised_loss(
        model,
        packed=config.data.pack,
        dropout=config.adapter.dropout,
        neftune_alpha=config.train.neftune_alpha,
    )
    tx = make_optimizer(config.optim, steps=100)
    step = make_train_step(loss, tx, layout=model.layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding.replicated(mesh))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    with jax.set_mesh(mesh):
        return jitted.lower(state, frozen, batch, key).compile()


def gathered(text: str) -> list[list[int]]:
    """The distinct result shapes of the all-gathers in a compiled program."""
    shapes: set[tuple[int, ...]] = set()
    for line in text.splitlines():
        result, found, _ = line.partition(" all-gather")
        if found and " = " in line:
            shapes |= {
                tuple(map(int, s.split(",")))
                for s in re.findall(r"\w+\[([\d,]+)\]", result.split(" = ", 1)[1])
            }
    return sorted(map(list, shapes))


def total_bytes(tree: Tree) -> int:
    """The size of all leaves of a tree in bytes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_a_chip(tree: Tree) -> int:
    """The size of a tree's shards on one device in bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


if __name__ == "__main__":
    main()
