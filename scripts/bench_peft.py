"""The peers that `bench.py` measures: PEFT and plain torch, by default and at their fastest.

`bench.py` starts it with the Python of an environment that has torch, transformers and peft:

    PEER_PYTHON scripts/bench_peft.py VARIANT --model-config CONFIG.json --cores 2 \\
        --batch 4 --tokens 256

The weights are random, because the timings do not depend on them. The module level imports only the
standard library, because `bench.py` imports this file too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS: dict[str, dict[str, Any]] = {
    "peft_lora": {},
    "peft_lora_checkpointing": {"checkpointing": True},
    "peft_dora": {"dora": True},
    "peft_lora_bf16_autocast": {"bf16": True},
    "peft_lora_mkl_avx512": {"avx512": True},
    "torch_full": {"full": True},
}
PROJECTIONS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]
INVOCATION = [5, 6]
"""The tokens from which an activated LoRA acts: the first ones of each row."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft_ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "peft_miss": ("MissConfig", {"r": 8}),
    "peft_vera": ("VeraConfig", {"r": 256}),
    "peft_loha": ("LoHaConfig", {"r": 8}),
    "peft_lokr": ("LoKrConfig", {"r": 8}),
    "peft_shira": ("ShiraConfig", {"r": 8}),
    "peft_hira": ("HiraConfig", {"r": 8}),
    "peft_oft": ("OFTConfig", {"oft_block_size": 32}),
    "peft_tokens": (
        "LoraConfig",
        {"r": 8, "lora_alpha": 16, "trainable_token_indices": list(range(16))},
    ),
    "peft_alora": (
        "LoraConfig",
        {"r": 8, "lora_alpha": 16, "alora_invocation_tokens": INVOCATION},
    ),
    "peft_prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "peft_p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 20}),
    "peft_p_tuning_v2": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "peft_prefix_tuning": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 20, "prefix_projection": True},
    ),
}
"""PEFT's config of each of the other methods, on the same modules as ours."""
INITS: dict[str, dict[str, Any]] = {
    "peft_pissa": {"init_lora_weights": "pissa"},
    "peft_pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "peft_lora_start": {},
}
SERVES: dict[str, dict[str, Any]] = {
    "transformers_load": {"what": "load"},
    "transformers_decode_1": {"what": "decode", "rows": 1},
    "transformers_decode_8": {"what": "decode", "rows": 8},
    "peft_merge": {"what": "merge"},
}
PROMPT, NEW = 32, 64  # tokens
NOTES = {
    "peft_lora_bf16_autocast": "torch's autocast: bfloat16 matrix products, so different numbers",
    "peft_lora_mkl_avx512": "float32; MKL with AVX-512, by default only on Intel CPUs",
}
MKL_AVX512 = 12  # the lowest value of MKL_CBWR_Get_Auto_Branch that means AVX-512

# MKL uses AVX-512 only if these functions, which it exports, report an Intel processor.
SHIM = (
    "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"
)


def main() -> None:
    """Build a variant, then serve its calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=[*STEPS, *METHODS, *INITS, *SERVES])
    parser.add_argument("--model-config", required=True, type=Path)
    parser.add_argument("--model", required=True)
    for name in ("cores", "batch", "tokens"):
        parser.add_argument(f"--{name}", required=True, type=int)
    args = parser.parse_args()
    if STEPS.get(args.variant, {}).get("avx512"):
        _preload_shim()
    import peft
    import torch
    import transformers

    torch.set_num_threads(args.cores)
    torch.manual_seed(0)
    facts = {"versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)}}
    if args.variant == "transformers_load":
        serve(lambda: lambda: _load(args.model), facts)
        return
    sizes = json.loads(args.model_config.read_text())
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if args.variant in SERVES:
        serve(_serving(model, **SERVES[args.variant]), facts)
    elif args.variant in INITS:
        serve(_init(model, INITS[args.variant]), facts)
    else:
        options: dict[str, Any] = STEPS.get(args.variant, {"method": METHODS.get(args.variant)})
        step = _step(model, batch=args.batch, tokens=args.tokens, **options)
        serve(lambda: step, facts)


def serve(prepare: Callable[[], Callable[[], Any]], facts: dict[str, Any]) -> None:
    """Print `facts`, then run and time one call for each line of stdin.

    Args:
      prepare: returns the call to time, which blocks until its work is done; is not timed itself.
      facts: information about the variant.
    """
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        call = prepare()
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


def _step(
    model: Any,
    *,
    batch: int,
    tokens: int,
    full: bool = False,
    dora: bool = False,
    checkpointing: bool = False,
    bf16: bool = False,
    avx512: bool = False,
    method: tuple[str, dict[str, Any]] | None = None,
) -> Callable[[], None]:
    """A training step with AdamW on random tokens, all of which count in the loss."""
    import peft
    import torch

    if avx512:
        _check_avx512()
    if method is not None:
        name, fields = method
        on_tokens = "num_virtual_tokens" in fields
        targets = {} if on_tokens else {"target_modules": PROJECTIONS}
        model = peft.get_peft_model(
            model, getattr(peft, name)(task_type="CAUSAL_LM", **fields, **targets)
        )
    elif not full:
        lora = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora
        )
        model = peft.get_peft_model(model, lora)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    if method is not None:
        invocation = method[1].get("alora_invocation_tokens", [])
        ids[:, : len(invocation)] = torch.tensor(invocation, dtype=ids.dtype)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite")

    return step


def _init(model: Any, lora: dict[str, Any]) -> Callable[[], Callable[[], Any]]:
    """A function that adds adapters of rank 16 to a fresh copy of the model."""
    import peft

    config = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **lora
    )

    def prepare() -> Callable[[], Any]:
        fresh = copy.deepcopy(model)
        return lambda: peft.get_peft_model(fresh, config)

    return prepare


def _load(path: str) -> None:
    """Load a folder with its tokenizer, and read all weights, which are mapped from the file."""
    import torch
    import transformers

    transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.flatten()[::1024].sum()


def _serving(model: Any, *, what: str, rows: int = 0) -> Callable[[], Callable[[], Any]]:
    """Generating NEW tokens after PROMPT tokens per row, or merging rank-16 adapters."""
    import peft
    import torch

    if what == "merge":
        config = peft.LoraConfig(
            r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, config)

        def prepare() -> Callable[[], Any]:
            adapted.unmerge_adapter()
            return adapted.merge_adapter

        return prepare
    model.eval()
    ids = torch.stack([torch.arange(100 + row, 100 + row + PROMPT) for row in range(rows)])

    def decode() -> None:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    return lambda: decode


def _preload_shim() -> None:
    """Restart this process with the shim loaded before torch's MKL; needs a C compiler."""
    if "LD_PRELOAD" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="bench_mkl_"))
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True
    )
    os.execve(
        sys.executable,
        [sys.executable, *sys.argv],
        os.environ | {"LD_PRELOAD": str(folder / "shim.so")},
    )


def _check_avx512() -> None:
    """Raise RuntimeError unless torch's MKL uses AVX-512."""
    import ctypes

    import torch

    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    branch = library.mkl_serv_cbwr_get_auto_branch()
    if branch < MKL_AVX512:
        raise RuntimeError(f"MKL did not take its AVX-512 path (branch {branch})")


if __name__ == "__main__":
    main()
