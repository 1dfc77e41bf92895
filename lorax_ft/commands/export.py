"""Export a fine-tuned model for another program."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorax_ft import cli
from lorax_ft.config import load_config
from lorax_ft.interop.bucket import is_hub, is_remote, output_path, repo_id
from lorax_ft.run.model_args import ModelArgs, load_with_adapter, locate

if TYPE_CHECKING:
    from lorax_ft.models.model import LoadedModel, Model
    from lorax_ft.tree import Tree


LARGE_ERROR = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(ModelArgs):
    """Export a fine-tuned model for another program."""

    target: Literal["peft", "vllm", "hf", "gguf"]
    """Program that will load it: PEFT, vLLM, transformers (hf) or llama.cpp (gguf)."""
    output: str
    """Folder to write, local or on a bucket (gs://, s3://), or repository on the hub
    (hf://owner/name); for gguf, a local .gguf file."""
    max_lora_rank: int = 16
    """For vllm: the --max-lora-rank that you will start vLLM with."""
    as_lora: int | None = None
    """For peft and vllm: first replace any other adapter, or a model that was trained in full, by
    plain LoRA of this rank, the SVD of what it changed; prints the error."""
    base: str | None = None
    """For --as_lora of a --model that was trained in full: the model that it was trained from."""
    gguf_type: Literal["F16", "Q8_0"] = "Q8_0"
    """For gguf: data type of the weight matrices."""
    overwrite: bool = False
    """Replace what is at the output path."""


def main() -> None:
    """Parses the command line, then runs the command."""
    cli.run(export, Args)


def export(args: Args) -> None:
    """Loads the model and exports it."""
    output = output_path(args.output)
    _check(output, args)
    if is_hub(output):
        from lorax_ft.interop.hub import prepare_repo

        prepare_repo(output)
    model, params = load_with_adapter(args)
    if args.as_lora is not None:
        model, params = _as_lora(model, params, args, rank=args.as_lora)
    exported = _export(output, model, params, args)
    if is_hub(output) and exported == "adapter":
        from lorax_ft.interop.hub import missing_base

        warning = missing_base(model.source)
        if warning:
            print(warning)
    # What the user must know about the base, where it is quantized.
    if model.base == model.source:
        return
    if exported == "model":
        print(f"The base of the adapter is {model.base}; the merged model contains it dequantized.")
    else:
        print(
            f"The adapter was trained on {model.base}: load the base with the same quantization, "
            "as the answers differ with another."
        )


def _check(output: Path, args: Args) -> None:
    """Raises ValueError for what cannot be exported, before the model is loaded."""
    config, adapter = locate(args)
    _check_as_lora(args, whole=adapter is None)
    if adapter is None and args.target in ("peft", "vllm") and args.as_lora is None:
        raise ValueError(
            f"there is no adapter to export for {args.target}: "
            f"{args.name_of(config.model.path)} is a whole model; use --target hf, or --as_lora "
            "RANK for the difference from its base as LoRA"
        )
    if args.target == "gguf":
        if is_remote(output):
            raise ValueError(f"--output {output}: a .gguf file is written to a local disk only")
        if output.suffix != ".gguf":
            raise ValueError(f"--output {output} is not a .gguf file")
        if output.exists() and (output.is_dir() or not args.overwrite):
            raise ValueError(f"{output} exists; give another file, or --overwrite to replace it")
    elif is_hub(output):
        return
    elif output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder to write to")
    elif output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(
            f"{output} is not empty; give another folder, or --overwrite to replace what is in it"
        )


def _check_as_lora(args: Args, *, whole: bool) -> None:
    """Raises ValueError for options of --as_lora that contradict one another, or the model."""
    if args.as_lora is not None and args.as_lora < 1:
        raise ValueError(f"--as_lora is {args.as_lora}; it must be above 0")
    if args.as_lora is not None and args.target not in ("peft", "vllm"):
        raise ValueError(
            f"--as_lora makes an adapter, and --target {args.target} a whole model; leave it out"
        )
    needs_base = args.as_lora is not None and whole and args.run is None
    if needs_base and args.base is None:
        raise ValueError(
            f"--as_lora needs --base: the model that {args.model} was trained from in full"
        )
    if args.base is not None and not needs_base:
        raise ValueError(
            "--base is for --as_lora of a --model that was trained in full; leave it out"
        )


def _as_lora(
    model: LoadedModel, params: Tree, args: Args, *, rank: int
) -> tuple[LoadedModel, Tree]:
    """The base, and its parameters with plain LoRA in place of what was trained."""
    from lorax_ft.lowrank.approximate import as_lora

    base = model
    if locate(args)[1] is None:
        base = _base_of_whole(args, dtype=model.config.dtype)
        if base.config != model.config:
            raise ValueError(f"{model.source} and {base.source} are models of different shapes")
    lora, errors = as_lora(params, base.params, layout=model.layout, rank=rank)
    print(f"Plain LoRA of rank {rank}; relative error of ΔW by module:")
    for path, error in errors.items():
        print(f"  {path:<32} {error:.2%}")
    if max(errors.values()) > LARGE_ERROR:
        print("A higher rank has a smaller error; --target hf merges without one.")
    return base, lora


def _base_of_whole(args: Args, *, dtype: Literal["float32", "bfloat16"]) -> LoadedModel:
    """The model that a whole one was trained from: --base, or the model of the run."""
    from lorax_ft.interop.load import load_model

    if args.run is None:
        assert args.base is not None
        return load_model(args.base, dtype=dtype)
    source = load_config(Path(args.run) / "config.json").model
    return load_model(
        source.path,
        revision=source.revision,
        chat_template=source.chat_template,
        dtype=dtype,
    )


def _export(output: Path, model: Model, params: Tree, args: Args) -> Literal["adapter", "model"]:
    """Writes the output, prints how to load it, and returns whether it is an adapter or a model."""
    from lorax_ft.interop.model_card import training_notes_of
    from lorax_ft.interop.peft import save_peft
    from lorax_ft.interop.save import save_model
    from lorax_ft.interop.save_gguf import save_gguf

    notes = training_notes_of(_trained_folder(args))
    if args.target == "peft":
        save_peft(output, params, model, training_notes=notes)
        print(f"saved the adapter to {output}; {_way_to_load(params)}")
        return "adapter"
    if args.target == "vllm":
        return _export_for_vllm(output, model, params, args, notes=notes)
    if args.target == "hf":
        save_model(output, params, model, training_notes=notes)
        print(
            f"saved the merged model to {output}; load it with AutoModelForCausalLM.from_pretrained"
        )
    else:
        save_gguf(output, params, model, kind=args.gguf_type)
        print(
            f"saved the merged model to {output}, in {args.gguf_type}; run it with: "
            f"llama-cli -m {output}"
        )
    return "model"


def _way_to_load(params: Tree) -> str:
    """How to load an adapter's folder."""
    from lorax_ft.interop.peft_prompts import BESIDE
    from lorax_ft.lowrank.terms import terms_of
    from lorax_ft.models.soft_prompt import soft_prompt_of
    from lorax_ft.schema import is_adapter
    from lorax_ft.tree import flatten, modules

    prompt, others = soft_prompt_of(params)
    layers = modules(others).values()
    if any(term.merge is None for layer in layers for term in terms_of(layer)):
        return "PEFT has no bottleneck adapters; its README.md shows how lorax_ft loads it"
    if prompt and any(map(is_adapter, flatten(others))):
        return (
            f"its soft prompt lies in {BESIDE}, and PeftModel.from_pretrained would leave it out: "
            "README.md shows how to load both"
        )
    return "load it with PeftModel.from_pretrained"


def _trained_folder(args: Args) -> str | Path:
    """The folder of the adapter, or of the whole model, whose card tells of its training."""
    config, adapter = locate(args)
    return adapter or config.model.path


def _export_for_vllm(
    output: Path, model: Model, params: Tree, args: Args, *, notes: str
) -> Literal["adapter", "model"]:
    """`_export` for vLLM, which does not support every adapter."""
    from lorax_ft.interop.vllm import save_for_vllm

    exported = save_for_vllm(
        output, params, model, max_lora_rank=args.max_lora_rank, training_notes=notes
    )
    # vLLM takes the id of a repository.
    served = repo_id(output) if is_hub(output) else output
    if exported == "adapter":
        print(
            f"saved the adapter to {output}; serve it with: vllm serve {model.source} "
            f"--enable-lora --max-lora-rank {args.max_lora_rank} --lora-modules tuned={served}"
        )
    else:
        print(
            f"saved the merged model to {output}, because vLLM does not support this adapter; "
            f"serve it with: vllm serve {served}"
        )
    return exported
