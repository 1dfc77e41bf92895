"""The keys of the other trainers' own classes are in our tables."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig
from transformers import Seq2SeqTrainingArguments

from lorax_ft.config.foreign.source import LLAMA_FACTORY, PEFT


def test_every_key_of_a_lora_config_is_known() -> None:
    for key in LoraConfig(target_modules=["q_proj"]).to_dict():
        assert PEFT.knows(key), key


def test_every_training_argument_of_transformers_is_known() -> None:
    # LLaMA-Factory's arguments are transformers' and its own.
    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        assert LLAMA_FACTORY.knows(field.name), field.name
