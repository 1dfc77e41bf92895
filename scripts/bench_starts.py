"""Peak memory of the starts of adapters, at the shape of a real model with random weights.

    python scripts/bench_starts.py --shape qwen2_5_1_5b

Every variant is a process of its own: it makes the base in bfloat16 (in NF4 for QLoRA and LoftQ),
then starts adapters of rank 16 on all linear layers as a run does. "Beyond the base" is the largest
resident size after the base was made, without the size that the process had by then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_gpu import COMMON, SHAPES

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {"init": "pissa"},
    "pissa_niter_4": {"init": "pissa", "svd_iterations": 4},
    "qlora": {"format": "nf4"},
    "loftq": {"format": "nf4", "init": "loftq", "svd_iterations": 4},
    "eva": {"init": "eva", "svd_iterations": 4},
    "corda": {"init": "corda", "corda_mode": "ipm", "svd_iterations": 4},
}
STATUS = Path("/proc/self/status")


def main() -> None:
    """Measure the variants, or be one of them (--variant)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_1_5b")
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--batches", type=int, default=2, help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=512, help="of a batch, which has one row")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant is not None:
        print(json.dumps(_measure(args)), flush=True)
        return
    print("| start | base GB | beyond the base GB | seconds |")
    print("| --- | ---: | ---: | ---: |")
    for name in args.variants:
        command = [sys.executable, __file__, "--variant", name, "--shape", args.shape]
        command += ["--batches", str(args.batches), "--tokens", str(args.tokens)]
        if args.layers is not None:
            command += ["--layers", str(args.layers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name} failed, as said above", file=sys.stderr)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        cells = f"{found['base']:.2f} | {found['beyond']:.2f} | {found['seconds']:.0f}"
        print(f"| {name} | {cells} |", flush=True)


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """GB of the base, GB beyond it while adapters start, and the seconds of the start."""
    import jax

    import lorax_ft as lft
    from lorax_ft import sharding
    from lorax_ft.config import MeshConfig
    from lorax_ft.training.calibration import measured
    from lorax_ft.training.state import fresh_leaves

    fields = dict(VARIANTS[args.variant])
    mesh = sharding.make_mesh(MeshConfig())
    model = _model(args, mesh, quantized=fields.pop("format", None) == "nf4")
    config = lft.AdapterConfig(rank=16, **fields)
    batches = _batches(args, model.config.vocab_size)
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    # Resets the peak of this process (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        statistics = measured(model, config, batches)
        leaves = fresh_leaves(
            model,
            config,
            mesh=mesh,
            key=jax.random.key(1),
            statistics=statistics,
            donate=True,
        )
    jax.block_until_ready(leaves)
    seconds = time.perf_counter() - began
    return {"base": base / 1e9, "beyond": _status("VmHWM") - before, "seconds": seconds}


def _status(field: str) -> float:
    """A size of this process that Linux tells, in GB."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e9
    raise ValueError(f"{STATUS} has no {field}")


def _model(args: argparse.Namespace, mesh: Any, *, quantized: bool) -> Any:
    """The model with random parameters, made a matrix at a time."""
    import jax
    import jax.numpy as jnp

    from lorax_ft import sharding
    from lorax_ft.interop.huggingface import decoder_config
    from lorax_ft.lowrank.requantize import Original
    from lorax_ft.models.model import LoadedModel, abstract_params, decoder_layout
    from lorax_ft.quant.kernels import quantize
    from lorax_ft.quant.stream import streamed
    from lorax_ft.tree import flatten, unflatten

    shape = COMMON | SHAPES[args.shape]
    if args.layers is not None:
        shape["num_hidden_layers"] = args.layers
    decoder = decoder_config(shape, source=args.shape, dtype="bfloat16")
    layout = decoder_layout(decoder)
    leaves = {}
    originals: dict[str, Original] = {}
    for i, (path, leaf) in enumerate(flatten(abstract_params(decoder)).items()):
        module, _, name = path.rpartition("/")
        is_linear = name == "kernel" and module in layout and layout[module].quantizable
        stack = leaf.shape[:1] if path.startswith("layers/") else ()

        def original(
            index: tuple[int, ...], i: int = i, shape: tuple[int, ...] = leaf.shape[len(stack) :]
        ) -> np.ndarray:
            rng = np.random.default_rng((i, *index))
            return np.float32(0.02) * rng.standard_normal(shape, np.float32)

        if is_linear and quantized:

            def matrix(index: tuple[int, ...], read: Original = original) -> Any:
                w = jnp.asarray(read(index)).astype(jnp.bfloat16)
                return quantize(w, format="nf4", double_quant=True, n_stack=0, n_in=1)

            like = jax.eval_shape(
                lambda w: quantize(w, format="nf4", double_quant=True, n_stack=1, n_in=1),
                jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
            )
            on = sharding.base_sharding(path, like, sharding.DECODER_RULES, mesh=mesh)
            leaves[path] = streamed(matrix, stack=stack, like=like, on=on)
            originals[module] = original
            continue
        values = np.empty(leaf.shape, jnp.bfloat16)
        for index in np.ndindex(*stack):
            values[index] = original(index)
        place = sharding.base_sharding(path, leaf, sharding.DECODER_RULES, mesh=mesh)
        leaves[path] = jax.device_put(values, place)
        jax.block_until_ready(leaves[path])
    return LoadedModel(config=decoder, params=unflatten(leaves), originals=originals)


def _batches(args: argparse.Namespace, vocabulary: int) -> list[dict[str, np.ndarray]]:
    """Batches of one row of random tokens, all of which count."""
    rng = np.random.default_rng(0)
    shape = (1, args.tokens)
    batches = []
    for _ in range(args.batches):
        tokens = rng.integers(0, vocabulary, shape).astype(np.int32)
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=-1),
            "weights": np.ones(shape, np.float32),
            "positions": np.arange(args.tokens, dtype=np.int32)[None],
            "segment_ids": np.ones(shape, np.int32),
        }
        batches.append(batch)
    return batches


if __name__ == "__main__":
    main()
