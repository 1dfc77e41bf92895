"""Configs of LLaMA-Factory, PEFT and AutoTrain, and YAML of our own: what they mean here."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from run_cases import ROOT

import lorax_ft as lft
from lorax_ft.__main__ import main
from lorax_ft.commands.convert_config import converted
from lorax_ft.config.foreign import llama_factory
from lorax_ft.config.foreign.autotrain import FLAGS, TABLE, read_flags
from lorax_ft.config.foreign.peft_types import TABLES
from lorax_ft.config.foreign.source import (
    AUTOTRAIN,
    LLAMA_FACTORY,
    Source,
    for_devices,
    read_foreign,
)
from lorax_ft.config.load import Loaded, read_config
from lorax_ft.interop.peft_methods import METHODS
from lorax_ft.interop.peft_prompts import KINDS
from lorax_ft.interop.peft_tokens import TYPE as TRAINABLE_TOKENS
from lorax_ft.sweep import rate

MIRROR = os.environ.get("LORAX_FT_LLAMA_FACTORY", "")
"""A git repository of LLaMA-Factory, where there is one: its git directory."""

SHORT = {"model_name_or_path": "my/model", "dataset": "sums", "output_dir": "out/it"}
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_info(sums={"file_name": "sums.json"})
    return tmp_path


def write_info(**datasets: dict[str, Any]) -> None:
    Path("data/dataset_info.json").write_text(json.dumps(datasets))


def yaml_of(keys: dict[str, Any]) -> str:
    # JSON is YAML.
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())


def read(text: str, name: str = "run.yaml", **overridden: Any) -> Loaded:
    Path(name).write_text(text)
    return read_config(name, **overridden)


def llama(**keys: Any) -> lft.Config:
    return read(yaml_of(SHORT | keys)).config


def remarks(loaded: Loaded) -> dict[str, str]:
    assert loaded.source is not None
    return dict(loaded.source.remarks())


def test_absent_keys_have_the_defaults_of_llama_factory() -> None:
    config = llama()
    assert config.model == lft.ModelConfig(path="my/model", dtype="float32")
    assert config.adapter == lft.AdapterConfig(rank=8, alpha=16)
    assert config.data == lft.DataConfig(
        train=("data/sums.json",), shape="alpaca", max_length=2048, validation_rows=0
    )
    optim = lft.OptimConfig(learning_rate=5e-5, schedule="linear", warmup_fraction=0.0)
    assert config.optim == optim
    assert config.train == lft.TrainConfig(
        output="out/it", epochs=3.0, batch_size=8, seed=42, save_every=500, report_to=()
    )
    assert (config.eval.rows, config.eval.exact_match_rows, config.eval.samples) == (0, 0, 0)


@pytest.mark.parametrize(
    ("keys", "option", "value"),
    [
        ({"lora_rank": 4}, "adapter.alpha", 8),
        ({"lora_rank": 4, "lora_alpha": 4}, "adapter.alpha", 4),
        ({"lora_dropout": 0.1}, "adapter.dropout", 0.1),
        ({"lora_target": "q_proj, v_proj"}, "adapter.targets", ("q_proj", "v_proj")),
        ({"lora_target": ["q_proj"]}, "adapter.targets", ("q_proj",)),
        ({"additional_target": "lm_head"}, "adapter.train_whole", ("lm_head",)),
        ({"use_rslora": True}, "adapter.scaling", "rank_stabilized"),
        ({"add_tokens": "<a>, <b>", "resize_vocab": True}, "data.new_tokens", ("<a>", "<b>")),
        ({"use_dora": True}, "adapter.dora", True),
        ({"pissa_init": True}, "adapter.svd_iterations", 16),
        ({"pissa_init": True, "pissa_iter": -1}, "adapter.svd_iterations", None),
        ({"pissa_init": True}, "adapter.init", "pissa"),
        ({"pissa_init": False, "pissa_iter": 4}, "adapter.init", "kaiming"),
        ({"loraplus_lr_ratio": 16.0}, "optim.lora_plus_ratio", 16.0),
        ({"finetuning_type": "full"}, "adapter.train_whole", ("all",)),
        ({"finetuning_type": "full"}, "adapter.targets", ()),
        ({"finetuning_type": "oft", "oft_block_size": 8}, "adapter.oft_block_size", 8),
        ({"adapter_name_or_path": "a/b"}, "adapter.continue_from", "a/b"),
        ({"quantization_bit": 4}, "quant.format", "nf4"),
        ({"quantization_bit": 8, "quantization_method": "bnb"}, "quant.format", "int8"),
        ({"quantization_bit": 4, "double_quantization": False}, "quant.double", False),
        ({"bf16": True}, "model.dtype", "bfloat16"),
        ({"fp16": True}, "model.dtype", "bfloat16"),
        ({"flash_attn": "disabled"}, "model.attention", "xla"),
        ({"disable_gradient_checkpointing": True}, "model.remat", "none"),
        ({"cutoff_len": 1024}, "data.max_length", 1024),
        ({"packing": True}, "data.pack", True),
        ({"neat_packing": True}, "data.pack", True),
        ({"train_on_prompt": True}, "data.loss_on", "all"),
        ({"mask_history": True}, "data.loss_on", "last"),
        ({"enable_thinking": False}, "data.template_args", ("enable_thinking=false",)),
        ({"template": "qwen"}, "model.chat_template", "qwen"),
        ({"template": "qwen"}, "data.reasoning_loss", "data"),
        ({"template": "qwen3"}, "data.reasoning_loss", "all"),
        ({"template": "qwen3", "enable_thinking": False}, "data.reasoning_loss", "data"),
        ({"template": "kimi_vl"}, "model.chat_template", None),
        ({"default_system": "Be brief."}, "data.system", "Be brief."),
        ({"preprocessing_num_workers": 16}, "data.num_proc", 16),
        ({"max_samples": 30}, "data.train", ("data/sums.json[:30]",)),
        ({"val_size": 0.1}, "data.validation_rows", 0.1),
        ({"val_size": 20}, "data.validation_rows", 20),
        ({"eval_dataset": "sums"}, "data.validation", ("data/sums.json",)),
        ({"per_device_train_batch_size": 2}, "train.batch_size", 2),
        ({"gradient_accumulation_steps": 4}, "train.batch_size", 32),
        ({"gradient_accumulation_steps": 4}, "train.microbatches", 4),
        ({"max_steps": 70}, "train.steps", 70),
        ({"max_steps": 70, "num_train_epochs": 2}, "train.epochs", None),
        ({"max_steps": -1, "num_train_epochs": 2}, "train.epochs", 2),
        ({"learning_rate": 1e-4}, "optim.learning_rate", 1e-4),
        ({"lr_scheduler_type": "cosine"}, "optim.schedule", "cosine"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "optim.schedule", "wsd"),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-5},
                "learning_rate": 1e-4,
            },
            "optim.final_fraction",
            pytest.approx(0.1),
        ),
        ({"warmup_ratio": 0.1}, "optim.warmup_fraction", 0.1),
        ({"warmup_ratio": 0.1, "warmup_steps": 20}, "optim.warmup_steps", 20),
        ({"warmup_steps": 0.2}, "optim.warmup_fraction", 0.2),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            "optim.warmup_fraction",
            0.0,
        ),
        ({"weight_decay": 0.01}, "optim.weight_decay", 0.01),
        ({"max_grad_norm": 0.5}, "optim.clip_norm", 0.5),
        ({"optim": "paged_adamw_8bit"}, "optim.optimizer", "adamw"),
        ({"optim": "lion_32bit"}, "optim.optimizer", "lion"),
        ({"adam_beta2": 0.95}, "optim.b2", 0.95),
        ({"neftune_noise_alpha": 5}, "train.neftune_alpha", 5),
        ({"logging_steps": 10}, "train.log_every", 10),
        ({"eval_strategy": "steps", "eval_steps": 50}, "train.eval_every", 50),
        ({"eval_strategy": "steps", "logging_steps": 7}, "train.eval_every", 7),
        ({"eval_strategy": "epoch"}, "train.eval_every", "epoch"),
        ({"eval_strategy": False}, "train.eval_every", 0),  # YAML's bare no
        ({"save_strategy": "epoch"}, "train.save_every", "epoch"),
        ({"save_total_limit": 5}, "train.keep_checkpoints", 5),
        ({"overwrite_output_dir": True}, "train.overwrite", True),
        ({"resume_from_checkpoint": True}, "train.resume", "always"),
        ({"report_to": "all"}, "train.report_to", ("tensorboard", "wandb")),
        ({"report_to": ["wandb", "swanlab"]}, "train.report_to", ("wandb",)),
        ({"seed": 7}, "train.seed", 7),
        ({"push_to_hub": True, "hub_model_id": "me/it"}, "train.push_to_hub", "me/it"),
    ],
)
def test_keys_of_llama_factory(keys: dict[str, Any], option: str, value: Any) -> None:
    section, field = option.split(".")
    assert getattr(getattr(llama(**keys), section), field) == value


def test_what_is_not_obvious_or_not_honored_is_said() -> None:
    said = remarks(read(yaml_of(SHORT | {"bf16": False, "template": "qwen3_no_think"})))
    assert said["bf16"].startswith("false, so model.dtype is float32")
    assert said["template"].endswith("did you mean qwen3_nothink?")
    assert remarks(read(yaml_of(SHORT | {"pure_bf16": False})))["pure_bf16"].startswith("false, ")
    assert remarks(read(yaml_of(SHORT | {"bf16": None})))["bf16"].startswith("null, ")
    assert remarks(read(yaml_of(SHORT)))["bf16"].startswith("absent, ")
    keys = {"template": "kimi_vl", "fp16": True, "packing": True, "report_to": "mlflow"}
    keys |= {"ddp_timeout": 9, "dataloader_num_workers": 4, "use_unsloth": True, "plot_loss": True}
    keys |= {"quantization_bit": 4, "quantization_method": "hqq", "val_size": 500, "galore_rank": 3}
    said = remarks(read(yaml_of(SHORT | keys)))
    assert said["template"].startswith("kimi_vl is unknown here, so the tokenizer's own")
    assert "there is no float16" in said["fp16"]
    assert "do not attend" in said["packing"]
    assert "without mlflow" in said["report_to"]
    assert "in place of HQQ" in said["quantization_method"]
    assert "at most a tenth" in said["val_size"]
    assert said["ddp_timeout"].startswith("not honored: ")
    assert said["use_unsloth"].startswith("not honored: ")
    assert "plot_loss" not in said  # it is always drawn
    assert "galore_rank" in said
    resized = {"add_tokens": "<a>", "resize_vocab": True}
    said = remarks(read(yaml_of(SHORT | resized)))
    assert said["resize_vocab"].startswith("the rows of new tokens train alone")
    # Its tables train there only where nothing else is named.
    resized["additional_target"] = "embed_tokens"
    assert "resize_vocab" not in remarks(read(yaml_of(SHORT | resized)))
    # There, tokens alone grow the tables too; with all modules trained there is nothing to say.
    added = {"add_tokens": "<a>"}
    assert "not the whole tables" in remarks(read(yaml_of(SHORT | added)))["add_tokens"]
    full = {"finetuning_type": "full", "resize_vocab": True, **added}
    assert not {"add_tokens", "resize_vocab"} & set(remarks(read(yaml_of(SHORT | full))))
    alone = remarks(read(yaml_of(SHORT | {"resize_vocab": True})))["resize_vocab"]
    assert alone.startswith("no rows are new")
    named = full | {"additional_target": "lm_head"}
    said = remarks(read(yaml_of(SHORT | named)))
    assert said["additional_target"] == "not needed: finetuning_type full trains all modules"
    # A switch that is off asks for nothing.
    assert "use_unsloth" not in remarks(read(yaml_of(SHORT | {"use_unsloth": False})))


def test_load_config_warns_of_what_is_not_honored() -> None:
    Path("run.yaml").write_text(yaml_of(SHORT | {"ddp_timeout": 9}))
    with pytest.warns(UserWarning, match="not honored: ddp_timeout"):
        assert lft.load_config("run.yaml").model.path == "my/model"


def test_the_batch_is_that_of_all_devices() -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    config, source = read(yaml_of(SHORT | keys))
    assert source is not None
    on_eight, said = for_devices(config, source, 8)
    assert (on_eight.train.batch_size, on_eight.train.microbatches) == (64, 4)
    assert said == [("train.batch_size", "64 = 2 per device × 4 of accumulation × 8 devices")]
    # Devices that share a row have no rows of their own.
    split = dataclasses.replace(config, mesh=lft.MeshConfig(tensor=4))
    assert for_devices(split, source, 8)[0].train.batch_size == 16
    # An option of the command line is the batch of all devices.
    _, source = read(yaml_of(SHORT | keys), overridden={"train.batch_size"})
    assert source is not None
    assert for_devices(config, source, 8) == (config, [])


def test_an_option_of_the_command_line_replaces_what_it_says_alone() -> None:
    """The keys of a translation in common that say something else hold."""
    keys = {"lora_target": "q_proj", "additional_target": "lm_head", "quantization_bit": 4}
    keys |= {"double_quantization": False, "gradient_accumulation_steps": 8}
    given = {"adapter.method", "quant.format", "train.batch_size"}
    config = read(yaml_of(SHORT | keys), overridden=given).config
    assert config.adapter.targets == ("q_proj",)
    assert config.adapter.train_whole == ("lm_head",)
    assert not config.quant.double
    assert config.train.microbatches == 8
    # Its keys are said, once.
    loaded = read(yaml_of(SHORT | {"lora_rank": 8}), overridden={"adapter.rank", "model.path"})
    assert remarks(loaded)["model_name_or_path, lora_rank"] == (
        "not read: --model.path, --adapter.rank are given"
    )
    # A method beside finetuning_type full is an adapter.
    config = read(yaml_of(SHORT | {"finetuning_type": "full"}), overridden=given).config
    assert config.adapter.train_whole == ()


@pytest.mark.parametrize(
    ("keys", "option"),
    [
        ({"quantization_bit": 3}, "quant.format"),
        ({"quantization_bit": 4, "quantization_method": "gptq"}, "quant.format"),
        ({"quantization_bit": 4, "double_quantization": 3}, "quant.double"),
        ({"finetuning_type": "freeze"}, "adapter.method"),
        ({"lora_target": 3}, "adapter.targets"),
        ({"pissa_init": True, "pissa_iter": "many"}, "adapter.svd_iterations"),
        ({"use_dora": "yes"}, "adapter.no_dora"),
        ({"oft_rank": 8}, "adapter.oft_block_size"),
        ({"use_galore": True}, "optim.optimizer"),
        ({"use_muon": True}, "optim.optimizer"),
        ({"optim": "adafactor"}, "optim.optimizer"),
        ({"lr_scheduler_type": "polynomial"}, "optim.schedule"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "optim.final_fraction"),
        ({"warmup_ratio": "ten"}, "optim.warmup_steps"),
        ({"add_special_tokens": "<a>"}, "data.new_tokens"),
        ({"mix_strategy": "interleave_under"}, "data.train"),
        ({"val_size": "a tenth"}, "data.validation_rows"),
        ({"per_device_train_batch_size": 0}, "train.batch_size"),
        ({"deepspeed": 3}, "mesh.fsdp"),
        # What the file alone would not train, or could not compare.
        ({"load_best_model_at_end": True}, "train.eval_every"),
        ({"peft_type": "LORA", "target_parameters": ["experts.up"]}, "adapter.targets"),
        ({"peft_type": "LORA", "init_lora_weights": False}, "adapter.init"),
        (
            {
                "peft_type": "LORA",
                "init_lora_weights": "loftq",
                "loftq_config": {"loftq_bits": 2},
            },
            "quant.format",
        ),
        ({"peft_type": "LORA", "alora_invocation_tokens": [5]}, "adapter.invocation"),
        ({"peft_type": "OFT", "r": 8}, "adapter.oft_block_size"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": []}, "adapter.trainable_tokens"),
    ],
)
def test_an_option_replaces_a_key_that_is_refused(keys: dict[str, Any], option: str) -> None:
    text, name = yaml_of(SHORT | keys), "run.yaml"
    if "peft_type" in keys:
        text, name = json.dumps(keys), "adapter_config.json"
    with pytest.raises(ValueError, match=name):
        read(text, name)
    source = read(text, name, overridden={option}).source
    assert source is not None
    # Others become valid by what the option says beside them.
    if option not in ("train.eval_every", "optim.final_fraction", "quant.format"):
        assert {*keys} & {*source.unread}


@pytest.mark.parametrize(
    ("keys", "splits"),
    [
        ({"deepspeed": "examples/ds_z3_config.json"}, True),
        ({"deepspeed": "data/stage.json"}, True),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, False),
        ({"deepspeed": {"zero_optimization": {"stage": "3"}}}, True),
        ({"deepspeed": "x" * 5000}, False),
        ({"fsdp": ["full_shard", "auto_wrap"]}, True),
        ({"fsdp": ""}, False),
        ({"fsdp": True}, True),
        ({}, False),
    ],
)
def test_weights_that_are_split_over_the_devices(keys: dict[str, Any], splits: bool) -> None:
    Path("data/stage.json").write_text('{"zero_optimization": {"stage": 3}}')
    config, source = read(yaml_of(SHORT | keys))
    assert source is not None
    expected = lft.MeshConfig(data=1, fsdp=4) if splits else lft.MeshConfig()
    assert for_devices(config, source, 4)[0].mesh == expected


def test_datasets_of_dataset_info() -> None:
    named = {"prompt": "question", "query": "hint", "response": "reply", "system": "rules"}
    turns = {"messages": "dialog", "system": "rules"}
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "user", "assistant_tag": "gpt"}
    write_info(
        qa={"file_name": "qa.jsonl", "columns": named, "num_samples": 9},
        chat={"file_name": "chat.json", "formatting": "sharegpt", "columns": turns, "tags": tags},
        openai={"hf_hub_url": "o/n", "formatting": "sharegpt", "columns": {"messages": "messages"}},
        part={"hf_hub_url": "o/n", "subset": "en", "split": "dev"},
        files={"file_name": "many"},
        more={"file_name": "more.jsonl", "num_samples": 3},
    )
    Path("data/many").mkdir()
    Path("data/many/a.jsonl").write_text("")
    data = llama(dataset="qa, chat").data
    assert data.train == ("data/qa.jsonl[:9]", "data/chat.json")
    assert data.shape == "auto"
    fields = {"instruction=question", "input=hint", "output=reply", "system=rules"}
    assert set(data.fields) == fields | {"conversations=dialog", "role=who", "content=said"}
    assert llama(dataset="qa", max_samples=5).data.train == ("data/qa.jsonl[:5]",)
    data = llama(dataset="openai").data
    assert (data.train, data.shape, data.fields) == (("o/n",), "messages", ())
    data = llama(dataset="part").data
    assert (data.train, data.split) == (("o/n:en",), "dev")
    assert llama(dataset="files").data.train == ("data/many/*.jsonl",)
    assert llama(dataset="a/b", dataset_dir="ONLINE").data.train == ("a/b",)
    sets = {"eval_dataset": "files,more", "eval_on_each_dataset": True}
    data = llama(dataset="files", **sets).data
    assert data.validation == ("files=data/many/*.jsonl", "more=data/more.jsonl[:3]")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "data/dataset_info.json has no dataset 'sums'; did you mean sum?"),
        ({"file_name": 3}, "file_name is 3; it must be a text"),
        ({"file": "a.json"}, "there is no 'file'; did you mean file_name?"),
        ({}, "has no file_name and no hf_hub_url"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url cannot be read; download it"),
        ({"file_name": "a.json", "formatting": "chatml"}, "formatting is 'chatml'; it can be"),
        ({"file_name": "a.json", "ranking": True}, "has ranking, and only texts with one answer"),
        ({"file_name": "a.json", "columns": {"images": "images"}}, "has images, and only texts"),
        ({"file_name": "a.json", "columns": {"promt": "q"}}, "there is no column 'promt'"),
        ({"file_name": "a.json", "columns": {"prompt": 3}}, "prompt is 3; it must be a text"),
        ({"file_name": "a.json", "columns": "q"}, "columns is 'q'; it must be keys with names"),
        ({"file_name": "a.json", "num_samples": True}, "num_samples is True; it must be a whole"),
        ({"file_name": "a.json", "num_samples": -5}, "num_samples is -5; it must be a whole num"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples is 0; it must be a whole number"),
        ({"file_name": "a.json", "num_samples": 2.5}, "num_samples is 2.5; it must be a whole"),
        ({"file_name": "a.json", "num_samples": "9"}, "num_samples is '9'; it must be a whole"),
        (["a.json"], "sums is ['a.json']; it must be keys with values"),
        (
            {"file_name": "a.json", "formatting": "sharegpt", "tags": {"user_tag": "client"}},
            "user_tag is 'client'; the role can be named human, user",
        ),
    ],
)
def test_datasets_that_cannot_be_read(entry: dict[str, Any] | None, message: str) -> None:
    write_info(**({"sum": {}} if entry is None else {"sums": entry}))
    with pytest.raises(ValueError, match="run.yaml, line 2: dataset: .*" + re.escape(message)):
        llama()


def test_datasets_with_other_names_of_a_field() -> None:
    columns = {"prompt": "q", "response": "output"}
    same = {"prompt": "instruction", "response": "output"}
    turns = {"file_name": "t.json", "formatting": "sharegpt"}
    write_info(
        a={"file_name": "a.json", "columns": columns},
        # Absent columns have the default names.
        b={"file_name": "b.json"},
        c={"file_name": "c.json", "columns": same},
        turns=turns,
        said=turns | {"tags": {"content_tag": "said"}},
        dev={"file_name": "d.json", "split": "dev"},
    )
    for other in ("b", "c"):
        message = f"line 2: dataset: a has instruction in the field 'q', and {other} in 'instruct"
        with pytest.raises(ValueError, match=message):
            llama(dataset=f"a,{other}")
    with pytest.raises(ValueError, match="eval_dataset: a has instruction in the field 'q', and b"):
        llama(dataset="a", eval_dataset="b")
    with pytest.raises(ValueError, match=r"turns has content in .* 'content', and said in 'said'"):
        llama(dataset="turns,said")
    with pytest.raises(ValueError, match="eval_dataset: one split for all of them, not dev and"):
        llama(dataset="b", eval_dataset="dev,b")
    # Options replace what differs.
    overridden = {"data.split", "data.validation_split", "data.fields"}
    for names in ("a,b", "dev,b"):
        assert read(yaml_of(SHORT | {"dataset": names}), overridden=overridden).source is not None
    # Rows of other shapes have other fields.
    assert llama(dataset="b,c,turns").data.fields == ()
    assert llama(dataset="a,said").data.fields == ("instruction=q", "content=said")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml is empty"),
        ("# nothing\n", "run.yaml is empty"),
        ("- a\n- b\n", "run.yaml holds a list at the top"),
        ("just text\n", "run.yaml holds str 'just text' at the top"),
        ("stage: sft\n\tlora_rank: 8\n", "run.yaml, line 2: not valid YAML: a tab"),
        ("stage: sft\nlora_rank: 8\nstage: sft\n", "line 3: stage is given twice, first in line 1"),
        ("adapter:\n  rank: 8\n  rank: 9\n", "line 3: rank is given twice, first in line 2"),
        ("stage: [sft\nlora_rank: 8\n", "run.yaml, line 2: not valid YAML"),
        ("stage: sft\n---\nstage: sft\n", "run.yaml, line 2: not valid YAML"),
        ("? [a]\n: b\n", "run.yaml, line 1: a key is a sequence; give a name"),
        ("stage: !!python/object/apply:os.system [ls]\n", "line 1: .*makes an object"),
        ("stage: !!timestamp 2\n", "line 1: the tag timestamp makes an object"),
        ("stage: !!bool x\n", "run.yaml is not valid YAML"),
        ("stage: !!int ''\n", "run.yaml is not valid YAML"),
        ("stage: &a [*a]\n", "line 1: an anchor contains itself"),
        ("stage: " + "[" * 1200, "run.yaml is not valid YAML: nested too deeply"),
        ("stage: \x07\n", "run.yaml is not valid YAML"),
        ("lora_rank: " + "9" * 5000 + "\n", "run.yaml is not valid YAML: .*4300 digits"),
        ("sgate: sft\nlora_rank: 8\n", "line 1: LLaMA-Factory has no key 'sgate'; .* mean stage"),
        ("stage: sft\nlora_rnak: 8\n", "line 2: .*did you mean lora_rank"),
        (
            "stage: dpo\n",
            "line 1: stage dpo cannot be run: .* sft only, and no option changes that",
        ),
        ("stage: pt\n", "line 1: stage pt cannot be run"),
        ("stage: sfft\n", "line 1: stage is sfft; it can be sft, pt, rm, ppo, dpo or kto"),
        ("do_train: false\n", "line 1: do_train is false"),
        ("lora_rank: eight\n", "line 1: lora_rank is 'eight'; it must be a whole number"),
        ("lora_rank: 2.5\n", "line 1: lora_rank is 2.5; it must be a whole number"),
        ("lora_rank: true\n", "line 1: lora_rank is True; it must be a whole number"),
        ("lora_rank: -2\n", r"line 1 \(lora_rank\): adapter.rank is -2; it must be above 0"),
        ("use_dora: 'yes'\n", "line 1: use_dora is 'yes'; it must be true or false"),
        ("lora_target: 3\n", "line 1: lora_target is 3; it must be names"),
        ("finetuning_type: freeze\n", "line 1: finetuning_type freeze cannot be run"),
        ("use_galore: true\n", "line 1: use_galore true cannot .*; --optim.optimizer replaces it"),
        ("use_dft_loss: true\n", "line 1: use_dft_loss true cannot be honored: the loss"),
        ("quantization_bit: 3\n", "is 3; it can be 4 or 8 .--quant.format replaces it"),
        ("finetuning_type: full\nquantization_bit: 4\n", "line 2: quantization_bit and .* exclude"),
        ("quantization_bit: 4\nquantization_method: gptq\n", "line 2: quantization_method is gptq"),
        ("optim: adafactor\nseed: 1\n", "line 1: optim is adafactor; it can be"),
        ("lr_scheduler_type: polynomial\n", "line 1: lr_scheduler_type is polynomial"),
        ("lr_scheduler_kwargs: {power: 2}\n", "line 1: lr_scheduler_kwargs power"),
        ("lr_scheduler_kwargs: 3\n", "line 1: lr_scheduler_kwargs is 3; it must be keys with"),
        ("lr_scheduler_type: cosine_with_min_lr\n", "lr_scheduler_kwargs is {}; it needs min_lr"),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 2}\n",
            "line 2: lr_scheduler_kwargs is {'min_lr_rate': 2}; it needs",
        ),
        (f"dataset_dir: {'x' * 5000}\ndataset: a\n", "line 2: dataset: there is no xxx"),
        (f"output_dir: a\nlora_rank: 3\nstage: {'x' * 5000}\n", r"line 3: stage is x{80};"),
        ("model_name_or_path: a\nlora_target: '('\n", r"line 2 \(lora_target\): adapter.targets: "),
        (
            "model_name_or_path: a\nadditional_target: '('\n",
            r"line 2 \(additional_target\): adapter.train_whole: '\('",
        ),
        ("val_size: .inf\n", "line 1: val_size is inf; it must be a number"),
        ("learning_rate: .nan\n", "line 1: learning_rate is nan; it must be a number"),
        ("lora_alpha: 1" + "0" * 400 + "\n", "line 1: lora_alpha is 1000"),
        ("val_size: 0.1\neval_dataset: sums\n", "line 1: val_size and eval_dataset exclude"),
        ("dataset: a\ndataset_dir: ~n.n/d\n", "line 1: .* there is no ~n.n/d/dataset_info.json"),
        ("on: 3\nstage: sft\n", "line 1: YAML reads the key on as something else than a text"),
        ("model: a\nquant: b\nstage: sft\n", "section 'model' of the config is not an object"),
        ("logging_steps: 0.1\n", "line 1: logging_steps is 0.1, a fraction of all steps"),
        ("logging_steps: -1\n", "line 1: logging_steps is -1; give a number of steps"),
        ("dataset: sums\nmax_samples: -3\n", "line 2: max_samples is -3; .* number above 0"),
        ("dataset: sums\nmax_samples: true\n", "line 2: max_samples is True; .* number above 0"),
        (
            "per_device_train_batch_size: 4\ngradient_accumulation_steps: 0\n",
            "line 2: gradient_accumulation_steps is 0; it must be a whole number above 0",
        ),
        (
            "pissa_init: true\npissa_iter: -2\n",
            r"line 2 \(pissa_iter\): adapter.svd_iterations is -2",
        ),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: true}\n",
            "line 2: lr_scheduler_kwargs is {'min_lr': True}; it needs min_lr, from 0",
        ),
        ("deepspeed: 3\nstage: sft\n", "line 1: deepspeed is 3; it must be a file or keys"),
        ("deepspeed: data\nstage: sft\n", "line 1: deepspeed: data is a folder, not a file"),
        ("fsdp: 3\nstage: sft\n", "line 1: fsdp is 3; it must be names, or true or false"),
        ("resize_vocab: 3\nstage: sft\n", "line 1: resize_vocab is 3; it must be true or false"),
        ("resume_from_checkpoint: out/checkpoint-5\n", "cannot be resumed"),
        ("adapter_name_or_path: a,b\n", "line 1: adapter_name_or_path: merge a, b"),
        ("mixture_of_depths: load\n", "cannot be honored: .*; no option replaces it, so remove it"),
        ("dataset: suns\n", "line 1: dataset: data/dataset_info.json has no dataset 'suns'"),
        ("base_model: a/b\nadapter: lora\n", "line 1: a YAML of axolotl is not read"),
        ("base_modle: a/b\nsequence_len: 9\n", "line 2: a YAML of axolotl is not read"),
        (
            "task: llm-sft\nbase_model: a/b\n",
            "line 1: a YAML of AutoTrain is not read; .*autotrain",
        ),
        ("model_class: llm\n", "line 1: a YAML of LLaMA-Factory's v1 is not read"),
        ("compute_environment: x\n", "line 1: a YAML of accelerate is not read"),
        ("colour: red\nshape: round\n", "line 1: unknown key 'colour'; a config has our sections"),
        ("adapter: {rank: 8}\nmodle: {}\n", "line 2: unknown key 'modle' .did you mean model"),
        ("adapter:\n  rank: eight\n", "line 2: adapter.rank is 'eight'; it must be an integer"),
        ("adapter:\n  rnak: 8\n", "line 2: adapter.rnak is no option; did you mean adapter.rank"),
        ("adapter:\n  targets: q_proj\n", "line 2: adapter.targets is .*it must be a list"),
        ("optim:\n  eps: 1" + "0" * 400 + "\n", "line 2: optim.eps is 1000.*it must be below 2"),
        ("adapter: 3\n", "section 'adapter' of the config is not an object"),
    ],
)
def test_bad_yaml_is_one_line_with_its_place(text: str, message: str) -> None:
    # Nearly all of them need no dataset to be wrong.
    overridden = {"model.path"}
    if not text.startswith("dataset"):
        overridden.add("data.train")
    with pytest.raises(ValueError, match=message):
        read(text, overridden=overridden)


@pytest.mark.parametrize("key", ["export_dir", "infer_backend"])
def test_files_of_other_commands_are_said(key: str) -> None:
    text = yaml_of({"model_name_or_path": "my/model", key: "x"})
    with pytest.raises(ValueError, match=f"line 2: {key} without stage and dataset is no training"):
        read(text)
    assert read(text, overridden={"data.train"}).source is not None


NESTED = "[" * 1500
DEEP = "[" * 900 + "]" * 900
"""Python reads it, and has too little room left to write it into a message."""


@pytest.mark.parametrize("value", [NESTED, "{'a': " * 1500, DEEP], ids=["list", "object", "deep"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "stage: sft\nlora_rank: {}"),
        ("run.json", '{{"stage": "sft", "model_name_or_path": {}}}'),
        ("own.yaml", "adapter: {{rank: {}}}"),
        ("own.json", '{{"adapter": {{"rank": {}}}}}'),
        ("adapter_config.json", '{{"peft_type": "LORA", "target_modules": {}}}'),
        ("data/dataset_info.json", '{{"sums": {{"file_name": {}}}}}'),
        ("data/ds.json", '{{"zero_optimization": {{"stage": {}}}}}'),
    ],
)
def test_what_is_nested_too_deeply_is_one_line(name: str, text: str, value: str) -> None:
    Path(name).write_text(text.format(value.replace("'", '"')))
    read_from = name
    if name.startswith("data"):
        read_from = "run.yaml"
        Path(read_from).write_text(yaml_of(SHORT | {"deepspeed": "data/ds.json"}))
        if name == "data/ds.json" and value == DEEP:
            # A stage that is no number splits nothing.
            assert read_config(read_from).source is not None
            return
    with pytest.raises(ValueError, match=f"^{read_from}.* (nested too deeply|must be)") as raised:
        read_config(read_from)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("run.yaml", {"stage": "s\nft"}),
        ("run.yaml", {"lora_rank": "a\rb"}),
        ("run.yaml", {"rope_scaling": "a\nb"}),
        ("run.yaml", {"dataset": "a\u2028b"}),
        ("run.yaml", {"dataset_dir": "REMOTE:a\nb"}),
        ("run.yaml", {"adapter_name_or_path": ["a\nb", "c"]}),
        ("run.yaml", {"resume_from_checkpoint": "a\nb"}),
        ("run.yaml", {"lora_target": "a\n("}),
        ("run.yaml", {"sta\nge": 3}),
        ("run.json", {"stage": "s\nft"}),
        ("own.yaml", {"train": {"report_to": ["a\nb"]}}),
        ("own.json", {"model": {"pa\nth": "a"}}),
        ("adapter_config.json", {"peft_type": "a\nb"}),
        ("adapter_config.json", {"peft_type": "LORA", "task_type": "a\nb"}),
        ("adapter_config.json", {"peft_type": "LORA", "init_lora_weights": "a\nb"}),
        ("adapter_config.json", {"peft_type": "LORA", "rank_pattern": {"a\nb": "c"}}),
    ],
)
def test_values_with_line_ends_make_errors_of_one_line(name: str, keys: dict[str, Any]) -> None:
    text = json.dumps(keys) if name.endswith("json") else yaml_of(keys)
    if name == "run.yaml":
        text += yaml_of({key: value for key, value in SHORT.items() if key not in keys})
    with pytest.raises(ValueError, match=f"^{name}") as raised:
        read(text, name)
    assert len(str(raised.value).splitlines()) == 1


def test_notes_of_values_with_line_ends_are_one_line() -> None:
    said = remarks(read(yaml_of(SHORT | {"template": "a\nb", "report_to": ["c\nd"]})))
    assert said["template"].startswith(r"a\nb is unknown here")
    assert r"c\nd" in said["report_to"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adapter_config.json", '{"peft_type": "LORA", "r": 8, "r": 16}'),
        ("run.json", '{"stage": "sft", "r": {"r": 1, "r": 2}}'),
        ("own.json", '{"adapter": {"r": 8, "r": 9}}'),
        ("data/dataset_info.json", '{"sums": {}, "r": {}, "r": {}}'),
    ],
)
def test_repeated_keys_of_json_are_refused(name: str, text: str) -> None:
    Path(name).write_text(text)
    Path("run.yaml").write_text(yaml_of(SHORT))
    with pytest.raises(ValueError, match=f"{name} is not valid JSON: 'r' is given twice"):
        read_config("run.yaml" if name.startswith("data") else name)


def test_anchors_that_explode() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    with pytest.raises(ValueError, match="values with its anchors, above 10,000"):
        read("\n".join(lines))
    # Those of a file that somebody wrote are fine.
    config = read("adapter: &a\n  targets: &t [q_proj]\n  exclude: *t\n").config
    assert config.adapter.exclude == ("q_proj",)


def test_numbers_as_python_writes_them() -> None:
    assert read("optim:\n  learning_rate: 1e-4\n  eps: 1.e-6\n").config.optim.learning_rate == 1e-4
    assert read("model:\n  path: '1e-4'\n").config.model.path == "1e-4"
    assert read("train:\n  output: 2026-11-28\n").config.train.output == "2026-11-28"


def test_yaml_of_our_sections() -> None:
    text = "adapter:\n  rank: 4\n  targets: [q_proj]\ntrain:\n  eval_every: epoch\n"
    config = read(text).config
    assert config.adapter == lft.AdapterConfig(rank=4, targets=("q_proj",))
    assert config == dataclasses.replace(
        lft.Config(), adapter=config.adapter, train=lft.TrainConfig(eval_every="epoch")
    )
    of_run = lft.load_config("pissa")
    assert read(of_run.to_json(), "config.json") == Loaded(of_run)
    assert read(of_run.to_json(), "config.yml") == Loaded(of_run)


LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32}


def peft(**keys: Any) -> lft.Config:
    return read(json.dumps(LORA | keys), "adapter_config.json").config


@pytest.mark.parametrize(
    ("keys", "option", "value"),
    [
        ({}, "adapter.rank", 16),
        ({}, "adapter.alpha", 32),
        ({"lora_alpha": None}, "adapter.alpha", 8),
        ({"base_model_name_or_path": "my/model"}, "model.path", "my/model"),
        ({"target_modules": "all-linear"}, "adapter.targets", ("all-linear",)),
        ({"target_modules": ["q_proj", "v_proj"]}, "adapter.targets", ("q_proj", "v_proj")),
        ({"target_modules": r".*\.q_proj"}, "adapter.targets", (r".*\.q_proj",)),
        (
            {"target_modules": r"model\.layers\.0\..*"},
            "adapter.targets",
            (r"layers\.0\..*",),
        ),
        ({"exclude_modules": ["lm_head"]}, "adapter.exclude", ("lm_head",)),
        ({"use_rslora": True}, "adapter.scaling", "rank_stabilized"),
        ({"use_dora": True}, "adapter.dora", True),
        ({"lora_dropout": 0.1}, "adapter.dropout", 0.1),
        ({"modules_to_save": ["lm_head"]}, "adapter.train_whole", ("lm_head",)),
        ({"layers_to_transform": 3}, "adapter.layers", (3,)),
        ({"trainable_token_indices": [5, 7]}, "adapter.trainable_tokens", (5, 7)),
        (
            {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
            "adapter.trainable_tokens",
            (5,),
        ),
        ({"layers_to_transform": [0, 1]}, "adapter.layers", (0, 1)),
        ({"rank_pattern": {"q_proj": 4}}, "adapter.rank_pattern", ("q_proj=4",)),
        (
            {"alpha_pattern": {"model.layers.0.mlp.up_proj": 4}},
            "adapter.alpha_pattern",
            ("layers.0.mlp.up_proj=4",),
        ),
        (
            {"rank_pattern": {r"layers\.[01]\..*": 4}},
            "adapter.rank_pattern",
            (r"(.*\.)?(layers\.[01]\..*)=4",),
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "adapter.svd_iterations", 4),
        ({"init_lora_weights": "pissa"}, "adapter.init", "pissa"),
        ({"init_lora_weights": True}, "adapter.init", "kaiming"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 1.5}}, "adapter.eva_rho", 1.5),
        ({"init_lora_weights": "corda"}, "adapter.corda_mode", "ipm"),
        ({"init_lora_weights": "mica"}, "adapter.freeze", ("lora_b",)),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}, "quant.rounds", 5),
    ],
)
def test_fields_of_a_lora_config(keys: dict[str, Any], option: str, value: Any) -> None:
    section, field = option.split(".")
    assert getattr(getattr(peft(**keys), section), field) == value


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        (
            "IA3",
            {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
            {"targets": ("k_proj", "down_proj"), "feedforward": ("down_proj",)},
        ),
        ("MISS", {"init_weights": True, "miss_dropout": 0.1}, {"rank": 64, "dropout": 0.1}),
        ("BONE", {"r": 4, "bias": "none"}, {"rank": 4}),
        ("VERA", {"d_initial": 0.2}, {"rank": 256, "vera_d_initial": 0.2}),
        ("VERA", {"r": 4, "save_projection": True, "vera_dropout": 0.1}, {"rank": 4}),
        ("LOHA", {}, {"rank": 8, "alpha": 8}),
        ("LOHA", {"rank_pattern": {"q_proj": 4}, "r": 2}, {"rank_pattern": ("q_proj=4",)}),
        ("LOKR", {"alpha": 4, "decompose_factor": 3}, {"alpha": 4, "lokr_factor": 3}),
        ("LOKR", {"decompose_factor": -1, "decompose_both": False}, {"lokr_factor": None}),
        ("SHIRA", {"r": 3, "layers_to_transform": [1]}, {"rank": 3, "layers": (1,)}),
        ("HIRA", {"exclude_modules": "lm_head"}, {"rank": 32, "exclude": ("lm_head",)}),
        ("OFT", {"r": 0, "coft": False, "oft_block_size": 16}, {"oft_block_size": 16}),
        ("OFT", {"modules_to_save": ["norm"]}, {"oft_block_size": 32, "train_whole": ("norm",)}),
        ("TRAINABLE_TOKENS", {"token_indices": [3, 5]}, {"trainable_tokens": (3, 5)}),
        ("TRAINABLE_TOKENS", {"token_indices": [3], "target_modules": ["a.lm_head"]}, {}),
    ],
)
def test_other_types_of_adapters(kind: str, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    adapter = read(json.dumps({"peft_type": kind} | keys), "adapter_config.json").config.adapter
    if kind == "TRAINABLE_TOKENS":
        assert adapter.targets == ()
    else:
        assert adapter.method == {"BONE": "miss"}.get(kind, kind.lower())
    assert {name: getattr(adapter, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("PROMPT_TUNING", {}, {"kind": "prompt", "init": "random"}),
        (
            "PROMPT_TUNING",
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Add.", "token_dim": 9},
            {"kind": "prompt", "init": "text", "text": "Add."},
        ),
        ("PROMPT_TUNING", {"prompt_tuning_init": "SAMPLE_VOCAB"}, {"kind": "prompt"}),
        (
            "P_TUNING",
            {"encoder_hidden_size": 9},
            {"kind": "prompt", "encoder": "mlp", "encoder_width": 9},
        ),
        (
            "P_TUNING",
            {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2},
            {"kind": "prompt", "encoder": "lstm"},
        ),
        # A width without a projection is that of nothing.
        ("PREFIX_TUNING", {"encoder_hidden_size": 9}, {"kind": "prefix", "init": "random"}),
        (
            "PREFIX_TUNING",
            {"encoder_hidden_size": 9, "prefix_projection": True},
            {"kind": "prefix", "encoder": "mlp", "encoder_width": 9},
        ),
    ],
)
def test_types_of_soft_prompts(kind: str, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    text = json.dumps({"peft_type": kind, "num_virtual_tokens": 5} | keys)
    config = read(text, "adapter_config.json").config
    assert config.prompt == lft.PromptConfig(virtual_tokens=5, **expected)
    assert config.adapter == lft.AdapterConfig(targets=())
    # Beside an adapter.
    config = read(text, "adapter_config.json", overridden={"adapter.targets"}).config
    assert config.adapter == lft.AdapterConfig()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3", "r": 8}, "PEFT's IA3 has no key 'r'"),
        (
            {
                "peft_type": "IA3",
                "target_modules": ["k"],
                "feedforward_modules": ["up", "k", "down"],
            },
            "feedforward_modules must be a subset of target_modules, which lacks down, up$",
        ),
        (
            {"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": "up"},
            "feedforward_modules must be a subset of target_modules, which lacks up$",
        ),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "prompt_tuning_init": "TEXT"},
            "prompt_tuning_init TEXT needs prompt_tuning_init_text",
        ),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": []}, r"token_indices is \[\]; it is"),
        ({"peft_type": "VERA", "task_type": "SEQ_CLS"}, "task_type SEQ_CLS cannot be run"),
        ({"peft_type": "VERA", "init_weights": False}, "init_weights false cannot be honored"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "init_weights bat cannot be honored"),
        ({"peft_type": "LOHA", "module_dropout": 0.1}, "module_dropout 0.1 cannot be honored"),
        ({"peft_type": "LOKR", "decompose_both": True}, "decompose_both true cannot be honored"),
        ({"peft_type": "LOKR", "decompose_factor": 0}, r".decompose_factor.: adapter.lokr_factor"),
        ({"peft_type": "OFT", "r": 8, "oft_block_size": 0}, "r 8 cannot be honored: blocks are"),
        ({"peft_type": "OFT", "use_cayley_neumann": False}, "use_cayley_neumann false cannot"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens is missing"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 0}, "num_virtual_tokens is 0; it must"),
        (
            {
                "peft_type": "P_TUNING",
                "num_virtual_tokens": 4,
                "encoder_reparameterization_type": "LSTM",
                "encoder_num_layers": 3,
            },
            "encoder_num_layers is 3; an LSTM here has 2",
        ),
        ({"peft_type": "TRAINABLE_TOKENS"}, "token_indices is missing"),
        (
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["q_proj"]},
            "target_modules q_proj: tokens are in",
        ),
        ({"peft_type": "LORA", "rank_pattern": {"q": "a=4"}}, "rank_pattern: q is 'a=4'; it must"),
        ({"peft_type": "LORA", "rank_pattern": {"q": True}}, "rank_pattern: q is True; it must"),
        ({"peft_type": "LORA", "layers_to_transform": ["a"]}, ".*it must be a list, each entry"),
        ({"peft_type": "LORA", "init_lora_weights": "x"}, ".* it can be true, gaussian, ortho"),
    ],
)
def test_other_types_that_cannot_be_honored(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^adapter_config.json:? ?{message}"):
        read(json.dumps(keys), "adapter_config.json")


def test_a_config_of_peft_without_its_type() -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json has no peft_type; add it"):
        read(json.dumps({"r": 8, "lora_alpha": 16}), "adapter_config.json")
    keys = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match=r"other.json has no peft_type; add it"):
        read(json.dumps(keys), "other.json")


def test_each_type_that_folders_have_is_read() -> None:
    ours = {method.peft_type: name for name, method in METHODS.items() if name != "bottleneck"}
    assert {*ours, *KINDS, TRAINABLE_TOKENS, "BONE"} == set(TABLES)


def test_absent_keys_of_peft_are_said() -> None:
    keys = {"peft_type": "IA3", "feedforward_modules": None}
    loaded = read(json.dumps(keys), "adapter_config.json")
    said = remarks(loaded)
    assert said["target_modules"].startswith("absent, so all linear layers; PEFT chooses by")
    assert said["feedforward_modules"].startswith("null, so outputs are scaled only")
    assert said["base_model_name_or_path"].startswith("absent, so the tiny model that comes with")
    # Modules without names are no patterns, which would match everything or nothing.
    adapter = peft(target_modules=["q_proj", ""], exclude_modules="").adapter
    assert (adapter.targets, adapter.exclude) == (("q_proj",), ())


def test_the_data_of_a_config_of_peft_is_said() -> None:
    """A file of PEFT names no data, and of LLaMA-Factory always some."""
    config, source = read(json.dumps(LORA), "adapter_config.json")
    assert source is not None
    said = dict(for_devices(config, source, 1)[1])
    assert said["data.train"].startswith("the questions that come with lorax_ft")
    own = dataclasses.replace(config, data=lft.DataConfig(train=("a.jsonl", "b.jsonl")))
    said = dict(for_devices(own, source, 1)[1])
    assert said["data.train"] == "a.jsonl, b.jsonl; a file of PEFT names no data"
    config, source = read(yaml_of(SHORT))
    assert source is not None
    assert "data.train" not in dict(for_devices(config, source, 1)[1])


def test_objects_of_starts_in_a_lora_config() -> None:
    keys = {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "tau": 0.9}}
    keys |= {"corda_config": {"corda_method": "kpm"}, "loftq_config": {}}
    said = remarks(read(json.dumps(LORA | keys), "adapter_config.json"))
    assert said["eva_config"] == "only rho of it is honored"
    assert said["corda_config"] == "not honored: it belongs to init_lora_weights corda"
    assert "loftq_config" not in said
    keys = {"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 64}}
    assert peft(**keys).adapter.lora_ga_gamma == 64


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"peft_type": "ADALORA"},
            "peft_type ADALORA has no method here, and no option changes .* are LORA, IA3, MISS",
        ),
        ({"peft_type": "LORRA"}, "peft_type LORRA has no .*; did you mean LORA"),
        ({"peft_type": 3}, "peft_type is 3; it must be a text"),
        ({"peft_type": None}, "peft_type is null; it must be one of LORA, IA3"),
        ({"peft_type": ""}, "peft_type is empty; it must be one of LORA, IA3"),
        ({"target_modules": ""}, 'target_modules is "", so nothing would train; name modules'),
        ({"target_modules": []}, "target_modules is .., so nothing would train; name modules"),
        ({"target_modules": [""]}, "target_modules is .*, so nothing would train; name modules"),
        (
            {"target_modules": [], "target_parameters": ["experts.up"]},
            "target_parameters .*experts",
        ),
        ({"lora_r": 8}, "PEFT's LORA has no key 'lora_r'; did you mean r.$"),
        ({"peft_type": "x" * 5000}, "peft_type x{80} has no method here"),
        ({"rank_pattern": {"q_proj": 4.5}}, "rank_pattern: q_proj is 4.5; it must be a whole num"),
        ({"modules_to_save": ["("]}, ".modules_to_save.: adapter.train_whole: '.' is not a"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS cannot be run"),
        ({"bias": "all"}, "bias all cannot be honored: biases do not train"),
        ({"init_lora_weights": False}, "init_lora_weights false"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights is pizza; it can be"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*it must be keys with values"),
        ({"target_modules": 3}, "target_modules is 3; it must be names or"),
        ({"lora_alpah": 3}, "PEFT's LORA has no key 'lora_alpah'; did you mean lora_alpha"),
        ({"eva_config": 3, "init_lora_weights": "eva"}, "eva_config is 3; it must be keys with"),
        (
            {"loftq_config": {"loftq_bits": [4]}, "init_lora_weights": "loftq"},
            "loftq_bits is .4.; it can be 4 or 8",
        ),
        ({"use_qalora": True}, "use_qalora true cannot be honored"),
    ],
)
def test_lora_configs_that_cannot_be_honored(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"adapter_config.json:? ?{message}"):
        peft(**keys)


FLAGS_OF_A_RUN = (
    "--train --model my/model --project-name out/it --data-path data --peft --lora-r 8 "
    "--lora-alpha 16 --lora-dropout 0.1 --target-modules q_proj,v_proj --lr 2e-4 --epochs 2 "
    "--batch-size 4 --gradient-accumulation 2 --block-size 512 --warmup-ratio 0.05 "
    "--scheduler cosine --quantization int4 --mixed-precision bf16 --train.steps 5 --dry-run"
)


def autotrain(text: str) -> tuple[lft.Config, Source, list[str]]:
    document, ours = read_flags(text.split())
    config, source = read_foreign(document, AUTOTRAIN)
    return config, source, ours


def test_options_of_autotrain() -> None:
    config, source, ours = autotrain(FLAGS_OF_A_RUN)
    assert ours == ["--train.steps", "5", "--dry-run"]
    assert config.model == lft.ModelConfig(path="my/model", dtype="bfloat16")
    assert config.quant.format == "nf4"
    targets = ("q_proj", "v_proj")
    assert config.adapter == lft.AdapterConfig(rank=8, alpha=16, dropout=0.1, targets=targets)
    assert config.data == lft.DataConfig(train=("data",), max_length=512, validation_rows=0)
    assert config.optim == lft.OptimConfig(
        learning_rate=2e-4, schedule="cosine", warmup_fraction=0.05
    )
    assert (config.train.epochs, config.train.output) == (2, "out/it")
    assert (config.train.batch_size, config.train.microbatches) == (8, 2)
    assert source.batch_per_device
    # Without options of LoRA, and with AutoTrain's defaults.
    config, source, _ = autotrain("--train --model m --data-path d --log wandb --padding left")
    assert config.adapter.train_whole == ("all",)
    assert config.quant.format == "none"
    assert (config.optim.learning_rate, config.train.batch_size) == (3e-5, 8)
    assert config.train.report_to == ("wandb",)
    assert dict(source.remarks())["padding"].startswith("not honored")
    assert autotrain("--model m --data-path d --peft")[0].quant.format == "nf4"
    for template, used in (("chatml", "chatml"), ("tokenizer", None)):
        config = autotrain(f"--model m --data-path d --chat-template {template}")[0]
        assert config.model.chat_template == used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--train --model m", "--data-path is missing"),
        ("--model m --data-path d --lora-r -1", r"autotrain llm .--lora-r.: adapter.rank is -1;"),
        ("--model m --data-path d --scheduler x", "it can be .* .--optim.schedule replaces it"),
        ("--model m --data-path d --lora-r eight", "lora_r is 'eight'; it must be a whole number"),
        ("--model m --data-path d --trainer dpo", "trainer dpo cannot be run: sft only"),
        ("--model m --data-path d --deploy", "--deploy: only --train is run"),
        ("--model m --data-path d --lr", "--lr needs a value"),
        ("--model m --model n", "--model is given twice"),
        ("--model m n", "'n' belongs to no option"),
        ("--train m", "'m' belongs to no option"),
        ("--modle m", "AutoTrain has no key 'modle'; did you mean model"),
        ("--model m --data-path d --push-to-hub", "--push-to-hub needs --username"),
        ("--model m --data-path d --quantization int2", "quantization is int2; it can be int4"),
    ],
)
def test_bad_options_of_autotrain(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autotrain(text)


def test_configs_as_python() -> None:
    Path("adapter_config.json").write_text(json.dumps(LORA))
    keys = {"lora_target": [f"layers/{n}/mlp/up_proj" for n in range(9)], "template": 'q"""w\\'}
    keys |= {"default_system": 'it\'s "so"', "val_size": 0.1, "max_samples": 3, "bf16": True}
    Path("run.yaml").write_text(yaml_of(SHORT | keys))
    Path("own.yaml").write_text("adapter: {rank: 2}\n")
    for name in ("run.yaml", "adapter_config.json", "own.yaml"):
        Path("written.py").write_text(converted(name, "written.py", devices=1))
        assert lft.load_config("written.py") == read_config(name).config
        checks = (["format", "--check"], ["check", "--select", "E,F,I"])
        for check in checks:
            command = [sys.executable, "-m", "ruff", *check, "--line-length", "100", "written.py"]
            assert subprocess.run(command, capture_output=True).returncode == 0, check
    text = converted("run.yaml", "written.py", devices=4)
    assert "batch_size=32" in text
    assert "template: q" in text


def command(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """`lorax-ft` with a command line; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["lorax-ft", *argv])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained: list[tuple[lft.Config, bool]] = []

    def train(config: lft.Config, *, dry_run: bool, command: str) -> None:
        trained.append((config, dry_run))

    monkeypatch.setattr(rate, "train", train)
    monkeypatch.setenv("COLUMNS", "100")
    keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_timeout": 9}
    Path("run.yaml").write_text(yaml_of(SHORT | keys | {"dataset": "nowhere"}))
    # What the command line gives wins, and the dataset of the file is not looked for.
    options = ["--model.path", "other", "--data.train", "a.jsonl", "--train.steps", "5"]
    assert command(monkeypatch, "train", "--config", "run.yaml", *options, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "run.yaml, read as LLaMA-Factory's:" in out
    assert "not honored: it is about PyTorch" in out
    devices = jax.device_count()
    assert f"{2 * devices} = 1 per device × 2 of accumulation × {devices} devices" in out
    [(config, dry_run)] = trained
    assert dry_run
    assert (config.model.path, config.data.train) == ("other", ("a.jsonl",))
    assert (config.train.steps, config.train.batch_size) == (5, 2 * devices)
    assert (config.train.epochs, config.train.output) == (None, "out/it")

    assert command(monkeypatch, "autotrain", "llm", *FLAGS_OF_A_RUN.split()) == 0
    assert trained[1][0].train.steps == 5
    assert trained[1][0].train.batch_size == 8 * devices
    assert command(monkeypatch, "autotrain", "image-classification", "--train") == 2
    assert capsys.readouterr().err.startswith("error: autotrain image-classification: only llm")

    assert command(monkeypatch, "train", "--config", "run.yaml") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run.yaml, line 2: dataset: data/dataset_info.json has no dataset")
    assert err.count("\n") == 1
    write_info(nowhere={"file_name": "a.json"})
    assert command(monkeypatch, "convert-config", "run.yaml", "--output", "run.py") == 0
    assert lft.load_config("run.py") == read_config("run.yaml").config
    assert command(monkeypatch, "convert-config", "run.yaml", "--output", "run.py") == 2
    assert "run.py exists; give another one, or --overwrite" in capsys.readouterr().err
    assert command(monkeypatch, "convert-config", "run.yaml", "--output", "run.txt") == 2


def failing(problem: str) -> Callable[..., None]:
    """A function that raises this problem."""

    def train(*args: object, **options: object) -> None:
        raise ValueError(problem)

    return train


def test_an_option_makes_the_values_of_a_file_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file alone they are refused, and all together they are checked."""
    trained: list[lft.Config] = []
    monkeypatch.setattr(rate, "train", lambda config, **options: trained.append(config))
    Path("run.yaml").write_text(yaml_of(SHORT | {"load_best_model_at_end": True}))
    Path("own.yaml").write_text("adapter:\n  rank: -1\n  targets: []\n")
    files = {"run.yaml": ("train.eval_every", "5"), "own.yaml": ("adapter.targets", "q_proj")}
    for name, (option, value) in files.items():
        options = ["train", "--config", name, "--adapter.rank", "3"]
        assert command(monkeypatch, *options) == 2
        assert capsys.readouterr().err.startswith(f"error: {name}, line ")
        assert command(monkeypatch, *options, f"--{option}", value) == 0
        assert trained[-1].adapter.rank == 3
        # What is wrong for another reason stays so.
        assert command(monkeypatch, *options, f"--{option}", value, "--optim.b2", "2") == 2
        assert "optim.b2 is 2" in capsys.readouterr().err
    assert trained[0].train.load_best
    assert trained[1].adapter.targets == ("q_proj",)


def test_errors_of_a_run_name_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: object, **options: object) -> None:
        raise ValueError("adapter.train_whole: 'lm_head' matches no module")

    monkeypatch.setattr(rate, "train", train)
    Path("run.yaml").write_text(yaml_of(SHORT | {"additional_target": "embed_tokens,lm_head"}))
    options = ["--config", "run.yaml", "--dry-run"]
    assert command(monkeypatch, "train", *options) == 2
    place = "run.yaml, line 4 (additional_target)"
    assert capsys.readouterr().err.startswith(f"error: {place}: adapter.train_whole: 'lm_head'")
    # Errors of functions, which know no options, quote values; others name an option further on.
    keys = {"additional_target": "lm_head", "lora_rank": 99, "model_name_or_path": "no/where"}
    keys |= {"finetuning_type": "lora", "lora_target": "all"}
    Path("run.yaml").write_text(yaml_of(SHORT | keys))
    tokens = {"peft_type": "LORA", "trainable_token_indices": [5, 999]}
    Path("adapter_config.json").write_text(json.dumps(tokens))
    cases = {
        "no folder at no/where": "run.yaml, line 1 (model_name_or_path)",
        "no file data/sums.json": "run.yaml, line 2 (dataset)",
        "out/it is not empty": "run.yaml, line 3 (output_dir)",
        "q_proj is in adapter.targets": "run.yaml, line 7 (lora_target)",
        "layers/q_proj: rank 99 is too large; lower adapter.rank": "run.yaml, line 5 (lora_rank)",
        "data.max_length is 2048, and 512 fit": "run.yaml (cutoff_len is absent)",
        "token 999 is not one of 768": "adapter_config.json (trainable_token_indices)",
        "data/sums.jsonl: no/wherever, out/it/a, token 9999": "",
        "nothing has rank; give --adapter.rank": "",
    }
    for problem, place in cases.items():
        named = place.partition(" (")[0].partition(",")[0] or "run.yaml"
        monkeypatch.setattr(rate, "train", failing(problem))
        assert command(monkeypatch, "train", "--config", named, "--dry-run") == 2
        expected = f"error: {place}: {problem}\n" if place else f"error: {problem}\n"
        assert capsys.readouterr().err == expected
    # Of the file and the options together, too.
    tokens = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5]}
    Path("adapter_config.json").write_text(json.dumps(tokens))
    options = ["--config", "adapter_config.json", "--prompt.kind", "prompt"]
    assert command(monkeypatch, "train", *options) == 2
    place = "adapter_config.json (peft_type)"
    assert capsys.readouterr().err.startswith(f"error: {place}: trainable tokens and a soft prom")
    monkeypatch.setattr(rate, "train", train)
    # An option of the command line is no key of the file.
    options = ["--config", "run.yaml", "--dry-run", "--adapter.train_whole", "lm_head"]
    assert command(monkeypatch, "train", *options) == 2
    assert capsys.readouterr().err.startswith("error: adapter.train_whole: 'lm_head'")


def test_the_documentation_has_all_keys() -> None:
    text = (ROOT / "docs" / "OTHER_CONFIGS.md").read_text()
    for table in (llama_factory.TABLE, *TABLES.values(), TABLE):
        for name, rule in table.items():
            shown = f"--{name.replace('_', '-')}" if table is TABLE else name
            rows = [line for line in text.splitlines() if f"`{shown}`" in line]
            assert rows, f"docs/OTHER_CONFIGS.md has no {shown}"
            assert any(all(f"`{option}`" in row for option in rule.options) for row in rows), name
    assert set(FLAGS) <= {*TABLE}


# What lorax_ft does not have, in files of the examples.
REFUSED = (
    *("use_adam_mini", "use_apollo", "use_badam", "use_galore", "use_muon", "use_dft_loss"),
    *("use_asft_loss", "use_eaft_loss"),
    *("freeze\n", "mixture_of_depths", "use_kt", "model_parallel_size"),
)


@pytest.mark.skipif(not MIRROR, reason="LORAX_FT_LLAMA_FACTORY is not set")
def test_examples_of_llama_factory() -> None:
    git = ["git", f"--git-dir={MIRROR}"]
    tree = [*git, "ls-tree", "-r", "HEAD", "--name-only", "examples"]
    names = subprocess.run(tree, capture_output=True, text=True, check=True).stdout.split()
    fine = 0
    for name in names:
        if not name.endswith("sft.yaml") or "/v1/" in name:
            continue
        shown = subprocess.run([*git, "show", f"HEAD:{name}"], capture_output=True, text=True)
        text = shown.stdout
        values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        if any(word in text for word in REFUSED):
            with pytest.raises(ValueError, match=r", line \d+: .*(cannot be|has no key|it can be)"):
                read(text, overridden={"model.path", "data.train"})
            continue
        config, _ = read(text, overridden={"model.path", "data.train"})
        fine += 1
        assert config.optim.learning_rate == float(values.get("learning_rate", 5e-5)), name
        rows = int(values.get("per_device_train_batch_size", 8))
        assert config.train.microbatches == int(
            values.get("gradient_accumulation_steps", "1").split()[0]
        )
        assert config.train.batch_size == rows * config.train.microbatches, name
        assert config.adapter.rank == int(values.get("lora_rank", 8)), name
        assert config.quant.format == ("nf4" if "quantization_bit: 4" in text else "none"), name
    assert fine >= 10


@pytest.mark.skipif(not MIRROR, reason="LORAX_FT_LLAMA_FACTORY is not set")
def test_every_key_of_llama_factory_is_known() -> None:
    for name in ("data_args", "finetuning_args", "model_args", "training_args", "generating_args"):
        file = f"HEAD:src/llamafactory/hparams/{name}.py"
        shown = subprocess.run(
            ["git", f"--git-dir={MIRROR}", "show", file], capture_output=True, text=True, check=True
        )
        for node in ast.walk(ast.parse(shown.stdout)):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            # Fields that are derived are no keys.
            value = ast.unparse(node.value) if node.value else ""
            if value.startswith("field(") and "init=False" not in value:
                assert LLAMA_FACTORY.knows(node.target.id), node.target.id
