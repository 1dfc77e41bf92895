"""lorax_ft: fine-tuning of language models in JAX with LoRA and everything that grew from it.

Names are imported when they are first used, so that `import lorax_ft` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax_ft.config import (
        AdapterConfig,
        Config,
        DataConfig,
        EvalConfig,
        MeshConfig,
        ModelConfig,
        OptimConfig,
        PromptConfig,
        QuantConfig,
        TrainConfig,
        load_config,
    )
    from lorax_ft.deprecated import switched_off
    from lorax_ft.inference.generate import generate, stream
    from lorax_ft.inference.sampling import Sampling
    from lorax_ft.inference.texts import answer, stream_texts
    from lorax_ft.interop.adapter_folder import load_adapter, save_adapter
    from lorax_ft.interop.load import load_model
    from lorax_ft.interop.new_tokens import add_tokens, with_tokens_of
    from lorax_ft.interop.peft import load_peft, save_peft
    from lorax_ft.interop.save import save_model, save_quantized
    from lorax_ft.lowrank.activation import with_invocation
    from lorax_ft.lowrank.adapters import (
        abstract_adapters,
        add_adapters,
        attach_adapters,
        disable_adapters,
        with_dropout,
        with_norms,
    )
    from lorax_ft.lowrank.groups import label, partition
    from lorax_ft.lowrank.inits.context import InitContext, InitResult
    from lorax_ft.lowrank.intercept import adapt
    from lorax_ft.lowrank.layout import layout
    from lorax_ft.lowrank.linear import linear, merged_kernel
    from lorax_ft.lowrank.merge import merge_adapters, merge_weighted, unmerge_adapters
    from lorax_ft.lowrank.nnx.model import from_nnx
    from lorax_ft.lowrank.quantize import quantize_base
    from lorax_ft.models.soft_prompt import add_soft_prompt
    from lorax_ft.models.trainable_tokens import add_trainable_tokens
    from lorax_ft.run.log import plot_losses
    from lorax_ft.sweep.rate import train
    from lorax_ft.training.calibration import calibrate
    from lorax_ft.training.head_loss import head_loss
    from lorax_ft.training.losses import supervised_loss
    from lorax_ft.training.optimizer import make_optimizer
    from lorax_ft.training.step import TrainState, make_eval_step, make_train_step
    from lorax_ft.tree import combine

_ROOMS = {
    "config": (
        *("AdapterConfig", "Config", "DataConfig", "EvalConfig", "MeshConfig", "ModelConfig"),
        *("OptimConfig", "PromptConfig", "QuantConfig", "TrainConfig", "load_config"),
    ),
    "tree": ("combine",),
    # With their old forms of calls; in 0.2 they come from their own modules.
    "deprecated": (
        *("attach_adapters", "disable_adapters", "make_eval_step", "make_train_step"),
        *("merge_adapters", "merge_weighted", "switched_off", "unmerge_adapters", "with_norms"),
    ),
    "lowrank.activation": ("with_invocation",),
    "lowrank.adapters": ("abstract_adapters", "add_adapters", "with_dropout"),
    "lowrank.groups": ("label", "partition"),
    "lowrank.inits.context": ("InitContext", "InitResult"),
    "lowrank.intercept": ("adapt",),
    "lowrank.layout": ("layout",),
    "lowrank.linear": ("linear", "merged_kernel"),
    "lowrank.nnx.model": ("from_nnx",),
    "lowrank.quantize": ("quantize_base",),
    "interop.adapter_folder": ("load_adapter", "save_adapter"),
    "interop.load": ("load_model",),
    "interop.new_tokens": ("add_tokens", "with_tokens_of"),
    "interop.peft": ("load_peft", "save_peft"),
    "interop.save": ("save_model", "save_quantized"),
    "models.soft_prompt": ("add_soft_prompt",),
    "models.trainable_tokens": ("add_trainable_tokens",),
    "inference.generate": ("generate", "stream"),
    "inference.sampling": ("Sampling",),
    "inference.texts": ("answer", "stream_texts"),
    "training.calibration": ("calibrate",),
    "training.head_loss": ("head_loss",),
    "training.losses": ("supervised_loss",),
    "training.optimizer": ("make_optimizer",),
    "training.step": ("TrainState",),
    "run.log": ("plot_losses",),
    "sweep.rate": ("train",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_ROOM_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'lorax_ft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorax_ft.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
