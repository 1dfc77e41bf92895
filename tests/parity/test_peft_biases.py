"""Biases that PEFT trains beside LoRA (bias="lora_only" or "all"). Needs torch and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import our_logits, qwen2_with_biases, their_logits, train_a_little  # noqa: E402

from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.interop.save import save_model  # noqa: E402

# torch, transformers and PEFT warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")
CASES: dict[str, dict[str, Any]] = {
    "lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "lora_only_dora": {"bias": "lora_only", "target_modules": ["v_proj"], "use_dora": True},
    "all": {"bias": "all", "target_modules": ["q_proj", "up_proj"]},
    "some_layers": {
        "bias": "all",
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen2_with_biases(tmp_path_factory.mktemp("checkpoint"), layers=2)


@pytest.mark.parametrize("name", CASES)
def test_trained_biases(checkpoint: Path, tmp_path: Path, name: str) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **CASES[name]))
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)

    model = load_model(checkpoint)
    params = load_peft(tmp_path / "theirs", model)
    np.testing.assert_allclose(our_logits(model, params), expected, atol=1e-4, rtol=1e-4)

    save_peft(tmp_path / "ours", params, model)
    again = load_peft(tmp_path / "ours", model)
    np.testing.assert_allclose(our_logits(model, again), expected, atol=1e-4, rtol=1e-4)
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert written["bias"] == CASES[name]["bias"]
    fresh = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    np.testing.assert_allclose(their_logits(loaded), expected, atol=1e-4, rtol=1e-4)

    save_model(tmp_path / "merged", params, model)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(their_logits(merged), expected, atol=1e-4, rtol=1e-4)
