"""Merge an adapter into its base model, or several adapters with weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from lorax_ft import cli
from lorax_ft.interop.bucket import is_hub, output_path
from lorax_ft.program import command
from lorax_ft.run.model_args import ModelArgs, check_contains, load_with_adapter, locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Merge an adapter into its base model, or several adapters with weights."""

    output: str
    """Folder, local or on a bucket (gs://, s3://), or repository on the hub (hf://owner/name), to
    save the merged model to, as a Hugging Face checkpoint."""
    also: tuple[str, ...] = ()
    """PEFT folders of more adapters of the same model."""
    weights: tuple[float, ...] = ()
    """Weight of each adapter, starting with that of --run or --adapter; by default each is 1."""
    overwrite: bool = False
    """Replace the model in the output folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = 1 + len(self.also)
        if self.weights and len(self.weights) != count:
            raise ValueError(
                f"--weights has {len(self.weights)} values for {count} adapters; give one for each"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights are {self.weights}; they must be finite")


def main() -> None:
    """Parses the command line, then runs the command."""
    cli.run(merge, Args)


def merge(args: Args) -> None:
    """Loads the model, merges the adapters and saves the result."""
    output = output_path(args.output)
    # Check all that can be checked before loading the model, which takes long.
    _check_output(output, overwrite=args.overwrite)
    config, adapter = locate(args)
    if adapter is None and args.run is None:
        raise ValueError("there is no adapter to merge; give its folder with --adapter")
    if adapter is None:
        raise ValueError(
            f"there is no adapter to merge: {args.name_of(config.model.path)} is a whole model; "
            f"save it with {command('export')} --target hf"
        )
    for folder in args.also:
        check_contains(Path(folder), "adapter", "adapter_config.json")
    if is_hub(output):
        from lorax_ft.interop.hub import prepare_repo

        prepare_repo(output)
    model, params = load_with_adapter(args)
    from lorax_ft.interop.model_card import training_notes_of
    from lorax_ft.interop.peft import load_peft
    from lorax_ft.interop.save import save_model
    from lorax_ft.lowrank.merge import merge_weighted

    if args.also or args.weights:
        adapted = [params, *(load_peft(folder, model) for folder in args.also)]
        weights = args.weights or (1.0,) * len(adapted)
        # Only a sum of 1 adds the initial value back that the base lacks, and exactly once.
        if model.without_start and not math.isclose(sum(weights), 1):
            raise ValueError(
                f"{model.source} is the base minus its adapters' initial value, so their weights "
                f"must add up to 1, not {sum(weights):g}"
            )
        params = merge_weighted(model.params, adapted, weights, layout=model.layout)
    save_model(output, params, model, training_notes=training_notes_of(adapter))
    base = model.base
    if model.base != model.source:
        base += ", dequantized"
    print(f"merged {', '.join([args.name_of(adapter), *args.also])} into {base}; saved to {output}")


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Raises ValueError if the output folder cannot be written."""
    if is_hub(output):
        return
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder to write to")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"{output} is not empty; give another folder, or --overwrite to replace the model in it"
        )
