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

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.plan.chips import parse_topology
from lorax_ft.plan.program import (
    abstract_arguments,
    compile_traced,
    make_mesh,
    make_model,
    trace,
)
from lorax_ft.tree import Tree, split


def main() -> None:
    """The first argument is JSON: topology, config (`Config.to_json`), a model's config.json."""
    options = json.loads(sys.argv[1])
    config = Config.from_json(json.dumps(options["config"]))
    topology = parse_topology(options["topology"])
    model = make_model(options["decoder"], config, topology, source="the test")
    mesh = make_mesh(config, topology)
    shapes = abstract_arguments(model, config, mesh)
    state, frozen = shapes.state, shapes.frozen
    kernels, _ = split(frozen, lambda path: path.endswith(("/kernel", "/embedding")))
    began = time.perf_counter()
    compiled, text = compile_traced(trace(model, config, mesh, shapes), mesh)
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
        "kernel_bytes_a_chip": sharding.bytes_a_device(kernels),
        "state_bytes": total_bytes(state),
        "frozen_bytes_a_chip": sharding.bytes_a_device(frozen),
        "state_bytes_a_chip": sharding.bytes_a_device(state),
        "gathered": gathered(text),
        "splash": "splash" in text,
        "token_pairs": token_pairs(text, config),
        "kernels": sorted({tuple(leaf.shape) for leaf in jax.tree.leaves(kernels)}),
    }
    print(json.dumps(report))


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


def token_pairs(text: str, config: Config) -> list[tuple[int, ...]]:
    """The distinct shapes with a number for each query and key, such as those of masks and scores.

    A device has its own part of a row's queries, and the keys of whole rows.
    """
    keys = config.data.max_length
    assert isinstance(keys, int)
    queries = keys // config.mesh.context
    shapes = set()
    for numbers in re.findall(r"\w+\[([\d,]+)\]", text):
        shape = tuple(map(int, numbers.split(",")))
        others = list(shape)
        if keys in others:
            others.remove(keys)
            if keys in others or queries in others:
                shapes.add(shape)
    return sorted(shapes)


def total_bytes(tree: Tree) -> int:
    """The size of all leaves of a tree in bytes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
