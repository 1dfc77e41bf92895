"""Activated LoRA keeps its logits from here to PEFT and back. Needs torch and peft."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import random_factors, train_a_little  # noqa: E402

import lorax_ft as lft  # noqa: E402
from lorax_ft.lowrank.activation import with_invocation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CALL = [7, 8]
TEXTS = np.array([[1, 7, 8, 3, 7, 8, 4, 5], [1, 2, 3, 4, 5, 6, 7, 9], [7, 8, 3, 1, 7, 7, 2, 8]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def theirs_of(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.as_tensor(TEXTS)).logits.numpy()


def test_peft_loads_ours(checkpoint: Path, tmp_path: Path) -> None:
    model = lft.load_model(checkpoint)
    config = lft.AdapterConfig(rank=3)
    added = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    params = with_invocation(random_factors(added), CALL)
    lft.save_peft(tmp_path / "adapter", params, model)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    plain = theirs_of(base)
    expected = theirs_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert np.abs(expected[0, 4:] - plain[0, 4:]).max() > 0.1
    np.testing.assert_array_equal(expected[1], plain[1])
    for tree in (params, lft.load_peft(tmp_path / "adapter", model)):
        ours = model.apply({"params": tree}, jnp.asarray(TEXTS))
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_we_load_theirs(checkpoint: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=CALL,
    )
    tuned = peft.get_peft_model(base, config)
    train_a_little(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = theirs_of(tuned)
    model = lft.load_model(checkpoint)
    params = lft.load_peft(tmp_path / "adapter", model)
    ours = model.apply({"params": params}, jnp.asarray(TEXTS))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
