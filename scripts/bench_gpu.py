"""Benchmark training steps of 7B and 8B shapes on one GPU: tokens a second, and PEFT's beside them.

    python scripts/bench_gpu.py --peer PEER/bin/python

Random weights in bfloat16, adapters of rank 16 on all linear layers, AdamW, rows of 4,096 tokens,
all of which count. A variant is a process with the GPU to itself; a round runs each of them once.
"Share" is 4 · parameters · tokens / seconds beside the speed of a product of 8,192 × 8,192.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "qwen2_5_7b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
    },
    # For scripts/bench_starts.py.
    "qwen2_5_1_5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    # To try this script on a CPU.
    "tiny": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "rope_theta": 10000.0,
    },
}
COMMON = {
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
OURS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "qlora": {"format": "nf4"},
}
PEERS: dict[str, dict[str, Any]] = {
    "peft": {},
    "peft_checkpointing": {"checkpointing": True},
}
WARMUP, STEPS = 3, 8


def main() -> None:
    """Compare the variants, or be one of them (--variant)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama3_8b")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--remat", default="mlp", help="as model.remat, of our variants")
    parser.add_argument("--ceiling", type=int, default=8192, help="size of the square product")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", help="Python with torch, transformers and peft; none: ours alone")
    parser.add_argument("--variants", nargs="+", choices=[*OURS, *PEERS])
    parser.add_argument("--variant", choices=[*OURS, *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant is None:
        _compare(args)
        return
    prepare = _our_step if args.variant in OURS else _peer_step
    step, product, facts = prepare(args)
    for _ in range(WARMUP):
        step()
    seconds = [_timed(step) for _ in range(STEPS)]
    product()
    facts["seconds"] = statistics.median(seconds)
    facts["ceiling"] = 2 * args.ceiling**3 / min(_timed(product) for _ in range(STEPS))
    facts["peak"] = facts.pop("peak_of")()
    print(json.dumps(facts), flush=True)


def _compare(args: argparse.Namespace) -> None:
    """Run every variant once a round, and print a table."""
    names = args.variants or [*OURS, *(PEERS if args.peer else ())]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            python = args.peer if name in PEERS else sys.executable
            command = [python, __file__, "--variant", name]
            for option in ("shape", "rows", "tokens", "remat", "ceiling"):
                command += [f"--{option}", str(getattr(args, option))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name} failed, as said above", file=sys.stderr)
                continue
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    tokens = args.rows * args.tokens
    print(f"{args.shape}, {args.rows} × {args.tokens} tokens")
    print("| variant | seconds | tokens a second | TFLOP/s by 4 N | share | peak GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rounds in found.items():
        if not rounds:
            continue
        seconds = statistics.median(each["seconds"] for each in rounds)
        speed = 4 * rounds[0]["parameters"] * tokens / seconds
        share = speed / statistics.median(each["ceiling"] for each in rounds)
        peak = max(each["peak"] for each in rounds) / 1e9
        cells = [f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{speed / 1e12:.1f}"]
        cells += [f"{100 * share:.0f} %", f"{peak:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _our_step(args: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None], Any]:
    """A compiled step of this library, a product, and facts."""
    import jax
    import jax.numpy as jnp

    import lorax_ft as lft
    from lorax_ft.interop.huggingface import decoder_config
    from lorax_ft.models.model import CausalLM, abstract_params
    from lorax_ft.quant.kernels import quantize
    from lorax_ft.tree import flatten, unflatten

    changes = OURS[args.variant]
    decoder = decoder_config(
        COMMON | SHAPES[args.shape], source=args.shape, dtype="bfloat16", remat=args.remat
    )
    model = CausalLM(config=decoder)
    key = jax.random.key(0)
    leaves = {}
    parameters = 0
    for i, (path, shape) in enumerate(flatten(abstract_params(decoder)).items()):
        parameters += shape.size
        leaf = 0.02 * jax.random.normal(jax.random.fold_in(key, i), shape.shape, jnp.bfloat16)
        module, _, name = path.rpartition("/")
        linear = name == "kernel" and module in model.layout and model.layout[module].quantizable
        if "format" in changes and linear:
            leaf = quantize(leaf, format="nf4", double_quant=True, n_stack=leaf.ndim - 2, n_in=1)
        leaves[path] = leaf
    adapter = lft.AdapterConfig(rank=16, dora=changes.get("dora", False))
    params = lft.add_adapters(unflatten(leaves), adapter, layout=model.layout, key=key)
    trained, frozen = lft.partition(params)
    tx = lft.make_optimizer(lft.OptimConfig(), steps=1000)
    state = lft.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    shape = (1, args.rows, args.tokens)
    tokens = jax.random.randint(key, shape, 0, decoder.vocab_size)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "weights": jnp.ones(shape, jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(args.tokens, dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }
    loss = lft.supervised_loss(model, packed=False)
    train_step = jax.jit(lft.make_train_step(loss, tx, layout=model.layout), donate_argnums=0)
    compiled = train_step.lower(state, frozen, batch, key).compile()

    def step() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch, key))
        if not jnp.isfinite(metrics["loss"]):
            raise FloatingPointError("the loss is not finite")

    square = jnp.ones((args.ceiling, args.ceiling), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)

    def peak() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    facts = {"parameters": parameters, "device": jax.devices()[0].device_kind, "peak_of": peak}
    return step, lambda: multiply(square, square).block_until_ready(), facts


def _peer_step(args: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], None], Any]:
    """The same of PEFT, with the fused optimizer and scaled_dot_product_attention."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {name: value for name, value in SHAPES[args.shape].items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(SHAPES[args.shape]["model_type"], **COMMON | fields)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    if PEERS[args.variant].get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=device == "cuda")
    ids = torch.randint(0, config.vocab_size, (args.rows, args.tokens), device=device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        wait()

    square = torch.ones((args.ceiling, args.ceiling), dtype=torch.bfloat16, device=device)

    def product() -> None:
        torch.matmul(square, square)
        wait()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0

    kind = torch.cuda.get_device_name() if device == "cuda" else device
    facts = {"parameters": parameters, "device": kind, "peak_of": peak}
    return step, product, facts


if __name__ == "__main__":
    main()
