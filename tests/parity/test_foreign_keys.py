"""The keys of the other trainers' own classes are in our tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peft import LoraConfig
from transformers import Seq2SeqTrainingArguments

import lorax_ft as lft
from lorax_ft.config.foreign.peft_types import TABLES
from lorax_ft.config.foreign.source import LLAMA_FACTORY


def test_every_key_of_a_lora_config_is_known() -> None:
    for key in LoraConfig(target_modules=["q_proj"]).to_dict():
        assert key in TABLES["LORA"], key


def test_a_saved_lora_config_is_an_adapter_section(tmp_path: Path) -> None:
    theirs = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj"],
        rank_pattern={"up_proj": 2},
        use_rslora=True,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    theirs.save_pretrained(tmp_path)
    config = lft.load_config(tmp_path / "adapter_config.json")
    assert config.adapter == lft.AdapterConfig(
        rank=4,
        alpha=12,
        targets=("q_proj",),
        rank_pattern=("up_proj=2",),
        scaling="rank_stabilized",
        init="gaussian",
    )


def test_every_training_argument_of_transformers_is_known() -> None:
    # LLaMA-Factory's arguments are transformers' and its own.
    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        assert LLAMA_FACTORY.knows(field.name), field.name
