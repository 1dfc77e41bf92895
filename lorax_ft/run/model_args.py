"""A tuned model from where a run left it, or from a model and an adapter. Imports JAX when it loads, not before."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorax_ft.checks import check
from lorax_ft.config import Config, ModelConfig, QuantConfig
from lorax_ft.inference.sampling import Sampling

if TYPE_CHECKING:
    from lorax_ft.models.model import Model
    from lorax_ft.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Where a model is: in a run, or at a path with or without an adapter."""

    run: str | None = None
    """Output folder of a training run, such as out/pissa."""
    model: str | None = None
    """Hugging Face folder, .gguf file or hub id, in place of a run."""
    adapter: str | None = None
    """PEFT folder of an adapter for --model."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights; None takes the run's, and float32 without a run."""
    quant: Literal["none", "nf4", "int8"] = "none"
    """Type of the kernels that --model is quantized to; a run's are as they were in training."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise ValueError("give either --run FOLDER or --model PATH")
        if self.adapter is not None and self.model is None:
            raise ValueError("--adapter goes with --model; a run has its own adapter")
        if self.quant != "none" and self.model is None:
            raise ValueError("--quant goes with --model; a run's base is as it was in training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatArgs(ModelArgs, Sampling):
    """A model that is asked something, and how it answers."""

    system: str | None = None
    """System message that comes first."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        ModelArgs.__post_init__(self)
        Sampling.__post_init__(self)
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be 0 or more and below 2^32")
        check(
            self.max_new_tokens > 0, f"max_new_tokens is {self.max_new_tokens}; it must be above 0"
        )


def load_with_adapter(tuned: ModelArgs) -> tuple[Model, Tree]:
    """The model, and its parameters with the adapter in them.

    Raises:
      ValueError: there is no such run, model or adapter, the run has not finished, or they do not fit each other.
    """
    config, adapter = locate(tuned)
    from lorax_ft.interop.load import load_model
    from lorax_ft.interop.peft import load_peft

    m = config.model
    model = load_model(
        m.path, revision=m.revision, dtype=m.dtype, attention=m.attention, quant=config.quant
    )
    return model, model.params if adapter is None else load_peft(adapter, model)


def locate(tuned: ModelArgs) -> tuple[Config, Path | None]:
    """Which model to load and how to quantize it, and the folder of its adapter or None; without loading anything.

    Raises:
      ValueError: there is no such run or adapter, or the run has not finished.
    """
    if tuned.model is not None:
        adapter = (
            None
            if tuned.adapter is None
            else _existing(Path(tuned.adapter), "adapter", "adapter_config.json")
        )
        model = ModelConfig(path=tuned.model, dtype=tuned.dtype or "float32")
        return Config(model=model, quant=QuantConfig(format=tuned.quant)), adapter
    assert tuned.run is not None
    run = _existing(Path(tuned.run), "run", "config.json")
    try:
        config = Config.from_json((run / "config.json").read_text(encoding="utf-8"))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{run} holds no run: its config.json is another; is it a model (--model {run})?"
        ) from error
    model = dataclasses.replace(config.model, dtype=tuned.dtype or config.model.dtype)
    adapter = run / "adapter" if (run / "adapter").is_dir() else None
    own = run / ("nf4_base" if adapter else "model")  # a base without its start; full fine-tuning
    if own.is_dir():
        model = dataclasses.replace(model, path=str(own), revision=None)
    if adapter or own.is_dir():
        return dataclasses.replace(config, model=model), adapter
    raise ValueError(
        f"{run} holds neither an adapter nor a model: its training has not come to an end"
    )


def _existing(folder: Path, what: str, marker: str) -> Path:
    """The folder, which holds the file `marker`."""
    if (folder / marker).is_file():
        return folder
    if folder.is_dir():
        raise ValueError(f"{folder} holds no {what}: there is no {marker} in it")
    others = sorted(path.parent.name for path in folder.parent.glob(f"*/{marker}"))
    near = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.3) or others[:1]
    raise ValueError(f"no {what} at {folder}" + (f"; beside it there is {near[0]}" if near else ""))
