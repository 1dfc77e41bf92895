"""Merge an adapter into its model.

    python scripts/merge.py --run out/pissa --output out/merged
    python scripts/merge.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter --output out/merged

The folder that it writes is a Hugging Face checkpoint, which transformers and vLLM load.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorax_ft import cli
from lorax_ft.inference.tuned import Tuned, load_tuned, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Tuned):
    """Merge an adapter into its model, as a folder that transformers and vLLM load."""

    output: str
    """Folder to write."""
    overwrite: bool = False
    """Replace the model that the output folder holds, if it holds one."""


def main(args: Args) -> None:
    """Loads, merges, saves."""
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder to write to")
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(f"{output} is not empty; give another folder, or --overwrite to replace the model in it")
    config, adapter = locate(args)
    if adapter is None:
        raise ValueError(f"there is nothing to merge: {config.path} is a whole model, without an adapter")
    model, params = load_tuned(args)
    from lorax_ft.interop.huggingface import save_model
    from lorax_ft.lowrank.adapters import merge_adapters

    save_model(output, merge_adapters(params), model)
    print(f"merged {adapter} into {config.path}: {output}")


if __name__ == "__main__":
    cli.run(main, Args)
