"""Merge an adapter into its model, or several with weights.

    python scripts/merge.py --run out/pissa --output out/merged
    python scripts/merge.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter my/adapter --output out/merged
    python scripts/merge.py --run out/pissa --also other/adapter --weights 0.7 0.3 --output out/merged

The folder that it writes is a Hugging Face checkpoint, which transformers loads.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from lorax_ft import cli
from lorax_ft.run.model_args import ModelArgs, load_with_adapter, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Merge an adapter into its model, or several with weights, as a folder that transformers loads."""

    output: str
    """Folder to write."""
    also: tuple[str, ...] = ()
    """PEFT folders of further adapters of the same model."""
    weights: tuple[float, ...] = ()
    """Strength of each adapter, the first one's first; none given merges each as it is."""
    overwrite: bool = False
    """Replace the model that the output folder holds, if it holds one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = 1 + len(self.also)
        if self.weights and len(self.weights) != count:
            raise ValueError(
                f"there are {count} adapters and {len(self.weights)} weights; give one for each"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights are {self.weights}; they must be finite")


def main(args: Args) -> None:
    """Loads, merges, saves."""
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder to write to")
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(
            f"{output} is not empty; give another folder, or --overwrite to replace the model in it"
        )
    config, adapter = locate(args)
    if adapter is None:
        raise ValueError(
            f"there is nothing to merge: {config.model.path} is a whole model, without an adapter"
        )
    model, params = load_with_adapter(args)
    from lorax_ft.interop.peft import load_peft
    from lorax_ft.interop.save import save_model
    from lorax_ft.lowrank.merge import merge_weighted

    if args.also or args.weights:
        adapted = [params, *(load_peft(folder, model) for folder in args.also)]
        weights = args.weights or (1.0,) * len(adapted)
        if model.without_start and not math.isclose(sum(weights), 1):
            raise ValueError(
                f"{model.source} lacks the start that its adapters begin with, so their weights must add up to 1, not "
                f"{sum(weights):g}"
            )
        params = merge_weighted(model.params, adapted, weights, layout=model.layout)
    save_model(output, params, model)
    base = model.base + (", dequantized" if model.base != model.source else "")
    print(f"merged {', '.join([str(adapter), *args.also])} into {base}: {output}")


if __name__ == "__main__":
    cli.run(main, Args)
