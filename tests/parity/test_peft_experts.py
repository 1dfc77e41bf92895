"""PEFT computes our adapters on sparse models, whose experts it fuses. Needs torch and peft.

Our own round trip cannot see what PEFT makes of a folder: each option is loaded into the real PEFT.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import our_logits, sparse_checkpoint, their_logits  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.interop.vllm import save_for_vllm  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import LoadedModel  # noqa: E402
from lorax_ft.tree import Tree, from_modules, modules  # noqa: E402

# torch, transformers and PEFT warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")
ALL = ("all-linear",)
EXPERTS = ("experts/gate_proj", "experts/up_proj", "experts/down_proj")
ROUTER = ("mlp/gate",)
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 9},
    "rslora": {"scaling": "rank_stabilized"},
    "dropout": {"dropout": 0.1},
    "freeze": {"freeze": ("lora_a",)},
    "alpha_of_gate": {"alpha_pattern": ("gate_proj=16",)},
    "alpha_of_down": {"alpha_pattern": ("down_proj=16",)},
    "alpha_of_a_layer": {"alpha_pattern": ("layers/1/mlp/.*=16",)},
    "alpha_of_attention": {"alpha_pattern": (".*self_attn/.*=16",)},
    "rank_of_gate": {"rank_pattern": ("gate_proj=2",)},
    "rank_of_down": {"rank_pattern": ("down_proj=5",)},
    "rank_of_a_layer": {"rank_pattern": ("layers/1/mlp/.*=2",)},
    "rank_of_attention": {"rank_pattern": (".*self_attn/.*=7",)},
    "ranks_and_alphas": {
        "scaling": "rank_stabilized",
        "rank_pattern": ("gate_proj=2", "layers/0/mlp/.*=5", "q_proj=3"),
        "alpha_pattern": ("up_proj=3", "layers/1/.*=8"),
    },
    "experts_alone": {"targets": EXPERTS},
    "gate_alone": {"targets": EXPERTS[:1]},
    "up_alone": {"targets": EXPERTS[1:2]},
    "gate_and_up": {"targets": EXPERTS[:2]},
    "gate_and_down": {"targets": (EXPERTS[0], EXPERTS[2])},
    "down_alone": {"targets": EXPERTS[2:]},
    "without_up": {"exclude": ("up_proj",)},
    "one_layer": {"layers": (1,)},
    "one_layer_of_down": {"targets": EXPERTS[2:], "layers": (0,)},
    "router": {"targets": (*ALL, *ROUTER)},
    "router_alone": {"targets": ROUTER},
    "router_of_a_layer": {"targets": ROUTER, "layers": (1,)},
    "router_of_another_rank": {
        "targets": (*ALL, *ROUTER),
        "rank_pattern": ("mlp/gate=2",),
        "alpha_pattern": ("mlp/gate=16",),
    },
    "embeddings": {"targets": (*ALL, "embed_tokens")},
    "head": {"targets": (*ALL, "lm_head"), "rank_pattern": ("lm_head=5",)},
    "pissa": {"init": "pissa", "rank_pattern": ("gate_proj=2",)},
    "pissa_keep_base": {"init": "pissa", "keep_base": True},
    "olora": {"init": "olora", "alpha_pattern": ("up_proj=3",)},
    "milora": {"init": "milora"},
    "orthogonal": {"init": "orthogonal"},
    "attention": {"exclude": (".*experts.*",)},
    "attention_dora": {"dora": True, "exclude": (".*experts.*",)},
    "attention_ia3": {"method": "ia3", "targets": ("k_proj", "v_proj")},
    "attention_miss": {"method": "miss", "exclude": (".*experts.*",)},
    "whole_norm": {"train_whole": ("norm",)},
    "whole_head": {"train_whole": ("lm_head",)},
    "whole_embeddings": {"train_whole": ("embed_tokens",)},
}
VECTORS = ("magnitude", "ia3_in", "ia3_out", "miss_block")
REFUSED = {
    "DoRA": {"dora": True},
    "IA3": {"method": "ia3"},
    "MiSS": {"method": "miss"},
    "full training": {"targets": ("q_proj",), "train_whole": ("experts/up_proj",)},
    "DoRA of": {"dora": True, "targets": ROUTER, "rank": 2},
    "full training of": {"targets": ("q_proj",), "train_whole": ROUTER},
}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("sparse"), request.param)


@pytest.fixture(scope="module")
def model(sparse: Path) -> LoadedModel:
    return load_model(sparse)


def trained(model: LoadedModel, config: AdapterConfig) -> Tree:
    """The parameters with random factors, vectors and fully trained weights."""
    rng = np.random.default_rng(1)
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    layers = modules(params)
    for path, layer in layers.items():
        for name in layer:
            if name in ("lora_a", "lora_b"):
                # Columns that are padding stay so.
                used = (layer["lora_a"] != 0).any(-2) | (layer["lora_b"] != 0).any(-1)
                used = used[..., None, :] if name == "lora_a" else used[..., None]
                noise = rng.normal(0, 0.2, layer[name].shape) * used
            elif path in config.train_whole or name in VECTORS:
                noise = rng.normal(0, 0.2, layer[name].shape)
            else:
                continue
            layer[name] = layer[name] + jnp.asarray(noise, jnp.float32)
    if "lm_head" in config.train_whole:
        assert "lm_head" in layers
    return from_modules(layers)


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_computes_what_we_do(
    sparse: Path, model: LoadedModel, tmp_path: Path, name: str
) -> None:
    fields = {"targets": ALL} | OPTIONS[name]
    if fields.get("method") != "ia3":
        fields |= {"rank": 4}
    config = AdapterConfig(**fields)
    params = trained(model, config)
    expected = our_logits(model, params)
    save_peft(tmp_path / "adapter", params, model, config=config)
    base = transformers.AutoModelForCausalLM.from_pretrained(sparse)
    plain = their_logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(their_logits(theirs), expected, atol=1e-4, rtol=1e-4)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(our_logits(model, again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", REFUSED)
def test_what_peft_has_not_for_experts(model: LoadedModel, tmp_path: Path, what: str) -> None:
    config = AdapterConfig(**{"targets": ALL} | REFUSED[what])
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    said = f"layers/.*mlp/.*: PEFT has no {what}.*experts and routers, only LoRA"
    with pytest.raises(ValueError, match=said) as error:
        save_peft(tmp_path / "adapter", params, model, config=config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["ranks_and_alphas", "gate_alone", "router_of_another_rank"])
def test_vllm_gets_one_rank_and_one_alpha(model: LoadedModel, tmp_path: Path, name: str) -> None:
    params = trained(model, AdapterConfig(**{"targets": ALL, "rank": 4} | OPTIONS[name]))
    assert save_for_vllm(tmp_path / "adapter", params, model) == "adapter"
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    again = load_peft(tmp_path / "adapter", model)
    expected = our_logits(model, params)
    np.testing.assert_allclose(our_logits(model, again), expected, atol=1e-4, rtol=1e-4)
