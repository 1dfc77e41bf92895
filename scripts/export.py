"""Write a tuned model for another program.

    python scripts/export.py --run out/pissa --target vllm --output out/served
    python scripts/export.py --run out/pissa --target gguf --output out/tuned.gguf

peft: the adapter as a PEFT folder. vllm: an adapter that vLLM serves, or the merged model where it cannot (DoRA).
hf: the merged model as a folder for transformers. gguf: the merged model as a file for llama.cpp.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from lorax_ft import cli
from lorax_ft.run.model_args import ModelArgs, load_with_adapter, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Write a tuned model for another program."""

    target: Literal["peft", "vllm", "hf", "gguf"]
    """What will read it: PEFT, vLLM, transformers, or llama.cpp."""
    output: str
    """Folder to write; a .gguf file for gguf."""
    max_lora_rank: int = 16
    """vllm: what it is started with (--max-lora-rank)."""
    gguf_type: Literal["F16", "Q8_0"] = "Q8_0"
    """gguf: type of the matrices."""
    overwrite: bool = False
    """Replace what is at the output."""


def main(args: Args) -> None:
    """Loads, converts, writes."""
    output = Path(args.output)
    _check(output, args)
    model, params = load_with_adapter(args)
    from lorax_ft.interop.peft import save_peft
    from lorax_ft.interop.save import save_model
    from lorax_ft.interop.save_gguf import save_gguf
    from lorax_ft.interop.vllm import save_for_vllm

    quantized, merged = model.base != model.source, True
    if args.target == "peft":
        save_peft(output, params, model)
        print(f"{output}: an adapter for PeftModel.from_pretrained")
        merged = False
    elif args.target == "vllm":
        if save_for_vllm(output, params, model, max_lora_rank=args.max_lora_rank) == "adapter":
            print(
                f"{output}: an adapter; vllm serve {model.source} --enable-lora --max-lora-rank {args.max_lora_rank} "
                f"--lora-modules tuned={output}"
            )
            merged = False
        else:
            print(
                f"{output}: the merged model, as vLLM has no form for this adapter; vllm serve {output}"
            )
    elif args.target == "hf":
        save_model(output, params, model)
        print(f"{output}: the merged model for AutoModelForCausalLM.from_pretrained")
    else:
        save_gguf(output, params, model, kind=args.gguf_type)
        print(f"{output}: the merged model in {args.gguf_type}; llama-cli -m {output}")
    if quantized and merged:
        print(f"The adapter's base is {model.base}; what is merged has that, dequantized.")
    elif quantized:
        print(
            f"The adapter was trained on {model.base}: load the base in that, as on another its answers differ."
        )


def _check(output: Path, args: Args) -> None:
    """Refuses what cannot be written, before anything is loaded."""
    _, adapter = locate(args)
    if adapter is None and args.target in ("peft", "vllm"):
        raise ValueError(
            f"there is no adapter to export for {args.target}: it is a whole model; take --target hf"
        )
    if args.target == "gguf":
        if output.suffix != ".gguf":
            raise ValueError(f"--output {output} is no .gguf file")
        if output.exists() and (output.is_dir() or not args.overwrite):
            raise ValueError(f"{output} exists; give another file, or --overwrite to replace it")
    elif output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder to write to")
    elif output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(
            f"{output} is not empty; give another folder, or --overwrite to replace what is in it"
        )


if __name__ == "__main__":
    cli.run(main, Args)
