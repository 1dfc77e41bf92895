"""Trainable tokens keep their logits from here to PEFT and back. Needs torch and peft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import random_factors, their_logits, train_a_little  # noqa: E402

import lorax_ft as lft  # noqa: E402
from lorax_ft.config.model import ASSETS  # noqa: E402
from lorax_ft.tree import Tree  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = ("####", "<end>")
KINDS = ("beside", "alone")
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "gemma2": transformers.Gemma2Config,
    "qwen3": transformers.Qwen3Config,
}
TEXT = "what is 3 #### and 4 #### <end> so"


def checkpoint(folder: Path, family: str, *, tied: bool) -> Path:
    """A model of the embedded tokenizer, whose vocabulary is full."""
    torch.manual_seed(0)
    count = len(transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny"))
    config = CONFIGS[family](
        vocab_size=count,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny" / name, folder / name)
    return folder


def theirs_of(folder: Path, tokens: int) -> Any:
    """transformers' model with so many rows in its tables."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.resize_token_embeddings(tokens)
    return model


def ours_of(model: Any, params: Tree, ids: np.ndarray) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, jnp.asarray(ids)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_ours(kind: str, family: str, tied: bool, tmp_path: Path) -> None:
    """A folder with new tokens, as a user of PEFT loads it: by its tokenizer's size."""
    folder = checkpoint(tmp_path / "model", family, tied=tied)
    model = lft.add_tokens(lft.load_model(folder), NEW)
    ids = model.tokenizer.convert_tokens_to_ids([*NEW, model.tokenizer.convert_ids_to_tokens(9)])
    params = lft.add_trainable_tokens(model.params, ids, model)
    if kind == "beside":
        lora = lft.AdapterConfig(rank=3)
        params = lft.add_adapters(params, lora, layout=model.layout, key=jax.random.key(0))
    params = random_factors(params)
    lft.save_peft(tmp_path / "adapter", params, model)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    text = np.asarray([tokenizer(TEXT)["input_ids"]])
    assert (text >= len(tokenizer) - len(NEW)).sum() == 3
    base = theirs_of(folder, len(tokenizer))
    plain = their_logits(base, text)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = their_logits(tuned, text)
    assert np.abs(expected - plain).max() > 0.05
    count = len(tokenizer)
    found = ours_of(model, params, text)[..., :count]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)

    # The merged checkpoint, without PEFT.
    lft.save_model(tmp_path / "merged", params, model)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT) == tokenizer(TEXT)
    np.testing.assert_allclose(
        their_logits(merged, text)[..., :count], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("resized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_theirs(kind: str, resized: bool, tied: bool, tmp_path: Path) -> None:
    """Also the tables that PEFT saves beside the rows where the vocabulary has grown."""
    folder = checkpoint(tmp_path / "model", "llama", tied=tied)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    indices = [9, 5]
    if resized:
        tokenizer.add_tokens(list(NEW))
        indices = tokenizer.convert_tokens_to_ids([NEW[1], NEW[0]])
    torch.manual_seed(2)
    base = theirs_of(folder, len(tokenizer))
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    if kind == "alone":
        config = peft.TrainableTokensConfig(token_indices=indices, target_modules=names)
    else:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            target_modules=["q_proj", "up_proj"],
            trainable_token_indices=dict.fromkeys(names, indices),
        )
    tuned = peft.get_peft_model(base, config)
    train_a_little(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    text = np.asarray([tokenizer(TEXT)["input_ids"]])
    expected = their_logits(tuned, text)
    model = lft.with_tokens_of(tmp_path / "adapter", lft.load_model(folder))
    params = lft.load_peft(tmp_path / "adapter", model)
    found = ours_of(model, params, text)[..., : len(tokenizer)]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
