"""What LLaMA-Factory's keys mean where several of them mean something together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorax_ft.config.foreign.rules import Keys, Options, is_number, shown
from lorax_ft.files import read_json
from lorax_ft.program import command

OTHER_STAGES = ("pt", "rm", "ppo", "dpo", "kto")
_NAMES_OF_ADAMW = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf", "adamw_apex_fused"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw", "paged_adamw_32bit"),
)
OPTIMIZERS = {
    **dict.fromkeys(_NAMES_OF_ADAMW, "adamw"),
    **dict.fromkeys(("lion", "lion_32bit", "lion_8bit", "paged_lion_8bit"), "lion"),
    "sgd": "sgd",
}
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
_QUANTIZATIONS = {"bnb": "", "bitsandbytes": "", "hqq": "HQQ", "eetq": "EETQ"}
_TRACKERS = ("tensorboard", "wandb")
_SHARDED = "shard"
"""In the names of FSDP's strategies that split the weights: full_shard, hybrid_shard."""


def stage(keys: Keys) -> Options:
    """Raises for stages other than supervised fine-tuning."""
    name = keys.choose("stage", {name: name for name in ("sft", *OTHER_STAGES)}, "sft")
    if name != "sft":
        raise keys.error(
            "stage",
            f"stage {name} cannot be run: lorax_ft has stage sft only, and no option changes that",
        )
    trains = "data.train" in keys.overridden or any(
        map(keys.given, ("dataset", "do_train", "stage"))
    )
    for key, other in (("export_dir", "merge"), ("infer_backend", "chat")):
        if keys.given(key) and not trains:
            raise keys.error(
                key, f"{key} without stage and dataset is no training: {command(other)}"
            )
    if not keys.read("do_train", "flag", True):
        raise keys.error("do_train", "do_train is false, so there is nothing to run; remove it")
    return {}


def model(keys: Keys) -> Options:
    """The base model."""
    key = "model_name_or_path"
    path = keys.read(key, "text")
    if not path:
        state = (keys.state(key) or "empty").replace("absent", "missing")
        raise keys.error(key, f"{key} is {state}; add it, or give --model.path")
    return {"model.path": path}


def dtype(keys: Keys) -> Options:
    """The dtype of weights and activations."""
    if keys.read("bf16", "flag", False) or keys.read("pure_bf16", "flag", False):
        return {"model.dtype": "bfloat16"}
    if keys.read("fp16", "flag", False):
        keys.note("fp16", "model.dtype bfloat16, as there is no float16")
        return {"model.dtype": "bfloat16"}
    named = next(filter(keys.given, ("bf16", "pure_bf16", "fp16")), "bf16")
    state = keys.state(named)
    keys.note(named, f"{state}, so model.dtype is float32; bfloat16 takes half of the memory")
    return {"model.dtype": "float32"}


def method(keys: Keys) -> Options:
    """The method, and the modules that it trains."""
    name = _finetuning_type(keys)
    if name == "full":
        return {"adapter.targets": (), "adapter.train_whole": ("all",)}
    targets = keys.read(f"{name}_target", "names", ("all",), unless="adapter.targets")
    return {
        "adapter.method": name,
        "adapter.targets": ("all-linear",) if targets == ("all",) else targets,
    }


def _finetuning_type(keys: Keys) -> str:
    """lora, oft or full."""
    key = "finetuning_type"
    if keys.replaced("adapter.method", key):
        # The targets of the file hold for the method in its place.
        return "oft" if keys.read(key, "any") == "oft" else "lora"
    name: str = keys.choose(key, {n: n for n in ("lora", "oft", "full", "freeze")}, "lora")
    if name == "freeze":
        raise keys.error(
            key,
            "finetuning_type freeze cannot be run: modules train in all layers (finetuning_type "
            "full with --adapter.train_whole down_proj), adapters in single ones (--adapter.method "
            "lora --adapter.layers 30 31)",
        )
    return name


def whole_modules(keys: Keys) -> Options:
    """The modules that train in full beside an adapter."""
    if keys.read("finetuning_type", "text", "lora") == "full":
        keys.note("additional_target", "not needed: finetuning_type full trains all modules")
        return {}
    return {"adapter.train_whole": keys.read("additional_target", "names", ())}


def scale(keys: Keys) -> Options:
    """Alpha, which is twice the rank unless it is given."""
    alpha = keys.read("lora_alpha", "number") or 2 * keys.read("lora_rank", "whole", 8)
    return {"adapter.alpha": alpha}


def pissa(keys: Keys) -> Options:
    """PiSSA's start, from a randomized SVD."""
    if not keys.read("pissa_init", "flag", False):
        return {}
    iterations = keys.read("pissa_iter", "whole", 16, unless="adapter.svd_iterations")
    return {
        "adapter.init": "pissa",
        "adapter.svd_iterations": None if iterations == -1 else iterations,
    }


def continued(keys: Keys) -> Options:
    """The adapter that the run goes on from."""
    adapters = keys.read("adapter_name_or_path", "names")
    if not adapters:
        return {}
    key = "adapter_name_or_path"
    if len(adapters) > 1 or keys.read("create_new_adapter", "flag", False):
        raise keys.error(
            key, f"{key}: merge {shown(', '.join(adapters))} into the model first (lorax-ft merge)"
        )
    folder = keys.read("adapter_folder", "text", "")
    return {"adapter.continue_from": str(Path(adapters[0], folder))}


def quantization(keys: Keys) -> Options:
    """The format of the frozen base."""
    bits_and_how = ("quantization_bit", "quantization_method", "quantization_type")
    double = keys.read("double_quantization", "flag", True, unless="quant.double")
    if keys.replaced("quant.format", *bits_and_how):
        return {"quant.double": double}
    if keys.read("quantization_bit", "whole") is None:
        return {}
    if keys.read("finetuning_type", "any") == "full" and "adapter.method" not in keys.overridden:
        raise keys.error(
            "quantization_bit",
            "quantization_bit and finetuning_type full exclude each other, as quantized weights do "
            "not train; remove one of them",
        )
    formats = {4: "nf4", 8: "int8"}
    instead = "quant.format"
    format_ = keys.choose("quantization_bit", formats, None, instead=instead)
    method_ = keys.choose("quantization_method", _QUANTIZATIONS, "bnb", instead=instead)
    if method_:
        keys.note("quantization_method", f"quant.format {format_}, in place of {method_}")
    if keys.choose("quantization_type", {"nf4": "nf4", "fp4": "fp4"}, "nf4") == "fp4":
        keys.note("quantization_type", "quant.format nf4, as there is no fp4")
    return {"quant.format": format_, "quant.double": double}


def batch(keys: Keys) -> Options:
    """The rows of a step on one device; the devices are counted when the run starts."""
    return batch_of("per_device_train_batch_size", 8, "gradient_accumulation_steps", 1, keys)


def batch_of(rows: str, of_rows: int, steps: str, of_steps: int, keys: Keys) -> Options:
    """The batch of keys for the rows of a device and for the steps of accumulation.

    Args:
      rows: the key of the rows.
      of_rows: its default.
      steps: the key of accumulation.
      of_steps: its default.
      keys: of the file.
    """
    per_device = keys.read(rows, "count", of_rows, unless="train.batch_size")
    # The rows of a step need it, whatever the microbatches are.
    unless = "train.microbatches" if "train.batch_size" in keys.overridden else ""
    accumulation = keys.read(steps, "count", of_steps, unless=unless)
    keys.batch_per_device = True
    return {"train.batch_size": per_device * accumulation, "train.microbatches": accumulation}


def optimizer(keys: Keys) -> Options:
    """The optimizer."""
    return optimizer_of("optim", keys)


def optimizer_of(key: str, keys: Keys) -> Options:
    """The optimizer that transformers' Trainer has under a name."""
    ours = keys.choose(key, OPTIMIZERS, "adamw_torch", instead="optim.optimizer")
    if "8bit" in keys.read(key, "text", ""):
        keys.note(key, f"optim.optimizer {ours}, whose moments are in float32")
    return {"optim.optimizer": ours}


def schedule(keys: Keys) -> Options:
    """The schedule, and the fraction of the peak that it ends at."""
    name = keys.read("lr_scheduler_type", "any", "linear")
    ours = keys.choose("lr_scheduler_type", _SCHEDULES, "linear", instead="optim.schedule")
    unless = "optim.final_fraction" if name == "cosine_with_min_lr" else ""
    arguments = dict(keys.read("lr_scheduler_kwargs", "object", {}, unless=unless))
    last: Any = 0.0
    if name == "cosine_with_min_lr" and unless not in keys.overridden:
        last = _final_fraction(arguments, keys)
        arguments = {}
    elif name == "warmup_stable_decay":
        keys.note("lr_scheduler_type", "optim.schedule wsd, which falls over the last fifth")
        arguments = {}
    if arguments:
        raise keys.error(
            "lr_scheduler_kwargs",
            f"lr_scheduler_kwargs {shown(', '.join(arguments))}: {name} takes none here",
        )
    return {"optim.schedule": ours, "optim.final_fraction": last}


def _final_fraction(arguments: dict[str, Any], keys: Keys) -> float:
    """The last rate over the peak, of cosine_with_min_lr."""
    peak = keys.read("learning_rate", "number", 5e-5)
    for name, over in (("min_lr_rate", 1.0), ("min_lr", peak)):
        value: Any = arguments.get(name)
        if is_number(value) and 0 <= value <= over and over > 0:
            return value / over
    raise keys.error(
        "lr_scheduler_kwargs",
        f"lr_scheduler_kwargs is {arguments!r:.80}; it needs min_lr, from 0 to learning_rate, or "
        "min_lr_rate, from 0 to 1",
    )


def warmup(keys: Keys) -> Options:
    """The warm-up, in steps or as a fraction of all steps."""
    ratio = keys.read("warmup_ratio", "number", 0.0, unless="optim.warmup_steps")
    steps = keys.read("warmup_steps", "number", 0, unless="optim.warmup_steps")
    if keys.read("lr_scheduler_type", "any", "linear") == "constant" and (ratio or steps):
        key = "warmup_steps" if steps else "warmup_ratio"
        keys.note(key, "none, as lr_scheduler_type constant has no warm-up (constant_with_warmup)")
        ratio = steps = 0
    if steps >= 1:
        return {"optim.warmup_fraction": 0.0, "optim.warmup_steps": int(steps)}
    return {"optim.warmup_fraction": steps or ratio}


def duration(keys: Keys) -> Options:
    """The steps of the run, if they are given, else its epochs."""
    steps = keys.read("max_steps", "whole", -1)
    if steps > 0:
        return {"train.steps": steps}
    if "train.steps" in keys.overridden:
        return {}
    return {"train.epochs": keys.read("num_train_epochs", "number", 3.0)}


def logging(keys: Keys) -> Options:
    """How often a step is logged."""
    if not keys.given("logging_steps"):
        return {}
    return {"train.log_every": _steps(keys, "logging_steps", 500)}


def evaluation(keys: Keys) -> Options:
    """How often the validation loss is measured."""
    key = "eval_strategy" if keys.given("eval_strategy") else "evaluation_strategy"
    strategy = _strategy(keys, key, "no")
    if strategy == "steps":
        every = _steps(keys, "logging_steps", 500)
        return {"train.eval_every": _steps(keys, "eval_steps", every)}
    return {"train.eval_every": "epoch" if strategy == "epoch" else 0}


def saving(keys: Keys) -> Options:
    """How often a checkpoint is saved."""
    strategy = _strategy(keys, "save_strategy", "steps")
    if strategy == "steps":
        return {"train.save_every": _steps(keys, "save_steps", 500)}
    return {"train.save_every": "epoch" if strategy == "epoch" else 0}


def _strategy(keys: Keys, key: str, default: str) -> Any:
    # YAML reads a bare no as false.
    return keys.choose(key, {"no": "no", False: "no", "steps": "steps", "epoch": "epoch"}, default)


def _steps(keys: Keys, key: str, default: int) -> int:
    """A number of steps, which may be a fraction of all steps there and not here."""
    value = keys.read(key, "number", default)
    if value < 1:
        fraction = ", a fraction of all steps" if value > 0 else ""
        raise keys.error(key, f"{key} is {value}{fraction}; give a number of steps")
    return int(value)


def resume(keys: Keys) -> Options:
    """Whether the run goes on from its last checkpoint, or starts anew."""
    value = keys.read("resume_from_checkpoint", "any", False)
    if not isinstance(value, bool):
        raise keys.error(
            "resume_from_checkpoint",
            f"resume_from_checkpoint {shown(value)}: a checkpoint of another trainer cannot be "
            "resumed; adapter.continue_from takes the adapter in it",
        )
    if value:
        return {"train.resume": "always"}
    return {"train.overwrite": keys.read("overwrite_output_dir", "flag", False)}


def upload(keys: Keys) -> Options:
    """The repository on the Hub that the result goes to."""
    if not keys.read("push_to_hub", "flag", False):
        return {}
    name = keys.read("hub_model_id", "text")
    if name is None:
        raise keys.error("push_to_hub", "push_to_hub needs hub_model_id: owner/name")
    return {"train.push_to_hub": name}


def trackers(keys: Keys) -> Options:
    """The trackers to log to."""
    names = keys.read("report_to", "names", ())
    known = _TRACKERS if names == ("all",) else tuple(name for name in names if name in _TRACKERS)
    others = [name for name in names if name not in (*_TRACKERS, "all", "none")]
    if others:
        keys.note(
            "report_to", f"without {shown(', '.join(others))}: trackers are tensorboard and wandb"
        )
    return {"train.report_to": known}


def shards(keys: Keys) -> Options:
    """Whether the weights are split over the devices, which are counted when the run starts."""
    if keys.replaced("mesh.fsdp", "fsdp", "deepspeed"):
        return {}
    strategies = keys.read("fsdp", "any") or ""
    if not isinstance(strategies, str | list | bool):
        raise keys.error("fsdp", f"fsdp is {strategies!r:.80}; it must be names, or true or false")
    by_fsdp = strategies is True or _SHARDED in str(strategies)
    keys.shards_weights = by_fsdp or _is_stage_3(keys)
    if keys.read("deepspeed", "any") and not keys.shards_weights:
        keys.note("deepspeed", "not needed: the batch is shared by all devices (mesh.data)")
    return {}


def _is_stage_3(keys: Keys) -> bool:
    """Whether a DeepSpeed config, or the file of one, splits the weights (ZeRO-3)."""
    wanted = keys.read("deepspeed", "any") or {}
    if isinstance(wanted, str):
        file = Path(wanted)
        if not os.path.exists(wanted):  # false for names that no disk has
            # As LLaMA-Factory names its own files.
            return "z3" in file.name
        try:
            wanted = read_json(file)
        except ValueError as error:
            raise keys.error("deepspeed", f"deepspeed: {error}") from error
    if not isinstance(wanted, dict):
        raise keys.error("deepspeed", f"deepspeed is {wanted!r:.80}; it must be a file or keys")
    zero = wanted.get("zero_optimization")
    return isinstance(zero, dict) and zero.get("stage") in (3, "3")
