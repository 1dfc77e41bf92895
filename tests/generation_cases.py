"""Adapters by name, and a word-level tokenizer for the zoo's decoder, for generation tests."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from lorax_ft.config import AdapterConfig

CASES = {
    "base": None,
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(rank=4, dora=True, targets=("all-linear", "lm_head", "embed_tokens")),
}
WORDS = [f"w{i}" for i in range(90)]
TEMPLATE = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|> {% endfor %}<|im_start|>"


def make_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def asked(*words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(words)}]
