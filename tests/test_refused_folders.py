"""Incompatible, damaged or missing checkpoints and adapters raise a clear one-line error."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import HF_CONFIG, assert_trees_equal, saved_model
from safetensors.numpy import load_file, save_file

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.tree import Tree, flatten, unflatten


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba'; supported: llama, mistral, "),
        ({"model_type": None}, "its config.json has no model_type"),
        ({"model": {}, "adapter": {}, "train": {}}, "output folder of a training run, not a model"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'; supported: silu"),
        ({"hidden_size": "wide"}, "hidden_size"),
        (
            {"attention_bias": True},
            "lacks the tensor model.layers.0.self_attn.k_proj.bias and 11 more",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}},
            "rope_type 'dynamic'",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": ["llama"]}, r"architecture \['llama'\]"),
        ({"num_key_value_heads": 3}, "4 heads and 3 key/value heads, which do not fit"),
        (
            {"num_hidden_layers": 4},
            "lacks the tensor model.layers.3.input_layernorm.weight and 8 more",
        ),
        (
            {"num_hidden_layers": 2},
            "holds the tensor model.layers.2.input_layernorm.weight and 8 more",
        ),
        (
            {"intermediate_size": 32},
            r"mlp.down_proj.weight has the shape \(16, 24\), not \(16, 32\)",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    saved_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_damaged_folders(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    for name, text, message in [
        ("model.safetensors", "no tensors", "cannot be read"),
        ("config.json", "{", "is not valid JSON"),
        ("config.json", "[]", "holds a list, not an object"),
    ]:
        kept = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(kept)
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only safetensors are read"):
        load_model(tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_model(tmp_path / "model")


def test_missing_paths_name_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "tiny_llama")
    with pytest.raises(ValueError, match=r"no model at .*tiny_lama; in .* there is tiny_llama"):
        load_model(tmp_path / "tiny_lama")
    with pytest.raises(ValueError, match=r"there is no folder"):
        load_model(f"{tmp_path}/nowhere/model")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/model.gguf").touch()
    with pytest.raises(
        ValueError, match=r"holds no config.json, but model.gguf; give .*files/model.gguf"
    ):
        load_model(tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"in . there is tiny_llama"):
        load_model("tiny_lama")
    with pytest.raises(ValueError, match=r"is a file but not a .gguf"):
        load_model("tiny_llama/config.json")


def test_hub_ids_fail_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"the hub id nobody/nothing at revision main failed"
    ) as error:
        load_model("nobody/nothing", revision="main")
    assert "\n" not in str(error.value)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read") as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_save_model_refuses(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    adapted = add_adapters(
        model.params, AdapterConfig(), layout=model.layout, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"these are not the model's parameters"):
        save_model(tmp_path / "merged", {"norm": model.params["norm"]}, model)
    with pytest.raises(ValueError, match=r"where the model was loaded from"):
        save_model(tmp_path / "model", model.params, model)
    with pytest.raises(ValueError, match=r"no hf_config"):
        save_model(tmp_path / "merged", model.params, dataclasses.replace(model, hf_config={}))
    assert not (tmp_path / "merged").exists()
    # B is 0, so this is the base model.
    save_model(tmp_path / "merged", adapted, model, shard_bytes=3000)
    assert_trees_equal(load_model(tmp_path / "merged").params, model.params)


def test_save_peft_refuses(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)

    def add(config: AdapterConfig) -> Tree:
        return add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))

    with pytest.raises(ValueError, match=r"hold no adapter"):
        save_peft(tmp_path / "adapter", model.params, model)
    shifted = jax.tree.map(lambda leaf: leaf + 1, model.params)
    moved = add_adapters(shifted, AdapterConfig(), layout=model.layout, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"is adapted and its own weights changed too"):
        save_peft(tmp_path / "adapter", moved, model)
    flat = flatten(add(AdapterConfig(targets=("lm_head",))))
    both = unflatten(flat | {"embed_tokens/embedding": flat["embed_tokens/embedding"] + 1})
    with pytest.raises(
        ValueError, match=r"lm_head/kernel is trained in full and its module is adapted"
    ):
        save_peft(tmp_path / "adapter", both, model)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "FOURIERFT"}, "type 'FOURIERFT'; supported: 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changed its base"),
        ({"lora_bias": True}, "uses lora_bias"),
        (
            {"target_parameters": ["experts.down_proj"]},
            "targets experts.down_proj, but .* holds no tensor for it",
        ),
        (
            {"target_parameters": "down_proj"},
            "target_parameters is 'down_proj', which is not a valid value",
        ),
        ({"r": 5}, "has rank 2 in adapter_model.safetensors, and 5 in adapter_config.json"),
        ({"use_dora": True}, "self_attn.q_proj has no magnitude"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    save_peft(
        tmp_path / "adapter",
        add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)),
        model,
    )
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "adapter", model)


def test_adapter_of_another_model(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    save_peft(
        tmp_path / "adapter",
        add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)),
        model,
    )
    wider = decoder_config(HF_CONFIG | {"head_dim": 4}, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(wider))
    with pytest.raises(
        ValueError,
        match=r"lora_b of layers/self_attn/q_proj has the shape \(32, 2\); .* needs \(16, 2\)",
    ):
        load_peft(tmp_path / "adapter", LoadedModel(config=wider, params=params))
    file = tmp_path / "adapter/adapter_model.safetensors"
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(
        ValueError, match=r"no module model.layers.0.self_attn.query; the nearest is"
    ):
        load_peft(tmp_path / "adapter", model)
    save_file({"base_model.model.odd": np.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"which does not belong to a LORA adapter"):
        load_peft(tmp_path / "adapter", model)
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        load_peft(tmp_path / "model", model)
    with pytest.raises(ValueError, match=r"is the output folder of a run; its adapter is in .*/ad"):
        load_peft(tmp_path, model)
    with pytest.raises(ValueError, match=r"holds an adapter, not a model"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r is 0, which is not a valid value"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            "targets v_proj, but adapter_model.safetensors holds no tensor for it",
        ),
    ],
)
def test_adapter_configs_that_are_wrong(tmp_path: Path, change: dict, message: str) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_peft(tmp_path / "adapter", model)
    assert "\n" not in str(error.value)


def test_an_adapter_file_without_tensors_is_no_adapter(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "q_proj"}))
    save_file({}, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no adapter"):
        load_peft(tmp_path / "adapter", model)


def test_an_adapter_of_pickles_alone(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.bin").write_bytes(b"pickle")
    for text in (None, json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})):
        if text is not None:
            (tmp_path / "adapter/adapter_config.json").write_text(text)
        said = "adapter as adapter_model.bin.*load it in PEFT and save it again"
        with pytest.raises(ValueError, match=said) as error:
            load_peft(tmp_path / "adapter", model)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="holds an adapter, not a model"):
            load_model(tmp_path / "adapter")


@pytest.mark.parametrize("targets", [("embed_tokens", "q_proj"), ("lm_head",)])
def test_sizes_are_printed_as_the_file_has_them(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = saved_model(tmp_path / "model", tied=False)
    config = AdapterConfig(rank=2, targets=targets)
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    file = tmp_path / "adapter/adapter_model.safetensors"
    names = {"lora_embedding_A": (2, 41), "lm_head.lora_B.weight": (41, 2)}
    tensors = load_file(file)
    for key in tensors:
        for name, shape in names.items():
            if key.endswith(name):
                tensors[key] = np.ones(shape, np.float32)
    save_file(tensors, file)
    shape = r"\(2, 41\); the model needs \(2, 40\)"
    if targets == ("lm_head",):
        shape = r"\(41, 2\); the model needs \(40, 2\)"
    with pytest.raises(ValueError, match=f"has the shape {shape}"):
        load_peft(tmp_path / "adapter", model)


def test_a_whole_head_of_another_size(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=False)
    config = AdapterConfig(rank=2, targets=("q_proj",), train_whole=("lm_head",))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model, config=config)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = np.ones((41, 16), np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"the shape \(41, 16\); the model's is \(40, 16\)"):
        load_peft(tmp_path / "adapter", model)
