"""LLaMA-Factory's keys that set no option here: they hold anyway, do nothing or are refused."""

from __future__ import annotations

from collections.abc import Mapping

from lorax_ft.config.foreign.rules import (
    Keys,
    Options,
    Rule,
    holds,
    refused,
    same,
    together,
    unused,
)

_TEXT_ONLY = "models are trained on text only"
_OTHER_STAGE = "it belongs to another stage than sft"
_GENERATION = "a run generates no texts; lorax-ft generate and evaluate do"
_TORCH = "it is about PyTorch"
_HUB = "it is about the Hub; HF_TOKEN, HF_HOME and train.push_to_hub are used here"
_LOSS = "the loss is the cross-entropy"
_NO_OPTIMIZER = refused("lorax_ft does not have this optimizer", instead="optim.optimizer")
_MIXED = "sources are mixed by their weights, as in --data.train a.jsonl=2"
_COMPILED = "the step is compiled by XLA, with kernels of its own"
_LOG = "it only changes what is logged"


def _resize(keys: Keys) -> Options:
    """Says that the tables do not train as wholes, as they do there unless modules are named."""
    tokens = keys.read("add_tokens", "names", ())
    grows = bool(tokens) or keys.read("resize_vocab", "flag", False)
    is_full = keys.read("finetuning_type", "text", "lora") == "full"
    if not grows or is_full or keys.given("additional_target"):
        return {}
    rows = "the rows of new tokens train alone (data.new_tokens)" if tokens else "no rows are new"
    keys.note(
        "resize_vocab" if keys.given("resize_vocab") else "add_tokens",
        f"{rows}, and not the whole tables as there; additional_target embed_tokens,lm_head (of a "
        "tied model embed_tokens) trains those",
    )
    return {}


UNUSED: Mapping[str, Rule] = {
    # The model.
    "trust_remote_code": unused("no code of a checkpoint is ever run"),
    "cache_dir": unused(_HUB),
    "hf_hub_token": unused(_HUB),
    "ms_hub_token": unused("models come from disk or from the Hugging Face Hub"),
    "om_hub_token": unused("models come from disk or from the Hugging Face Hub"),
    "use_fast_tokenizer": holds("tokenizers are the fast ones"),
    "resize_vocab": together(
        _resize, remark="the tables grow with data.new_tokens, whose rows train alone"
    ),
    "add_tokens": same("data.new_tokens", "names"),
    "add_special_tokens": refused(
        "add_tokens has those of a text", harmless=([], ""), instead="data.new_tokens"
    ),
    "new_special_tokens_config": refused(
        "name the tokens in add_tokens", instead="data.new_tokens"
    ),
    "init_special_tokens": unused("new tokens start as the mean of their pieces"),
    "split_special_tokens": unused("rows with special tokens are as data.control_tokens says"),
    "low_cpu_mem_usage": holds("weights go to the devices one by one"),
    "rope_scaling": refused("positions are those of the model's config.json; set it there"),
    "shift_attn": refused("attention is that of the model"),
    "mixture_of_depths": refused("the model is that of its config.json"),
    "use_unsloth": unused(_COMPILED),
    "use_unsloth_gc": unused("model.remat says what is recomputed"),
    "enable_liger_kernel": unused(_COMPILED),
    "use_liger_kernel": unused(_COMPILED),
    "liger_kernel_config": unused(_COMPILED),
    "use_v1_kernels": unused(_COMPILED),
    "use_reentrant_gc": unused("model.remat says what is recomputed"),
    "upcast_layernorm": holds("norms are computed in float32"),
    "upcast_lmhead_output": holds("the loss is computed in float32"),
    "train_from_scratch": refused("a run starts from the weights of the checkpoint"),
    "offload_folder": unused("weights stay on the devices; mesh.fsdp splits them"),
    "use_kv_cache": unused(_GENERATION),
    "use_cache": unused(_GENERATION),
    "print_param_status": holds("a run prints what is trained"),
    "quantization_device_map": unused("the mesh places the weights"),
    # The method.
    "loraplus_lr_embedding": unused("the B of embeddings has the rate of every B"),
    "freeze_vision_tower": unused(_TEXT_ONLY),
    "freeze_multi_modal_projector": unused(_TEXT_ONLY),
    "freeze_language_model": refused(_TEXT_ONLY),
    "use_llama_pro": refused("no method trains expanded blocks"),
    "use_galore": _NO_OPTIMIZER,
    "use_apollo": _NO_OPTIMIZER,
    "use_badam": _NO_OPTIMIZER,
    "use_adam_mini": _NO_OPTIMIZER,
    "adafactor": _NO_OPTIMIZER,
    "use_muon": refused(
        "the nearest is lora_muon, with larger learning rates", instead="optim.optimizer"
    ),
    "use_dft_loss": refused(_LOSS),
    "use_asft_loss": refused(_LOSS),
    "use_eaft_loss": refused(_LOSS),
    "asft_alpha": unused(_LOSS),
    "eaft_alpha": unused(_LOSS),
    "label_smoothing_factor": refused(_LOSS, harmless=(0,)),
    "dpo_label_smoothing": unused(_OTHER_STAGE),
    "simpo_gamma": unused(_OTHER_STAGE),
    "ld_alpha": unused(_OTHER_STAGE),
    "ref_model": unused(_OTHER_STAGE),
    "reward_model": unused(_OTHER_STAGE),
    "use_mca": refused("it is another training program"),
    "use_megatron_bridge": refused("it is another training program"),
    "use_hyper_parallel": refused("it is another training program"),
    "use_kt": refused("it is another training program"),
    "fp8": unused("products are in model.dtype"),
    "optim_args": refused("options of the optimizer have their own keys"),
    "optim_target_modules": refused("options of the optimizer have their own keys"),
    # The data.
    "media_dir": unused(_TEXT_ONLY),
    "crop_to_patches": unused(_TEXT_ONLY),
    "use_audio_in_video": unused(_TEXT_ONLY),
    "streaming": unused("rows are always read a part at a time"),
    "buffer_size": unused("all rows are shuffled"),
    "mix_strategy": refused(_MIXED, harmless=("concat",), instead="data.train"),
    "interleave_probs": refused(_MIXED, instead="data.train"),
    "overwrite_cache": holds("kept tokens are found by the rows themselves, so none is stale"),
    "preprocessing_batch_size": unused("it only changes how rows are tokenized"),
    "eval_num_beams": unused(_GENERATION),
    "ignore_pad_token_for_loss": holds("padding never counts in the loss"),
    "tool_format": unused("the chat template writes tools"),
    "preserve_thinking": unused("the chat template decides what it keeps of earlier turns"),
    "tokenized_path": unused("data.cache keeps the tokens"),
    "data_shared_file_system": unused("data.cache keeps the tokens"),
    "disable_shuffling": unused("rows are always shuffled by train.seed"),
    "train_sampling_strategy": unused("rows are always shuffled by train.seed"),
    "group_by_length": unused("rows are always shuffled by train.seed"),
    "length_column_name": unused("rows are always shuffled by train.seed"),
    "data_seed": unused("train.seed is the seed of the rows' order too"),
    "remove_unused_columns": holds("columns that are not used are named by the run"),
    "label_names": unused("data.loss_on says what counts in the loss"),
    # The course of the run.
    "do_eval": holds("there is an evaluation wherever there are validation rows"),
    "do_predict": unused(_GENERATION),
    "predict_with_generate": unused("lorax-ft evaluate measures ROUGE and BLEU"),
    "prediction_loss_only": unused(_GENERATION),
    "compute_accuracy": unused("eval.exact_match_rows and eval.choices measure accuracies"),
    "per_device_eval_batch_size": unused("evaluations take as many rows as a microbatch has"),
    "eval_accumulation_steps": unused("evaluations take as many rows as a microbatch has"),
    "eval_delay": unused("evaluations are every train.eval_every steps"),
    "eval_do_concat_batches": unused(_LOG),
    "eval_use_gather_object": unused(_LOG),
    "include_inputs_for_metrics": unused(_LOG),
    "include_tokens_per_second": holds("tokens per second are logged"),
    "eval_on_start": holds("there is an evaluation before the first step"),
    "include_for_metrics": unused(_LOG),
    "batch_eval_metrics": unused(_LOG),
    "logging_strategy": unused("train.log_every is a number of steps"),
    "logging_first_step": unused(_LOG),
    "logging_nan_inf_filter": unused("steps that are not finite are skipped and counted"),
    "logging_dir": unused("logs are in train.output"),
    "log_on_each_node": unused(_LOG),
    "log_level": unused(_LOG),
    "log_level_replica": unused(_LOG),
    "disable_tqdm": unused(_LOG),
    "plot_loss": holds("the losses are always plotted"),
    "include_num_input_tokens_seen": holds("tokens are logged"),
    "include_effective_tokens_per_second": holds("tokens per second are logged"),
    "run_name": unused("a run is named by train.output"),
    "project": unused("a run is named by train.output"),
    "save_only_model": unused("a checkpoint always holds the optimizer, and goes on bitwise"),
    "save_on_each_node": unused("a checkpoint is written once"),
    "save_safetensors": holds("adapters and models are saved as safetensors"),
    "enable_jit_checkpoint": holds("SIGTERM ends a run with a checkpoint"),
    "ignore_data_skip": unused("a resumed run goes on with its own rows"),
    "restore_callback_states_from_checkpoint": unused(_TORCH),
    "full_determinism": holds("a run depends on its seed alone"),
    "auto_find_batch_size": unused("lorax-ft plan says which batch fits"),
    "gradient_checkpointing": unused("model.remat says what is recomputed"),
    "gradient_checkpointing_kwargs": unused("model.remat says what is recomputed"),
    "activation_checkpointing": unused("model.remat says what is recomputed"),
    "activation_checkpointing_kwargs": unused("model.remat says what is recomputed"),
    "average_tokens_across_devices": holds("the loss is the mean over the tokens of all devices"),
    "bf16_full_eval": unused("evaluations are in model.dtype"),
    "fp16_full_eval": unused("evaluations are in model.dtype"),
    "tf32": unused("products are in model.dtype"),
    # The machine.
    "use_cpu": unused("JAX_PLATFORMS=cpu in the environment chooses the CPU"),
    "no_cuda": unused("JAX_PLATFORMS=cpu in the environment chooses the CPU"),
    "use_mps_device": unused("JAX chooses the device"),
    "local_rank": unused(_TORCH),
    "use_ipex": unused(_TORCH),
    "jit_mode_eval": unused(_TORCH),
    "torchdynamo": unused(_TORCH),
    "half_precision_backend": unused(_TORCH),
    "debug": unused(_TORCH),
    "skip_memory_metrics": unused(_LOG),
    "torch_empty_cache_steps": unused(_TORCH),
    "accelerator_config": unused(_TORCH),
    "parallelism_config": unused("mesh.* says how the devices are used"),
    "master_addr": unused("--multihost finds the other processes"),
    "master_port": unused("--multihost finds the other processes"),
    "sortish_sampler": unused("rows are always shuffled by train.seed"),
    "profile_modules": unused("train.profile records steps"),
    # Generation.
    "do_sample": unused(_GENERATION),
    "temperature": unused(_GENERATION),
    "top_p": unused(_GENERATION),
    "top_k": unused(_GENERATION),
    "num_beams": unused(_GENERATION),
    "max_length": unused(_GENERATION),
    "max_new_tokens": unused(_GENERATION),
    "repetition_penalty": unused(_GENERATION),
    "length_penalty": unused(_GENERATION),
    "skip_special_tokens": unused(_GENERATION),
}

FAMILIES: Mapping[str, Rule] = {
    "image_": unused(_TEXT_ONLY),
    "video_": unused(_TEXT_ONLY),
    "audio_": unused(_TEXT_ONLY),
    "pref_": unused(_OTHER_STAGE),
    "ppo_": unused(_OTHER_STAGE),
    "kto_": unused(_OTHER_STAGE),
    "ref_model_": unused(_OTHER_STAGE),
    "reward_model_": unused(_OTHER_STAGE),
    "galore_": unused("it belongs to use_galore"),
    "apollo_": unused("it belongs to use_apollo"),
    "badam_": unused("it belongs to use_badam"),
    "freeze_trainable_": unused("it belongs to finetuning_type freeze"),
    "freeze_extra_": unused("it belongs to finetuning_type freeze"),
    "hyper_parallel_": unused("it belongs to use_hyper_parallel"),
    "megatron_": unused("it belongs to use_megatron_bridge"),
    "kt_": unused("it belongs to use_kt"),
    "fp8_": unused("it belongs to fp8"),
    "fsdp_": unused("mesh.* says how the devices are used"),
    "swanlab_": unused("trackers are tensorboard and wandb"),
    "use_swanlab": unused("trackers are tensorboard and wandb"),
    "trackio_": unused("trackers are tensorboard and wandb"),
    "hub_": unused(_HUB),
    "export_": unused("lorax-ft export and merge write models"),
    "infer_": unused(_GENERATION),
    "generation_": unused(_GENERATION),
    "vllm_": unused(_GENERATION),
    "sglang_": unused(_GENERATION),
    "ray_": unused("--multihost starts a run on several machines"),
    "profiler_": unused("train.profile records steps"),
    "enable_torch_profiler": unused("train.profile records steps"),
    "dataloader_": unused("rows lie on disk as tokens, so loading them takes no workers"),
    "ddp_": unused(_TORCH),
    "torch_compile": unused(_COMPILED),
}
"""Keys that begin alike, by their beginning."""
