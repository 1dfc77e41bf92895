"""Arguments that scripts share: which model to load. Imports JAX only when it loads one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorax_ft.checks import check, parse_template_args
from lorax_ft.config import Config, ModelConfig, QuantConfig
from lorax_ft.data.conversation import Conversation, Message
from lorax_ft.data.tools import read_tools
from lorax_ft.files import read_text
from lorax_ft.inference.sampling import Sampling

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lorax_ft.models.model import LoadedModel
    from lorax_ft.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Which model to load: that of a training run, or a checkpoint with or without an adapter."""

    run: str | None = None
    """Output folder of a training run, such as out/pissa."""
    model: str | None = None
    """Hugging Face folder, .gguf file or hub id, instead of a run."""
    checkpoint: str | None = None
    """Checkpoint of --run to use instead of its saved adapter: latest, best or a step."""
    adapter: str | None = None
    """PEFT adapter folder to load on top of --model."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the weights; None is the run's dtype, or float32 with --model."""
    quant: Literal["none", "nf4", "int8"] = "none"
    """Quantize the kernels of --model; the base of a run is quantized as in training."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise ValueError("give either --run FOLDER or --model PATH")
        if self.checkpoint is not None and self.run is None:
            raise ValueError("--checkpoint goes with --run; a model has no checkpoints of a run")
        if self.adapter is not None and self.model is None:
            raise ValueError("--adapter goes with --model; a run has its own adapter")
        if self.quant != "none" and self.model is None:
            raise ValueError(
                "--quant goes with --model; a run uses the quantization it trained with"
            )

    def name_of(self, folder: str | Path) -> str:
        """What to call the contents of `folder` (see `locate`) in messages."""
        if self.checkpoint is None:
            return str(folder)
        return f"checkpoint {self.checkpoint} of {self.run}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatArgs(ModelArgs, Sampling):
    """Which model to load, and how it generates answers."""

    system: str | None = None
    """System message at the start of the conversation."""
    tools: str | None = None
    """JSON file with a list of function schemas, the tools that the model may call."""
    template_args: tuple[str, ...] = ()
    """Variables of the chat template, each as "name=value", such as "enable_thinking=false"."""
    max_new_tokens: int = 512
    """Maximum number of tokens of an answer."""
    seed: int = 0
    """Random seed for sampling."""

    def __post_init__(self) -> None:
        # super() would run only the checks of ModelArgs.
        ModelArgs.__post_init__(self)
        Sampling.__post_init__(self)
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be 0 or more and below 2^32")
        check(
            self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}; it must be above 0"
        )
        parse_template_args(self.template_args, "--template_args")

    def opening(self) -> Conversation:
        """The start of every conversation: system message, tools and template variables.

        Raises:
          ValueError: the file with the tools cannot be read.
        """
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        tools = None
        if self.tools is not None:
            tools = read_tools(self.tools, "--tools")
        return Conversation(
            messages=messages,
            tools=tools,
            template_args=parse_template_args(self.template_args, "--template_args"),
        )


def load_with_adapter(args: ModelArgs, *, mesh: Mesh | None = None) -> tuple[LoadedModel, Tree]:
    """Loads the model; returns it with its parameters, which include the adapter if there is one.

    Args:
      args: which model.
      mesh: to shard the weights over, unless they are of a checkpoint; None: one device.

    Raises:
      ValueError: the run, the model, the adapter or the checkpoint does not exist, the run has not
        finished and no checkpoint is given, or the adapter does not fit the model.
    """
    config, adapter = locate(args)
    # JAX takes seconds to import: --help and errors in the arguments should not wait for it.
    if args.run is not None and args.checkpoint is not None:
        from lorax_ft.run.checkpoints import resolve_checkpoint
        from lorax_ft.run.restored import load_checkpoint

        run = Path(args.run)
        step = resolve_checkpoint(run, args.checkpoint)
        print(f"checkpoint of step {step} of {run}", file=sys.stderr)
        return load_checkpoint(run, config, step=step)
    from lorax_ft.interop.load import load_model
    from lorax_ft.interop.new_tokens import with_tokens_of
    from lorax_ft.interop.peft import load_peft
    from lorax_ft.models.grouped import check_expert_axis

    shardings = None
    if mesh is not None:
        from lorax_ft.sharding import DECODER_RULES, base_sharding

        shardings = functools.partial(base_sharding, rules=DECODER_RULES, mesh=mesh)
    devices = 1 if mesh is None else mesh.shape["expert"]
    model = load_model(
        config.model.path,
        revision=config.model.revision,
        chat_template=config.model.chat_template,
        dtype=config.model.dtype,
        expert_products=config.model.expert_products,
        quant=config.quant,
        shardings=shardings,
        check=functools.partial(check_expert_axis, devices=devices, source=config.model.path),
    )
    if adapter is None:
        return model, model.params
    model = with_tokens_of(adapter, model)
    return model, load_peft(adapter, model)


def locate(args: ModelArgs) -> tuple[Config, Path | None]:
    """Finds the model without loading it.

    Returns:
      A config that says which model to load and how to quantize it, and the folder of the adapter,
      or None if the model is whole. With --checkpoint, the folder of the run's checkpoints stands
      for that of the adapter.

    Raises:
      ValueError: the run or the adapter does not exist, or the run has not finished and no
        checkpoint is given.
    """
    if args.run is not None:
        return _locate_run(Path(args.run), dtype=args.dtype, checkpoint=args.checkpoint)
    assert args.model is not None
    adapter = None
    if args.adapter is not None:
        adapter = check_contains(Path(args.adapter), "adapter", "adapter_config.json")
    model = ModelConfig(path=args.model, dtype=args.dtype or "float32")
    return Config(model=model, quant=QuantConfig(format=args.quant)), adapter


def _locate_run(
    run: Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None,
    checkpoint: str | None,
) -> tuple[Config, Path | None]:
    """The config and the adapter of a run."""
    config_file = check_contains(run, "run", "config.json") / "config.json"
    try:
        config = Config.from_json(read_text(config_file))
    except ValueError as error:
        # Checkpoints of transformers have a config.json, too.
        raise ValueError(
            f"{config_file} is not the config of a training run; if {run} is a model, use "
            f"--model {run}"
        ) from error
    model = dataclasses.replace(config.model, dtype=dtype or config.model.dtype)
    if checkpoint is not None:
        trains_adapter = bool(config.adapter.targets) or "all" not in config.adapter.train_whole
        checkpoints = run / "checkpoints"
        return dataclasses.replace(config, model=model), checkpoints if trains_adapter else None
    adapter = run / "adapter"
    if adapter.is_dir():
        # Some inits (PiSSA, LoftQ) subtract the initial adapter from the base and quantize the
        # difference. Quantizing the original would not give this base, so the run saves it.
        base = run / "nf4_base"
        if base.is_dir():
            model = dataclasses.replace(model, path=str(base), revision=None)
        return dataclasses.replace(config, model=model), adapter
    # Full fine-tuning saves a whole model instead of an adapter.
    whole = run / "model"
    if not whole.is_dir():
        raise ValueError(
            f"{run} has neither an adapter nor a model: its training has not finished"
            f"{_checkpoint_hint(run)}"
        )
    model = dataclasses.replace(model, path=str(whole), revision=None)
    return dataclasses.replace(config, model=model), None


def _checkpoint_hint(run: Path) -> str:
    """What to do with a run that was interrupted, for an error."""
    from lorax_ft.run.checkpoints import resolve_checkpoint  # JAX: only if there is an error

    try:
        step = resolve_checkpoint(run, "latest")
    except ValueError:
        return ", and it has saved no checkpoint; start it again with the same command"
    return (
        f"; give --checkpoint latest to use its state at step {step}, or continue it with the "
        "same command"
    )


def check_contains(folder: Path, content: str, marker: str) -> Path:
    """Returns the folder, which must contain the file `marker`.

    Raises:
      ValueError: it does not; the message suggests another folder.
    """
    if (folder / marker).is_file():
        return folder
    if folder.is_dir():
        raise ValueError(f"{folder} contains no {content}: {marker} is missing")
    others = sorted(path.parent.name for path in folder.parent.glob(f"*/{marker}"))
    similar = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.3) or others[:1]
    hint = ""
    if similar:
        hint = f"; did you mean {folder.parent / similar[0]}?"
    raise ValueError(f"there is no {content} at {folder}{hint}")
