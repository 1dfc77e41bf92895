"""LLaMA-Factory's YAML for supervised fine-tuning: what each of its keys means here.

A key that is absent has LLaMA-Factory's default, not ours: rank 8, alpha twice the rank, a learning
rate of 5e-5 that falls linearly over 3 epochs, 8 rows per device, 2,048 tokens, seed 42.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorax_ft.config.foreign import llama_factory_data as data
from lorax_ft.config.foreign import llama_factory_rules as rules
from lorax_ft.config.foreign.llama_factory_unused import FAMILIES, UNUSED
from lorax_ft.config.foreign.rules import Rule, choice, holds, refused, same, together

NAME = "LLaMA-Factory"

# What runs of LLaMA-Factory do not do: they evaluate the loss on all validation rows, and answer
# no questions.
BESIDE = {"eval.rows": 0, "eval.exact_match_rows": 0, "eval.samples": 0}

_STAGE = together(rules.stage, remark="sft only; pt, rm, ppo, dpo and kto are refused")
_METHOD = together(
    rules.method,
    *("adapter.method", "adapter.targets", "adapter.train_whole"),
    remark="lora, oft or full; freeze is refused",
    others_hold=True,
)
_SCALE = together(rules.scale, "adapter.alpha", remark="absent: twice lora_rank")
_PISSA = together(
    rules.pissa,
    *("adapter.init", "adapter.svd_iterations"),
    remark="pissa_iter -1: the exact SVD",
)
_QUANTIZATION = together(
    rules.quantization,
    *("quant.format", "quant.double"),
    remark="4 bits: nf4, 8 bits: int8; others are refused",
    others_hold=True,
)
_DTYPE = together(
    rules.dtype,
    "model.dtype",
    remark="bf16, pure_bf16 and fp16: bfloat16; none of them: float32",
)
_CONTINUE = together(rules.continued, "adapter.continue_from", remark="one adapter")
_DATA = together(
    data.training_data,
    *("data.train", "data.shape", "data.fields", "data.split"),
    remark="names in dataset_dir/dataset_info.json; max_samples: data.train PATH[:N]",
)
_VALIDATION = together(
    data.validation_data,
    *("data.validation", "data.validation_split", "data.validation_rows"),
    remark="absent: no validation",
)
_LOSS = together(data.loss_on, "data.loss_on", remark="all, or last")
_PACKING = together(data.packing, "data.pack", remark="samples never attend to one another")
_TEMPLATE = together(
    data.template,
    *("model.chat_template", "data.reasoning_loss"),
    remark="the text is LLaMA-Factory's; names that are not known here: the tokenizer's own",
)
_BATCH = together(
    rules.batch,
    *("train.batch_size", "train.microbatches"),
    remark="batch_size = per device × accumulation × devices; microbatches = accumulation",
    others_hold=True,
)
_DURATION = together(
    rules.duration, *("train.epochs", "train.steps"), remark="max_steps above 0 wins"
)
_SCHEDULE = together(
    rules.schedule,
    *("optim.schedule", "optim.final_fraction"),
    remark="linear, cosine, constant, constant_with_warmup, cosine_with_min_lr",
)
_WARMUP = together(
    rules.warmup,
    *("optim.warmup_fraction", "optim.warmup_steps"),
    remark="steps above 0 win over the ratio; below 1 they are a ratio",
)
_EVALUATION = together(rules.evaluation, "train.eval_every", remark="no, steps or epoch")
_SAVING = together(rules.saving, "train.save_every", remark="no, steps or epoch")
_RESUME = together(rules.resume, "train.resume", "train.overwrite")
_UPLOAD = together(rules.upload, "train.push_to_hub")
_SHARDS = together(
    rules.shards,
    remark="ZeRO-3 and full_shard: mesh.fsdp is the number of devices; other stages need nothing",
)

TABLE: Mapping[str, Rule] = {
    # The model.
    "model_name_or_path": together(rules.model, "model.path"),
    "model_revision": same("model.revision", "text"),
    "adapter_name_or_path": _CONTINUE,
    "adapter_folder": _CONTINUE,
    "create_new_adapter": _CONTINUE,
    "flash_attn": choice(
        "model.attention", {"auto": "auto", "disabled": "xla", "sdpa": "auto", "fa2": "auto"}
    ),
    "moe_aux_loss_coef": same("train.router_aux_loss_coef", "number"),
    "disable_gradient_checkpointing": choice("model.remat", {True: "none", False: "auto"}),
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "pure_bf16": _DTYPE,
    # Quantization of the base.
    "quantization_bit": _QUANTIZATION,
    "quantization_method": _QUANTIZATION,
    "quantization_type": _QUANTIZATION,
    "double_quantization": _QUANTIZATION,
    # The method.
    "stage": _STAGE,
    "do_train": _STAGE,
    "lora_target": _METHOD,
    "oft_target": _METHOD,
    "finetuning_type": _METHOD,
    "additional_target": together(rules.whole_modules, "adapter.train_whole", absent=False),
    "lora_rank": same("adapter.rank", "whole", default=8),
    "lora_alpha": _SCALE,
    "lora_dropout": same("adapter.dropout", "number"),
    "use_rslora": choice("adapter.scaling", {True: "rank_stabilized", False: "standard"}),
    "use_dora": same("adapter.dora", "flag"),
    "pissa_init": _PISSA,
    "pissa_iter": _PISSA,
    "pissa_convert": holds(
        "the saved adapter is plain LoRA of twice the rank for the original base"
    ),
    "oft_block_size": same("adapter.oft_block_size", "whole"),
    "oft_rank": refused(
        "blocks are given by their size, oft_block_size",
        harmless=(0,),
        instead="adapter.oft_block_size",
    ),
    "module_dropout": refused("OFT has no dropout here", harmless=(0,)),
    "loraplus_lr_ratio": same("optim.lora_plus_ratio", "number"),
    "neftune_noise_alpha": same("train.neftune_alpha", "number"),
    # The data.
    "dataset": _DATA,
    "dataset_dir": _DATA,
    "max_samples": _DATA,
    "eval_dataset": _VALIDATION,
    "eval_on_each_dataset": _VALIDATION,
    "val_size": _VALIDATION,
    "template": _TEMPLATE,
    "enable_thinking": together(data.thinking, "data.template_args"),
    "default_system": same("data.system", "text"),
    "cutoff_len": same("data.max_length", "whole", default=2048, remark="absent: 2048"),
    "train_on_prompt": _LOSS,
    "mask_history": _LOSS,
    "packing": _PACKING,
    "neat_packing": _PACKING,
    "preprocessing_num_workers": same("data.num_proc", "whole"),
    # The optimizer.
    "optim": together(
        rules.optimizer, "optim.optimizer", remark="the variants of AdamW and of Lion, and sgd"
    ),
    "learning_rate": same("optim.learning_rate", "number", default=5e-5),
    "lr_scheduler_type": _SCHEDULE,
    "lr_scheduler_kwargs": _SCHEDULE,
    "warmup_ratio": _WARMUP,
    "warmup_steps": _WARMUP,
    "weight_decay": same("optim.weight_decay", "number"),
    "adam_beta1": same("optim.b1", "number"),
    "adam_beta2": same("optim.b2", "number"),
    "adam_epsilon": same("optim.eps", "number"),
    "max_grad_norm": same("optim.clip_norm", "number"),
    # The course of the run.
    "output_dir": same("train.output", "text"),
    "overwrite_output_dir": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "num_train_epochs": _DURATION,
    "max_steps": _DURATION,
    "seed": same("train.seed", "whole", default=42),
    "logging_steps": together(rules.logging, "train.log_every", remark="absent: each step"),
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "save_strategy": _SAVING,
    "save_steps": _SAVING,
    "save_total_limit": same("train.keep_checkpoints", "whole", remark="absent: 2, not all"),
    "load_best_model_at_end": same("train.load_best", "flag"),
    "metric_for_best_model": refused(
        "the lowest validation loss is the best", harmless=("loss", "eval_loss")
    ),
    "greater_is_better": refused("the lowest validation loss is the best"),
    "early_stopping_steps": same("train.patience", "whole"),
    "report_to": together(rules.trackers, "train.report_to", remark="tensorboard, wandb"),
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    # The devices.
    "deepspeed": _SHARDS,
    "fsdp": _SHARDS,
    **UNUSED,
}

__all__ = ["BESIDE", "FAMILIES", "NAME", "TABLE"]
