"""Adapters survive a round trip through PEFT folders; without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import HF_CONFIG, assert_trees_equal, logits, randomized, saved_model
from safetensors.numpy import load_file, save_file

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.tree import flatten, modules, unflatten

ADAPTERS = {
    "lora": AdapterConfig(rank=3, alpha=7),
    "rslora": AdapterConfig(rank=3, scaling="rank_stabilized"),
    "dora": AdapterConfig(rank=2, dora=True),
    "layers": AdapterConfig(rank=2, layers=(0, 2), targets=("q_proj", "down_proj")),
    "dora_layers": AdapterConfig(rank=2, layers=(1,), targets=("q_proj",), dora=True),
    "patterns": AdapterConfig(
        rank=4, rank_pattern=("layers/1/.*up_proj=2", "q_proj=3"), alpha_pattern=("k_proj=5",)
    ),
    "embeddings": AdapterConfig(rank=2, targets=("all-linear", "embed_tokens", "lm_head")),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_come_back_bitwise(tmp_path: Path, name: str, tied: bool) -> None:
    model = saved_model(tmp_path / "model", tied=tied)
    params = randomized(
        add_adapters(model.params, ADAPTERS[name], layout=model.layout, key=jax.random.key(0))
    )
    save_peft(tmp_path / "adapter", params, model)
    again = load_peft(tmp_path / "adapter", model)
    assert_trees_equal(again, params)
    assert again["norm"]["scale"] is model.params["norm"]["scale"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_a_start_becomes_twice_the_rank_on_the_original_base(
    tmp_path: Path, dora: bool, keep_base: bool
) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(
        rank=3, alpha=6, init="pissa", dora=dora, keep_base=keep_base, rank_pattern=("q_proj=2",)
    )
    params = randomized(
        add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    )
    save_peft(tmp_path / "adapter", params, model)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (6, 12, {"q_proj": 4})
    again = load_peft(tmp_path / "adapter", model)
    for path, layer in modules(again).items():
        if "lora_a" in layer:
            np.testing.assert_array_equal(layer["kernel"], modules(model.params)[path]["kernel"])
    expected = logits(model.config, params)
    assert jnp.abs(expected - logits(model.config, model.params)).max() > 0.1
    np.testing.assert_allclose(logits(model.config, again), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_taken_apart(tmp_path: Path, kind: str) -> None:
    """PEFT's `target_parameters`: A `[E·R, in]`, B `[out, R·E]`.

    gate_up comes innermost, and gate and up share one A.
    """
    sizes = {
        "num_local_experts": 4,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
    }
    hf_config = HF_CONFIG | sizes | {"model_type": kind}
    config = decoder_config(hf_config, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config))
    rng = np.random.default_rng(0)
    factors = {}
    for i in range(3):
        for name, inside, rank, (rows, columns) in (
            ("gate_up", ".base_layer", 2, (16, 48)),
            ("down", "", 3, (24, 16)),
        ):
            a, b = (
                rng.normal(size=shape).astype(np.float32)
                for shape in ((4, rank, rows), (4, columns, rank))
            )
            factors[name, i] = a, b
            key = f"base_model.model.model.layers.{i}.mlp.experts{inside}"
            factors[f"{key}.lora_A.weight"] = a.reshape(-1, rows)
            factors[f"{key}.lora_B.weight"] = np.ascontiguousarray(
                b.transpose(1, 2, 0).reshape(columns, -1)
            )
    save_file(
        {key: value for key, value in factors.items() if isinstance(key, str)},
        tmp_path / "adapter_model.safetensors",
    )
    said = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_parameters": [f"experts.{n}_proj" for n in ("gate_up", "down")],
    }
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(said | {"rank_pattern": {"experts.down_proj": 3}})
    )
    experts = load_peft(tmp_path, LoadedModel(config=config, params=params, hf_config=hf_config))[
        "layers"
    ]["mlp"]["experts"]
    for i in range(3):
        for name, part in (("gate", slice(24)), ("up", slice(24, None)), ("down", slice(None))):
            a, b = factors["down" if name == "down" else "gate_up", i]
            layer = experts[f"{name}_proj"]
            np.testing.assert_array_equal(layer["lora_a"][i], a.swapaxes(1, 2))
            np.testing.assert_array_equal(layer["lora_b"][i], b[:, part].swapaxes(1, 2))
            np.testing.assert_array_equal(layer["lora_scale"][i], 2 if name == "down" else 3)


def test_adapter_config(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = ADAPTERS["patterns"]
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model, config=dataclasses.replace(config, dropout=0.1))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text()) == {
        "alpha_pattern": {"k_proj": 5},
        "base_model_name_or_path": str(tmp_path / "model"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {"model.layers.1.mlp.up_proj": 2, "q_proj": 3},
        "target_modules": [
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj",
        ],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_adapter_names_of_some_layers(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("layers/1/self_attn/q_proj", "lm_head"))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["target_modules"] == ["lm_head", "model.layers.1.self_attn.q_proj"]
    shapes = {
        name: tensor.shape
        for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    assert shapes == {
        "base_model.model.lm_head.lora_A.weight": (2, 16),
        "base_model.model.lm_head.lora_B.weight": (40, 2),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (2, 16),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (32, 2),
    }


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changed",
    ["embed_tokens/embedding", "lm_head/kernel", "norm/scale", "layers/mlp/up_proj/kernel"],
)
def test_modules_trained_whole_come_back(
    tmp_path: Path, changed: str, tied: bool, told: bool
) -> None:
    model = saved_model(tmp_path / "model", tied=tied)
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = randomized(
        add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    )
    flat = flatten(params)
    old = flat.get(changed, flat["embed_tokens/embedding"].T)
    params = unflatten(flat | {changed: old + 0.5 if old.ndim < 3 else old.at[1].add(0.5)})
    module = changed.rpartition("/")[0]
    told_config = dataclasses.replace(config, train_whole=(module,)) if told else None
    save_peft(tmp_path / "adapter", params, model, config=told_config)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_array_equal(flatten(again)[changed], flatten(params)[changed])
    np.testing.assert_array_equal(logits(model.config, again), logits(model.config, params))
    names = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"]
    expected = {
        "embed_tokens": ["lm_head", "model.embed_tokens"] if tied else ["model.embed_tokens"],
        "lm_head": ["lm_head"],
        "norm": ["model.norm"],
        "layers/mlp/up_proj": [
            f"model.layers.{i}.mlp.up_proj" for i in (range(3) if told else [1])
        ],
    }
    assert names == expected[module]


def test_biased_modules_trained_whole_come_back(tmp_path: Path) -> None:
    hf_config = HF_CONFIG | {"model_type": "qwen2", "head_dim": None, "hidden_size": 32}
    config = decoder_config(hf_config, source="these tests")
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(1, 0.3, leaf.shape), jnp.float32)  # noqa: E731
    model = LoadedModel(
        config=config, params=jax.tree.map(draw, abstract_params(config)), hf_config=hf_config
    )
    adapters = AdapterConfig(rank=2, targets=("up_proj",), train_whole=("q_proj",))
    params = add_adapters(model.params, adapters, layout=model.layout, key=jax.random.key(0))
    q = params["layers"]["self_attn"]["q_proj"]
    whole = {
        "self_attn": params["layers"]["self_attn"]
        | {"q_proj": jax.tree.map(lambda leaf: leaf + 1, q)}
    }
    params = params | {"layers": params["layers"] | whole}
    save_peft(tmp_path / "adapter", params, model, config=adapters)
    assert_trees_equal(load_peft(tmp_path / "adapter", model), params)
