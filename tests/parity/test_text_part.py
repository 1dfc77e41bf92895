"""Checkpoints with a vision tower: their text part, and adapters for it. Needs torch and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import our_logits, their_logits  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.interop.save import save_model  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import LoadedModel  # noqa: E402
from lorax_ft.tree import Tree, from_modules, modules  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 24},
        "vision_config": VISION,
        "image_token_index": 58,
        "boi_token_index": 59,
        "eoi_token_index": 60,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": TEXT
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": VISION
        | {
            "head_dim": 8,
            "num_key_value_heads": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 32,
        },
        "image_token_id": 58,
        "boi_token_id": 59,
        "eoi_token_id": 60,
    },
    "qwen3_5": {
        "text_config": TEXT
        | {
            # With 0.2, transformers in float32 is off by 2.5e-4 of itself in float64.
            "initializer_range": 0.1,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    },
}


def saved(folder: Path, name: str) -> torch.nn.Module:
    """A random checkpoint with its vision tower, as the class that people save."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**WHOLES[name])
    whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for parameter, weight in whole.named_parameters():
        if "norm" in parameter:
            weight.data.normal_(0.5, 0.3)
        if parameter.endswith("A_log"):
            # Decays as of trained models. With random ones, transformers is itself off by 1e-4.
            weight.data.normal_(-2, 0.5)
    whole.save_pretrained(folder)
    return whole


def loaded(folder: Path, name: str) -> LoadedModel:
    with pytest.warns(UserWarning, match=rf"is a {name} checkpoint: its text part \({name}_text\)"):
        return load_model(folder)


def with_random_adapters(model: LoadedModel) -> Tree:
    config = AdapterConfig(rank=3, rank_pattern=("layers/1/.*=2",), layers=(1, 3))
    rng = np.random.default_rng(1)
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    layers = modules(params)
    for layer in layers.values():
        for factor in ("lora_a", "lora_b"):
            if factor in layer:
                used = (layer["lora_a"] != 0).any(-2)
                used = used[..., None, :] if factor == "lora_a" else used[..., None]
                random = rng.normal(0, 0.1, layer[factor].shape)
                layer[factor] = jnp.where(used, jnp.asarray(random, jnp.float32), 0)
    return from_modules(layers)


@pytest.mark.parametrize("name", WHOLES)
def test_text_part(tmp_path: Path, name: str) -> None:
    whole = saved(tmp_path / "whole", name)
    expected = their_logits(whole)
    model = loaded(tmp_path / "whole", name)
    assert model.text_part_of == name
    np.testing.assert_allclose(our_logits(model, model.params), expected, atol=1e-4, rtol=1e-4)

    save_model(tmp_path / "text", model.params, model)
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert written["model_type"] == f"{name}_text"
    assert "text_part_of" not in written
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert [type(text).__name__] == written["architectures"]
    np.testing.assert_allclose(their_logits(text), expected, atol=1e-5, rtol=1e-5)
    assert load_model(tmp_path / "text").text_part_of is None


@pytest.mark.parametrize("name", WHOLES)
def test_adapter_of_a_text_part(tmp_path: Path, name: str) -> None:
    whole = saved(tmp_path / "whole", name)
    plain = their_logits(whole)
    model = loaded(tmp_path / "whole", name)
    params = with_random_adapters(model)
    save_peft(tmp_path / "adapter", params, model)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    adapted = [key for key, _ in theirs.named_parameters() if "lora_A" in key]
    assert not [key for key in adapted if "vis" in key]
    expected = their_logits(theirs)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(our_logits(model, params), expected, atol=1e-4, rtol=1e-4)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(our_logits(model, again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WHOLES)
def test_adapter_that_peft_made_of_the_whole(tmp_path: Path, name: str) -> None:
    whole = saved(tmp_path / "whole", name)
    model = loaded(tmp_path / "whole", name)
    targets = r".*language_model.*\.(q_proj|down_proj)"
    lora = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(whole, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    params = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(
        our_logits(model, params), their_logits(adapted), atol=1e-4, rtol=1e-4
    )


def test_other_wholes_are_refused_by_their_own_name(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has the architecture 'qwen2_vl'; supported"):
        load_model(tmp_path)
