"""Adapters keep their logits from here to PEFT and back. Needs torch and peft.

All factors are random, because with B = 0 all adapters agree.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import our_logits, sparse_checkpoint, their_logits, train_a_little  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import Model  # noqa: E402
from lorax_ft.tree import flatten, from_modules, modules, unflatten  # noqa: E402

# torch, transformers and PEFT warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=request.param == "tied",
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def adapted(model: Model, config: AdapterConfig, seed: int = 1) -> dict:
    """The parameters with random factors; `config` gives ranks, padding, scales and init."""
    rng = np.random.default_rng(seed)
    layers = modules(add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)))
    for layer in layers.values():
        if "lora_a" in layer:
            used = (layer["lora_a"] != 0).any(-2) | (layer["lora_b"] != 0).any(-1)
            a, b = (
                jnp.asarray(rng.normal(0, 0.2, layer[name].shape), jnp.float32)
                for name in ("lora_a", "lora_b")
            )
            layer |= {
                "lora_a": jnp.where(used[..., None, :], a, 0),
                "lora_b": jnp.where(used[..., None], b, 0),
            }
        if "magnitude" in layer:
            m = layer["magnitude"]
            factor = rng.uniform(0.7, 1.3, m.shape).astype(np.float32)
            layer["magnitude"] = jnp.where(layer["lora_scale"][..., None] > 0, m * factor, m)
    return from_modules(layers)


def assert_same_adapter(ours: np.ndarray, theirs: np.ndarray, base: np.ndarray) -> None:
    assert np.abs(base - theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


EXPORTED = {
    "lora": AdapterConfig(rank=4, alpha=9),
    "rslora": AdapterConfig(rank=3, scaling="rank_stabilized"),
    "dora": AdapterConfig(rank=4, alpha=4, dora=True),
    "pissa": AdapterConfig(rank=4, alpha=4, init="pissa"),
    "pissa_rslora": AdapterConfig(rank=3, alpha=4, init="pissa", scaling="rank_stabilized"),
    "olora": AdapterConfig(rank=4, alpha=4, init="olora"),
    "olora_dora_rslora": AdapterConfig(
        rank=4, alpha=5, init="olora", dora=True, scaling="rank_stabilized"
    ),
    "milora_rslora": AdapterConfig(rank=3, alpha=4, init="milora", scaling="rank_stabilized"),
    "milora_dora": AdapterConfig(rank=4, alpha=4, init="milora", dora=True),
    "orthogonal": AdapterConfig(rank=4, init="orthogonal", rank_pattern=("v_proj=2",)),
    "pissa_keep_base": AdapterConfig(rank=4, alpha=4, init="pissa", keep_base=True),
    "pissa_dora": AdapterConfig(rank=4, alpha=4, init="pissa", dora=True),
    "pissa_dora_rslora_patterns": AdapterConfig(
        rank=4,
        init="pissa",
        dora=True,
        scaling="rank_stabilized",
        rank_pattern=("q_proj=2", "layers/1/mlp/up_proj=3"),
    ),
    "patterns": AdapterConfig(
        rank=4, rank_pattern=("layers/1/.*=2", "v_proj=6"), alpha_pattern=("k_proj=5",)
    ),
    "some_layers": AdapterConfig(rank=2, layers=(0, 2), exclude=("down_proj",)),
    "some_layers_dora": AdapterConfig(rank=2, layers=(1,), dora=True),
    "embeddings": AdapterConfig(rank=3, targets=("embed_tokens", "q_proj")),
    "embeddings_dora": AdapterConfig(rank=3, targets=("embed_tokens", "q_proj"), dora=True),
    "head": AdapterConfig(rank=3, targets=("lm_head", "all-linear")),
    "head_pissa": AdapterConfig(rank=3, targets=("lm_head", "all-linear"), init="pissa"),
    "head_dora": AdapterConfig(rank=3, targets=("lm_head",), dora=True),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_peft_loads_ours(checkpoint: Path, tmp_path: Path, name: str) -> None:
    model = load_model(checkpoint)
    params = adapted(model, EXPORTED[name])
    save_peft(tmp_path / "adapter", params, model)
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    plain = their_logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    count = sum(
        name.endswith(("lora_A.default.weight", "lora_embedding_A.default"))
        for name, _ in theirs.named_parameters()
    )
    assert count == sum(
        int((layer["lora_scale"] > 0).sum())
        for layer in modules(params).values()
        if "lora_a" in layer
    )
    assert_same_adapter(our_logits(model, params), their_logits(theirs), plain)
    assert_same_adapter(
        our_logits(model, load_peft(tmp_path / "adapter", model)), their_logits(theirs), plain
    )


@pytest.mark.parametrize(
    "changed",
    ["embed_tokens/embedding", "lm_head/kernel", "norm/scale", "layers/mlp/up_proj/kernel"],
)
def test_peft_loads_our_whole_modules(checkpoint: Path, tmp_path: Path, changed: str) -> None:
    model = load_model(checkpoint)
    flat = flatten(adapted(model, AdapterConfig(rank=2, targets=("q_proj", "v_proj"))))
    old = flat.get(changed, flat["embed_tokens/embedding"].T)
    noise = np.random.default_rng(2).normal(0, 0.3, old.shape).astype(np.float32)
    params = unflatten(flat | {changed: old + noise if old.ndim < 3 else old.at[1].add(noise[1])})
    save_peft(tmp_path / "adapter", params, model)
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    plain = their_logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_adapter(our_logits(model, params), their_logits(theirs), plain)


IMPORTED = {
    "lora": {"r": 4, "lora_alpha": 9, "target_modules": ALL_LINEAR},
    "all_linear": {"r": 4, "target_modules": "all-linear"},
    "all_linear_but_names": {
        "r": 4,
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"],
    },
    "all_linear_but_a_pattern": {
        "r": 4,
        "target_modules": "all-linear",
        "exclude_modules": r".*\.0\.(self_attn|mlp)\.(k|up)_proj",
    },
    "rslora": {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL_LINEAR},
    "dora": {"r": 4, "use_dora": True, "target_modules": ALL_LINEAR},
    "some_layers": {
        "r": 4,
        "use_dora": True,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
    },
    "patterns": {
        "r": 4,
        "target_modules": r".*\.(q|v|up)_proj",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
        "alpha_pattern": {r"layers\.\d\.self_attn\.v_proj": 3},
        "use_rslora": True,
    },
    "embeddings": {"r": 3, "target_modules": ["embed_tokens", "q_proj"]},
    "embeddings_dora": {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"r": 3, "target_modules": ["lm_head", "q_proj"]},
    "whole_head": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole_embeddings": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole_norm": {
        "r": 3,
        "target_modules": ["q_proj"],
        "modules_to_save": ["input_layernorm", "model.norm"],
    },
    "fan_in_fan_out": {"r": 3, "target_modules": ["q_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", IMPORTED)
def test_we_load_what_peft_writes(checkpoint: Path, tmp_path: Path, name: str) -> None:
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    plain = their_logits(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **IMPORTED[name])
    theirs = peft.get_peft_model(base, config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(checkpoint)
    assert_same_adapter(
        our_logits(model, load_peft(tmp_path / "adapter", model)), their_logits(theirs), plain
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_start_of_peft(checkpoint: Path, tmp_path: Path, init: str) -> None:
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    plain = their_logits(base)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=ALL_LINEAR, init_lora_weights=init
    )
    theirs = peft.get_peft_model(base, config)
    # As in PEFT's guide: save the initial adapter first.
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    expected = their_logits(theirs)
    model = load_model(checkpoint)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        load_peft(tmp_path / "raw", model)
    theirs.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 8
    assert_same_adapter(our_logits(model, load_peft(tmp_path / "adapter", model)), expected, plain)


def test_olora_starts_as_pefts(checkpoint: Path) -> None:
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=ALL_LINEAR, init_lora_weights="olora"
    )
    theirs = peft.get_peft_model(base, config).state_dict()
    model = load_model(checkpoint)
    ours = AdapterConfig(rank=4, alpha=6, init="olora")
    params = add_adapters(model.params, ours, layout=model.layout, key=jax.random.key(0))
    for path, leaf in flatten(params["layers"]).items():
        names = {
            "lora_a": "lora_A.default.weight",
            "lora_b": "lora_B.default.weight",
            "kernel": "base_layer.weight",
        }
        module, _, name = path.rpartition("/")
        for i in range(3):
            if name in names:
                key = f"base_model.model.model.layers.{i}.{module.replace('/', '.')}.{names[name]}"
                np.testing.assert_allclose(leaf[i], theirs[key].numpy().T, atol=2e-6, err_msg=key)


def test_the_orthogonal_start_is_pefts_in_distribution(checkpoint: Path) -> None:
    """PEFT's init has A B = 0 too; each factor has our spread and half the rank."""
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=8, target_modules=ALL_LINEAR, init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(base, config).state_dict()
    model = load_model(checkpoint)
    ours = AdapterConfig(rank=8, init="orthogonal")
    params = add_adapters(model.params, ours, layout=model.layout, key=jax.random.key(0))
    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    spread: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for path, layer in modules(params["layers"]).items():
        for i in range(3 if "lora_a" in layer else 0):
            prefix = f"base_model.model.model.layers.{i}.{path.replace('/', '.')}"
            pair = {name: theirs[f"{prefix}.{key}"].numpy().T for name, key in names.items()}
            for whose, a, b in (
                ("ours", layer["lora_a"][i], layer["lora_b"][i]),
                ("theirs", pair["lora_a"], pair["lora_b"]),
            ):
                assert np.abs(np.float64(a) @ np.float64(b)).max() < 1e-7
                assert np.linalg.matrix_rank(a, tol=1e-5) == np.linalg.matrix_rank(b, tol=1e-5) == 4
                spread[whose] += [np.ravel(a), np.ravel(b)]
    sizes = {whose: np.concatenate(parts).std() for whose, parts in spread.items()}
    assert sizes["ours"] == pytest.approx(sizes["theirs"], rel=0.03)
    assert sizes["ours"] == pytest.approx(0.1 / 2**0.5, rel=0.03)


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def sparse(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return sparse_checkpoint(tmp_path / "model", request.param)


@pytest.mark.parametrize(
    "targets", [("all-linear",), ("experts/gate_proj", "experts/up_proj", "experts/down_proj")]
)
def test_peft_loads_our_experts(sparse: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = load_model(sparse)
    params = adapted(model, AdapterConfig(rank=3, targets=targets))
    save_peft(tmp_path / "adapter", params, model)
    base = transformers.AutoModelForCausalLM.from_pretrained(sparse)
    plain = their_logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_adapter(our_logits(model, params), their_logits(theirs), plain)
    assert_same_adapter(
        our_logits(model, load_peft(tmp_path / "adapter", model)), their_logits(theirs), plain
    )


STACKED = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate_up": {"target_parameters": ["experts.gate_up_proj"], "lora_alpha": 5, "use_rslora": True},
    "down": {"target_parameters": ["experts.down_proj"]},
    "router": {
        "target_parameters": ["mlp.gate.weight", "experts.down_proj"],
        "rank_pattern": {"gate.weight": 2},
    },
    "one_layer": {"target_parameters": ["layers.1.mlp.experts.down_proj", "experts.gate_up_proj"]},
    "patterns": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"down_proj": 5, "layers.0.mlp.experts.gate_up_proj": 2},
        "alpha_pattern": {r"layers\.\d\.mlp\.experts\.gate_up_proj": 3},
    },
    "dense": {
        "target_parameters": ["self_attn.v_proj.weight"],
        "rank_pattern": {"v_proj.weight": 2},
    },
}


@pytest.mark.parametrize("name", STACKED)
def test_we_load_stacked_experts_that_peft_writes(sparse: Path, tmp_path: Path, name: str) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(sparse)
    plain = their_logits(base)
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]} | STACKED[name]
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(sparse)
    params = load_peft(tmp_path / "adapter", model)
    assert_same_adapter(our_logits(model, params), their_logits(theirs), plain)
    save_peft(tmp_path / "again", params, model)
    assert_same_adapter(
        our_logits(model, load_peft(tmp_path / "again", model)), their_logits(theirs), plain
    )


def test_our_experts_come_back_after_peft_stacked_them(sparse: Path, tmp_path: Path) -> None:
    model = load_model(sparse)
    params = adapted(model, AdapterConfig(rank=3, targets=("all-linear",)))
    save_peft(tmp_path / "ours", params, model)
    base = transformers.AutoModelForCausalLM.from_pretrained(sparse)
    plain = their_logits(base)
    peft.PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    assert any(name.endswith("gate_up_proj") for name in config["target_parameters"])
    assert_same_adapter(
        our_logits(model, load_peft(tmp_path / "theirs", model)), our_logits(model, params), plain
    )


def test_stacked_experts_that_do_not_fit(sparse: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(sparse)
    fields = {"r": 3, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).save_pretrained(
        tmp_path / "adapter"
    )
    config = json.loads((sparse / "config.json").read_text())
    count = next(name for name in ("num_local_experts", "num_experts") if name in config)
    other = transformers.AutoModelForCausalLM.from_config(
        base.config.__class__(**config | {count: 5})
    )
    other.save_pretrained(tmp_path / "other")
    said = "layers.0.mlp.experts.lora_A.weight has the shape .*does not fit 5 experts"
    with pytest.raises(ValueError, match=said):
        load_peft(tmp_path / "adapter", load_model(tmp_path / "other"))
