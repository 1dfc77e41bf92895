"""PEFT and transformers on a saved adapter's folder: the adapter, its tokenizer and its card."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax_ft as lft
from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.adapters import add_adapters

# PEFT uses what transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIGS = {
    "lora": AdapterConfig(rank=2),
    "dora": AdapterConfig(rank=2, dora=True),
    "ia3": AdapterConfig(method="ia3"),
    "miss": AdapterConfig(method="miss", rank=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_folder_of_an_adapter(tmp_path: Path, name: str) -> None:
    model = lft.load_model(lft.ModelConfig().path)
    config = CONFIGS[name]
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    lft.save_peft(tmp_path, params, model, config=config, training_notes="- **Steps:** 3")
    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model.source), tmp_path
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert tokenizer("3 + 4").input_ids == model.tokenizer("3 + 4").input_ids
    assert name in ModelCard((tmp_path / "README.md").read_text()).data.tags

    # PEFT adds to a card. What it added is a change, and stays when we save again.
    peft_model.save_pretrained(tmp_path)
    lft.save_peft(tmp_path, params, model, config=config, training_notes="- **Steps:** 4")
    card = ModelCard((tmp_path / "README.md").read_text())
    assert "- PEFT " in card.text
    assert "- **Steps:** 3" in card.text
    assert card.data.pipeline_tag == "text-generation"
