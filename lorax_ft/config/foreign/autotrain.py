"""AutoTrain's options of `autotrain llm --train`: what each of them means here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lorax_ft.config.document import Document
from lorax_ft.config.foreign.llama_factory_rules import batch_of, optimizer_of
from lorax_ft.config.foreign.rules import (
    Keys,
    Kind,
    Options,
    Rule,
    choice,
    holds,
    refused,
    same,
    shown,
    together,
    unused,
)

NAME = "AutoTrain"
BESIDE = {"eval.rows": 0, "eval.exact_match_rows": 0, "eval.samples": 0}
FLAGS = (
    *("train", "peft", "add_eos_token", "push_to_hub", "merge_adapter", "unsloth", "log_to_hub"),
    *("use_flash_attention_2", "disable_gradient_checkpointing", "auto_find_batch_size"),
    *("use_peft", "use_int4", "use_int8", "deploy", "inference"),
)
"""Options without a value."""
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant"}
_OTHER_TRAINER = "it belongs to another trainer than sft"


def kind(keys: Keys) -> Options:
    """Raises for trainers other than supervised fine-tuning, and for what is no training."""
    for name in ("deploy", "inference"):
        if keys.read(name, "flag", False):
            raise keys.error(name, f"--{name}: only --train is run")
    trainer = keys.read("trainer", "text", "default")
    if trainer not in ("default", "sft"):
        raise keys.error("trainer", f"trainer {shown(trainer)} cannot be run: sft only")
    return {}


def method(keys: Keys) -> Options:
    """LoRA if --peft is given, else full fine-tuning."""
    if _is_lora(keys):
        named = keys.read("target_modules", "names", ("all-linear",), unless="adapter.targets")
        return {"adapter.targets": named}
    state = keys.state("peft").replace("absent", "not given")
    keys.note("peft", f"{state}, so all weights train")
    return {"adapter.targets": (), "adapter.train_whole": ("all",)}


def of_lora(key: str, option: str, kind: Kind, default: float) -> Rule:
    """A key that means something only with LoRA, and its default there."""

    def read(keys: Keys) -> Options:
        return {option: keys.read(key, kind, default)} if _is_lora(keys) else {}

    return together(read, option, remark=f"absent: {default}")


def _is_lora(keys: Keys) -> bool:
    """Whether --peft is given, or one of the options that only LoRA has."""
    asked = keys.read("peft", "flag", False) or keys.read("use_peft", "flag", False)
    return asked or any(map(keys.given, ("lora_r", "lora_alpha", "target_modules")))


def quantization(keys: Keys) -> Options:
    """The format of the frozen base: int4 is bitsandbytes' NF4."""
    formats = {"int4": "nf4", "int8": "int8", "none": "none", "None": "none"}
    chosen = keys.choose("quantization", formats, "int4" if _is_lora(keys) else "none")
    for name, format_ in (("use_int4", "nf4"), ("use_int8", "int8")):
        chosen = format_ if keys.read(name, "flag", False) else chosen
    return {"quant.format": chosen}


def dtype(keys: Keys) -> Options:
    """The dtype of weights and activations."""
    chosen = keys.choose(
        "mixed_precision",
        {"bf16": "bfloat16", "fp16": "bfloat16", "none": "float32", "None": "float32"},
        "none",
    )
    if keys.read("mixed_precision", "any") == "fp16":
        keys.note("mixed_precision", "model.dtype bfloat16, as there is no float16")
    return {"model.dtype": chosen}


def length(keys: Keys) -> Options:
    """The tokens of a row: the smaller of the block and the model's length."""
    block = keys.read("block_size", "whole", -1)
    longest = keys.read("model_max_length", "whole", 2048)
    return {"data.max_length": min(block, longest) if block > 0 else longest}


def data(keys: Keys) -> Options:
    """The training data: a folder with a file for each split, or a Hub id."""
    path = keys.read("data_path", "text")
    if path is None:
        raise keys.error("data_path", "--data-path is missing; give it, or --data.train")
    return {"data.train": (path,)}


def validation(keys: Keys) -> Options:
    """The validation split of the same data; none without its name."""
    split, path = keys.read("valid_split", "text"), keys.read("data_path", "text")
    if split is None or path is None:
        return {"data.validation_rows": 0}
    return {
        "data.validation": (path,),
        "data.validation_split": split,
        "data.validation_rows": 0,
    }


def columns(keys: Keys) -> Options:
    """The column of the text: a plain text, or a conversation where a chat template is named."""
    column = keys.read("text_column", "text")
    template = keys.read("chat_template", "text", "none")
    if template not in ("none", "None"):
        options: Options = {"data.fields": (f"messages={column}",)} if column else {}
        if template == "chatml":
            return options | {"model.chat_template": template}
        keys.note("chat_template", f"{template}: the model's tokenizer has the chat template")
        return options
    if column in (None, "text"):
        return {}
    return {"data.shape": "text", "data.fields": (f"text={column}",)}


def batch(keys: Keys) -> Options:
    """The rows of a step on one device; the devices are counted when the run starts."""
    return batch_of("batch_size", 2, "gradient_accumulation", 4, keys)


def optimizer(keys: Keys) -> Options:
    """The optimizer."""
    return optimizer_of("optimizer", keys)


def evaluation(keys: Keys) -> Options:
    """How often the validation loss is measured."""
    key = "eval_strategy" if keys.given("eval_strategy") else "evaluation_strategy"
    every = keys.choose(key, {"epoch": "epoch", "no": 0, "none": 0, "steps": 500}, "epoch")
    return {"train.eval_every": every if keys.given("valid_split") else 0}


def logging(keys: Keys) -> Options:
    """How often a step is logged; -1 leaves it to the trainer."""
    steps = keys.read("logging_steps", "whole", -1)
    return {"train.log_every": steps} if steps > 0 else {}


def upload(keys: Keys) -> Options:
    """The repository on the Hub that the result goes to."""
    if not keys.read("push_to_hub", "flag", False):
        return {}
    owner, name = keys.read("username", "text"), keys.read("project_name", "text", "")
    repository = keys.read("repo_id", "text") or (f"{owner}/{Path(name).name}" if owner else None)
    if repository is None:
        raise keys.error("push_to_hub", "--push-to-hub needs --username or --repo-id owner/name")
    return {"train.push_to_hub": repository}


_KIND = together(kind, remark="the trainers default and sft only")
_METHOD = together(
    method,
    *("adapter.targets", "adapter.train_whole"),
    remark="absent: all linear layers; without --peft or an option of LoRA, all weights train",
    others_hold=True,
)
_QUANTIZATION = together(
    quantization, "quant.format", remark="int4: nf4; absent: int4 with LoRA; none: none"
)
_LENGTH = together(length, "data.max_length", remark="the smaller one; absent: 2048")
_VALIDATION = together(
    validation,
    *("data.validation", "data.validation_split", "data.validation_rows"),
    remark="absent: no validation",
)
_COLUMNS = together(
    columns,
    *("data.fields", "data.shape", "model.chat_template"),
    remark="with a chat template a conversation, else plain text; templates: chatml, or the "
    "tokenizer's own",
)
_BATCH = together(
    batch,
    *("train.batch_size", "train.microbatches"),
    remark="batch_size = per device × accumulation × devices",
    others_hold=True,
)
_EVALUATION = together(evaluation, "train.eval_every", remark="epoch with --valid-split")
_UPLOAD = together(upload, "train.push_to_hub", remark="to username/project-name")

TABLE: Mapping[str, Rule] = {
    "train": holds("a run trains"),
    "deploy": _KIND,
    "inference": _KIND,
    "trainer": _KIND,
    "model": same("model.path", "text"),
    "project_name": same("train.output", "text", default="project-name"),
    "data_path": together(data, "data.train", remark="a folder, a file or a Hub id"),
    "train_split": same("data.split", "text"),
    "valid_split": _VALIDATION,
    "text_column": _COLUMNS,
    "chat_template": _COLUMNS,
    "peft": _METHOD,
    "use_peft": _METHOD,
    "target_modules": _METHOD,
    "lora_r": of_lora("lora_r", "adapter.rank", "whole", 16),
    "lora_alpha": of_lora("lora_alpha", "adapter.alpha", "number", 32),
    "lora_dropout": of_lora("lora_dropout", "adapter.dropout", "number", 0.05),
    "quantization": _QUANTIZATION,
    "use_int4": _QUANTIZATION,
    "use_int8": _QUANTIZATION,
    "mixed_precision": together(dtype, "model.dtype", remark="fp16: bfloat16; absent: float32"),
    "block_size": _LENGTH,
    "model_max_length": _LENGTH,
    "lr": same("optim.learning_rate", "number", default=3e-5),
    "epochs": same("train.epochs", "number", default=1.0),
    "batch_size": _BATCH,
    "gradient_accumulation": _BATCH,
    "warmup_ratio": same("optim.warmup_fraction", "number", default=0.1),
    "optimizer": together(
        optimizer, "optim.optimizer", remark="the variants of AdamW and of Lion, and sgd"
    ),
    "scheduler": choice(
        "optim.schedule", _SCHEDULES, default="linear", remark="linear, cosine or constant"
    ),
    "weight_decay": same("optim.weight_decay", "number"),
    "max_grad_norm": same("optim.clip_norm", "number"),
    "seed": same("train.seed", "whole", default=42),
    "logging_steps": together(logging, "train.log_every"),
    "evaluation_strategy": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "save_total_limit": same("train.keep_checkpoints", "whole"),
    "save_strategy": choice("train.save_every", {"no": 0, "epoch": "epoch", "steps": 500}),
    "disable_gradient_checkpointing": choice("model.remat", {True: "none", False: "auto"}),
    "log": choice(
        "train.report_to",
        {"none": (), "tensorboard": ("tensorboard",), "wandb": ("wandb",)},
        default="none",
        remark="none, tensorboard or wandb",
    ),
    "push_to_hub": _UPLOAD,
    "repo_id": _UPLOAD,
    "username": _UPLOAD,
    "add_eos_token": same("data.append_end", "flag"),
    "merge_adapter": unused("lorax-ft merge merges the adapter afterwards"),
    "token": unused("HF_TOKEN in the environment is the token of the Hub"),
    "padding": unused("rows are padded at their end"),
    "use_flash_attention_2": holds("model.attention auto takes what is fastest"),
    "auto_find_batch_size": unused("lorax-ft plan says which batch fits"),
    "unsloth": unused("the step is compiled by XLA, with kernels of its own"),
    "log_to_hub": unused("logs are in train.output"),
    "backend": refused("a run is on this machine", harmless=("local",)),
    "distributed_backend": unused("the batch is shared by all devices (mesh.data)"),
    "model_ref": unused(_OTHER_TRAINER),
    "dpo_beta": unused(_OTHER_TRAINER),
    "prompt_text_column": unused(_OTHER_TRAINER),
    "rejected_text_column": unused(_OTHER_TRAINER),
    "max_prompt_length": unused(_OTHER_TRAINER),
    "max_completion_length": unused(_OTHER_TRAINER),
}


def read_flags(arguments: list[str]) -> tuple[Document, list[str]]:
    """AutoTrain's options of a command line, and the options of ours among them.

    Ours have a point in their names, as --train.steps, or are --dry-run and --help.

    Raises:
      ValueError: an argument belongs to no option, or an option lacks its value.
    """
    values: dict[str, object] = {}
    ours: list[str] = []
    current: str | None = None
    of_ours = False
    for argument in arguments:
        option = re.fullmatch(r"--([A-Za-z][\w.-]*)(?:=(.*))?", argument, re.DOTALL)
        if option is not None and ("." in option[1] or option[1] in ("dry-run", "help")):
            ours.append(argument)
            of_ours = True
        elif option is not None:
            of_ours = False
            current = option[1].replace("-", "_")
            if current in values:
                raise ValueError(f"--{option[1]} is given twice; give it once")
            values[current] = True if option[2] is None else _value(current, option[2])
        elif of_ours:
            ours.append(argument)
        elif current is None or current in FLAGS or values[current] is not True:
            raise ValueError(f"{argument!r} belongs to no option")
        else:
            values[current] = _value(current, argument)
    for name, value in values.items():
        if value is True and name not in FLAGS and name in TABLE:
            raise ValueError(f"--{name.replace('_', '-')} needs a value")
    return Document("autotrain llm", values), ours


_NUMBERS: Mapping[str, Kind] = {
    **dict.fromkeys(("lora_r", "block_size", "model_max_length", "batch_size"), "whole"),
    **dict.fromkeys(("gradient_accumulation", "seed", "logging_steps"), "whole"),
    **dict.fromkeys(("save_total_limit",), "whole"),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "lr", "epochs", "warmup_ratio"), "number"),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), "number"),
}


def _value(name: str, text: str) -> object:
    """The value of an option; a text that is no number stays one, which its rule refuses."""
    if name in FLAGS and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if name not in _NUMBERS:
        return text
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        return text
