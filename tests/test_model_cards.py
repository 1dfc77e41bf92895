"""What lies beside a saved adapter or model: a tokenizer, and a model card with the run's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from checkpoint_cases import random_model
from huggingface_hub import ModelCard
from run_cases import SHORT, Main, config

import lorax_ft as lft
from lorax_ft.config import AdapterConfig
from lorax_ft.interop.load import load_model
from lorax_ft.interop.model_card import (
    CARD,
    adapter_card,
    hub_id,
    is_generated,
    training_notes_of,
)
from lorax_ft.interop.tokenizer import import_transformers, load_tokenizer
from lorax_ft.lowrank.adapters import add_adapters

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def lora(base: str = "owner/base", **fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "base_model_name_or_path": base, **fields}


def test_the_metadata_of_an_adapter() -> None:
    card = ModelCard(adapter_card(lora(use_dora=True), init="pissa", training_notes="- **A:** b"))
    assert card.data.to_dict() == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:owner/base", "lora", "dora", "pissa", "lorax_ft"],
    }
    assert "# LoRA adapter of base\n" in card.text
    assert "[owner/base](https://huggingface.co/owner/base)" in card.text
    assert "## Training\n\n- **A:** b\n" in card.text


def test_the_metadata_of_an_activated_lora() -> None:
    card = ModelCard(adapter_card(lora(alora_invocation_tokens=[7, 8])))
    assert card.data.tags[1:] == ["lora", "alora", "lorax_ft"]
    assert "# aLoRA adapter of base\n" in card.text
    assert "acts from the tokens [7, 8] on" in card.text
    assert "PeftModel.from_pretrained(model, adapter)\n" in card.text


GROWS = "model.resize_token_embeddings("


@pytest.mark.parametrize(
    ("fields", "rows", "said"),
    [
        ({"trainable_token_indices": {"embed_tokens": [9]}}, None, f"{GROWS}len(tokenizer))"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [9]}, None, f"{GROWS}len(tokenizer))"),
        # A table that was trained in full has its own number of rows.
        ({"modules_to_save": ["embed_tokens"]}, 128, f"{GROWS}128)"),
        (
            {"peft_type": "LORAX_FT_BOTTLENECK", "trainable_token_indices": {"embed_tokens": [9]}},
            None,
            "model = lft.with_tokens_of(adapter, model)\nparams = lft.load_peft(adapter, model)",
        ),
        ({}, None, None),
    ],
)
def test_a_card_grows_the_tables_for_new_tokens(
    fields: dict[str, Any], rows: int | None, said: str | None
) -> None:
    card = adapter_card(lora(**fields), table_rows=rows)
    if said is None:
        assert GROWS not in card
        return
    assert said in card
    # Before the adapter is loaded, whose rows would have no place otherwise.
    loaded = "lft.load_peft(" if "lft" in said else "PeftModel.from_pretrained("
    assert card.index(said.partition("\n")[0]) < card.index(loaded)
    assert ("# Trainable tokens adapter of base" in card) == ("token_indices" in fields)


@pytest.mark.parametrize(
    ("fields", "in_peft"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"alora_invocation_tokens": [7]}, False),
        ({"trainable_token_indices": {"embed_tokens": [9]}}, False),
        ({"peft_type": "LORAX_FT_BOTTLENECK"}, False),
    ],
)
def test_a_card_loads_a_soft_prompt_beside_an_adapter(
    fields: dict[str, Any], in_peft: bool
) -> None:
    """PEFT holds one of the two, so the adapter is merged first, where PEFT merges it rightly."""
    card = adapter_card(lora(**fields), beside_prompt=True)
    assert "A soft prompt, in the folder soft_prompt, was trained together with" in card
    assert ('from_pretrained(model, adapter, subfolder="soft_prompt")' in card) is in_peft
    assert ("lft.load_peft(adapter, model)" in card) is not in_peft
    library = "peft" if in_peft else "lorax_ft"
    assert ModelCard(card).data.library_name == library
    assert "soft prompt" not in adapter_card(lora(**fields))


def test_a_base_on_this_machine_is_no_metadata(tmp_path: Path) -> None:
    """The hub refuses a card whose base_model is a path."""
    card = ModelCard(adapter_card(lora(str(tmp_path))))
    assert card.data.base_model is None
    assert card.data.tags == ["lora", "lorax_ft"]
    assert f"`{tmp_path}`" in card.text


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/mine").mkdir(parents=True)
    local = ["out/mine", "/a/b", "./a", "a", "a/b/c", "a/b.gguf", "", "../b"]
    assert [hub_id(source) for source in local] == [None] * len(local)
    assert hub_id("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_card_that_a_person_wrote_is_kept(tmp_path: Path, kind: str) -> None:
    base = random_model()
    params = add_adapters(
        base.params, AdapterConfig(rank=2), layout=base.layout, key=jax.random.key(0)
    )
    save = lft.save_peft if kind == "adapter" else lft.save_model
    file = tmp_path / "saved" / CARD
    for notes in ("first", "second"):
        save(tmp_path / "saved", params, base, training_notes=notes)
        assert is_generated(file.read_bytes())
        assert training_notes_of(tmp_path / "saved") == notes
    for text in ("mine", file.read_text().replace("second", "2nd"), file.read_text() + "PS"):
        file.write_text(text)
        save(tmp_path / "saved", params, base, training_notes="third")
        assert file.read_text() == text
        assert training_notes_of(tmp_path / "saved") == ""
    assert training_notes_of(tmp_path) == training_notes_of(None) == ""


def test_a_tokenizer_whose_class_only_the_model_names(tmp_path: Path) -> None:
    """AutoTokenizer finds the class of such a folder in config.json, which an adapter lacks."""
    model = load_model(lft.ModelConfig().path)
    lft.save_model(tmp_path / "base", model.params, model)
    file = tmp_path / "base/tokenizer_config.json"
    fields = json.loads(file.read_text())
    del fields["tokenizer_class"]
    file.write_text(json.dumps(fields))
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["model_type"] == "llama"
    base = load_model(str(tmp_path / "base"))
    params = add_adapters(
        base.params, AdapterConfig(rank=2), layout=base.layout, key=jax.random.key(0)
    )
    lft.save_peft(tmp_path / "adapter", params, base)
    saved = load_tokenizer(tmp_path / "adapter")
    assert saved("3 + 4 = ?").input_ids == base.tokenizer("3 + 4 = ?").input_ids
    assert saved.chat_template == base.tokenizer.chat_template
    assert "tokenizer_class" in json.loads((tmp_path / "adapter/tokenizer_config.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_describes_itself(main: Main, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--train.steps", 2, "--adapter.rank", 3, "--train.output", out]
    assert main(*config("pissa"), *SHORT, *options) == 0
    card = ModelCard((out / "adapter" / CARD).read_text())
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"lora", "pissa"} < set(card.data.tags)
    text = card.text
    assert "- **Method:** lora, rank 3, " in text
    assert "init pissa" in text
    assert "- **Steps:** 2, 8 rows each" in text
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    before, after = lines[0]["validation_loss"], lines[-1]["validation_loss"]
    assert f"- **Validation loss:** {before:.4f} → {after:.4f}" in text
    assert "- **Exact match:** " in text
    assert f"jax {jax.__version__}" in text
    assert f"python train.py --config {config('pissa')[1]}" in text
    assert f"--train.output {out}\n" in text

    tokenizer = import_transformers().AutoTokenizer.from_pretrained(out / "adapter")
    base = load_tokenizer(lft.ModelConfig().path)
    ids = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert ids == base.apply_chat_template(CONVERSATION, return_dict=False)
