"""Checkpoints in bitsandbytes' NF4 there and back, and what a run on a quantised base leaves behind; without torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_ft.config import AdapterConfig, MeshConfig, QuantConfig
from lorax_ft.interop.huggingface import abstract_params, decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.interop.vllm import save_for_vllm
from lorax_ft.lowrank.adapters import add_adapters, attach_adapters, switched_off
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.merge import merge_adapters, merge_weighted
from lorax_ft.models.decoder import SHARDING_RULES
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import dense
from lorax_ft.quant.nf4 import NF4
from lorax_ft.training.sharding import make_mesh, param_shardings
from lorax_ft.tree import flatten, from_modules, modules, unflatten

# 24 is no multiple of a block: some kernels run over rows, some have half a block or an odd block at their end.
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
TOKENS = jnp.arange(24).reshape(2, 12) % 40
STATE = "quant_state.bitsandbytes__nf4"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random float32 weights."""
    config = decoder_config(HF_CONFIG, source="these tests")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(config))
    folder = tmp_path_factory.mktemp("source") / "model"
    save_model(folder, params, Model(config=config, params=params, hf_config=HF_CONFIG))
    return folder


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in NF4, quantised twice."""
    model = load_model(source, quant=QuantConfig(format="nf4"))
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_quantized(folder, model.params, model)
    return folder


def logits(model: Model, params: dict | None = None) -> np.ndarray:
    return np.asarray(model.apply({"params": model.params if params is None else params}, TOKENS))


def randomised(params: dict, seed: int = 1) -> dict:
    """The tree with random factors, which tell a wrong adapter from none."""
    rng = np.random.default_rng(seed)
    layers = modules(params)
    for layer in layers.values():
        for name in ("lora_a", "lora_b"):
            if name in layer:
                layer[name] = jnp.asarray(rng.normal(0, 0.2, layer[name].shape), jnp.float32)
        if "magnitude" in layer:
            layer["magnitude"] *= jnp.float32(1.3)
    return from_modules(layers)


def adapted(model: Model, config: AdapterConfig, *, rounds: int = 1) -> dict:
    return randomised(
        add_adapters(
            model.params, config, layout=model.layout, key=jax.random.key(0), originals=model.originals, rounds=rounds
        )
    )


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_there_and_back_bitwise(source: Path, tmp_path: Path, double: bool, shard_bytes: int, strict: None) -> None:
    model = load_model(source, quant=QuantConfig(format="nf4", double=double))
    save_quantized(tmp_path / "packed", model.params, model, shard_bytes=shard_bytes)
    again = load_model(tmp_path / "packed")
    assert_same(again.params, model.params)
    assert sum(isinstance(leaf, NF4) for leaf in flatten(again.params).values()) == 7
    assert_same(load_model(tmp_path / "packed", quant=QuantConfig(format="nf4")).params, model.params)
    save_quantized(tmp_path / "again", again.params, again, shard_bytes=shard_bytes)
    for file in sorted((tmp_path / "packed").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_what_is_written(packed: Path) -> None:
    config, tensors = json.loads((packed / "config.json").read_text()), load_file(packed / "model.safetensors")
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
    name = "model.layers.0.self_attn.q_proj.weight"  # 30 × 24: 720 codes, 12 blocks
    shapes = {key.removeprefix(name): value.shape for key, value in tensors.items() if key.startswith(name)}
    state = json.loads(tensors[f"{name}.{STATE}"].tobytes())
    assert shapes.pop(f".{STATE}") == (len(json.dumps(state)),)
    assert shapes == {
        "": (360, 1),
        ".absmax": (12,),
        ".quant_map": (16,),
        ".nested_absmax": (1,),
        ".nested_quant_map": (256,),
    }
    offset = state.pop("nested_offset")
    assert offset == np.float32(offset)
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [30, 24],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    assert tensors["model.norm.weight"].dtype == np.float32


def test_packed_leaves_lie_as_their_rules_say(packed: Path) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))

    def shardings(path: str, leaf: Any) -> Any:
        return flatten(param_shardings(unflatten({path: leaf}), SHARDING_RULES, mesh=mesh))[path]

    split, whole = load_model(packed, shardings=shardings), load_model(packed)
    assert_same(split.params, whole.params)
    places = flatten(split.params)["layers/mlp/down_proj/kernel"]  # 24 rows of 64
    assert len({str(shard.index) for shard in places.codes.addressable_shards}) == 8


def test_bytes_stored_as_another_dtype(packed: Path, tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: the codes under the name of a float type, filled up to whole ones."""
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if f"{name}.{STATE}" in tensors]:
        codes = tensors[name].reshape(-1)
        tensors[name] = np.pad(codes, (0, -len(codes) % 4)).view(np.float32).reshape(-1, 1)
    write(tmp_path / "stored", packed, tensors)
    assert_same(load_model(tmp_path / "stored").params, load_model(packed).params)


def test_what_is_packed_in_part_or_is_no_linear_layer_of_ours_is_dequantised(source: Path, tmp_path: Path) -> None:
    model = load_model(source, quant=QuantConfig(format="nf4"))
    save_quantized(tmp_path / "packed", model.params, model)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    own = load_file(source / "model.safetensors")[UP]
    write(
        tmp_path / "part", tmp_path / "packed", {k: v for k, v in tensors.items() if not k.startswith(UP)} | {UP: own}
    )
    part = load_model(tmp_path / "part")
    kernel = part.params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(kernel[0], dense(model.params["layers"]["mlp"]["up_proj"]["kernel"])[0])
    np.testing.assert_array_equal(kernel[1], own.T)
    assert isinstance(part.params["layers"]["mlp"]["down_proj"]["kernel"], NF4)
    save_model(tmp_path / "whole", part.params, part)  # no longer quantised, and no word of it
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    np.testing.assert_allclose(logits(load_model(tmp_path / "whole")), logits(part), atol=1e-5)


def write(folder: Path, like: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((like / "config.json").read_text()) | (config or {})))
    save_file(tensors, folder / "model.safetensors")


def restated(**fields: Any) -> Callable[[dict], None]:
    """Other fields in the state of one weight."""

    def change(tensors: dict) -> None:
        state = json.loads(tensors[f"{UP}.{STATE}"].tobytes()) | fields
        tensors[f"{UP}.{STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "quantization_config of 'bitsandbytes fp4'; read is bitsandbytes nf4 alone"),
        (
            {"load_in_4bit": False, "load_in_8bit": True},
            r"of 'bitsandbytes LLM\.int8\(\)'; .* take the checkpoint that",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config of 'gptq'"),
        ({"quant_method": "awq"}, "quantization_config of 'awq'"),
        (None, "quantization_config of 'int4'"),
    ],
)
def test_other_quantisation_is_refused(packed: Path, tmp_path: Path, packing: dict | None, message: str) -> None:
    given = json.loads((packed / "config.json").read_text())["quantization_config"]
    write(tmp_path / "m", packed, {}, {"quantization_config": "int4" if packing is None else given | packing})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (restated(blocksize=128), "up_proj.weight has the blocksize 128; read is 64 alone: take the checkpoint"),
        (restated(nested_blocksize=128), "has the nested_blocksize 128; read is 256 alone"),
        (restated(quant_type="fp4"), "has the quant_type 'fp4'; read is 'nf4' alone"),
        (restated(shape=[64, 23]), "has 24 uint8 for its absmax; 64 × 23 takes 23 uint8"),
        (restated(shape=[64]), r"has the shape \[64\] in its quant_state.bitsandbytes__nf4, which is no matrix's"),
        (restated(shape=[24, 64]), r"has the shape \(64, 24\), not \(24, 64\) \(in, out\)"),
        (restated(nested_offset="x"), "is damaged"),
        (lambda t: t.update({f"{UP}.{STATE}": np.zeros(9, np.uint8)}), "is damaged"),
        (lambda t: t.pop(f"{UP}.absmax"), "up_proj.weight lacks its absmax"),
        (lambda t: t.pop(f"{UP}.nested_quant_map"), "up_proj.weight lacks its nested_quant_map"),
        (lambda t: t.pop(UP), "lacks the tensor model.layers.1.mlp.up_proj.weight$"),
        (lambda t: t.pop(f"{UP}.{STATE}"), "holds the tensor .*up_proj.weight.absmax and 3 more"),
        (lambda t: t.update({f"{UP}.quant_map": -t[f"{UP}.quant_map"]}), "quant_map holds other values than"),
        (lambda t: t.update({f"{UP}.nested_quant_map": np.arange(256.0)}), "nested_quant_map holds other values than"),
        (
            lambda t: t.update({f"{UP}.absmax": np.zeros(3, np.uint8)}),
            "has 3 uint8 for its absmax; 64 × 24 takes 24 uint8",
        ),
        (lambda t: t.update({UP: t[UP][:700]}), "has 700 uint8 for its codes; 64 × 24 takes 768 uint8"),
        (lambda t: t.update({f"{UP}.absmax": np.zeros(24, np.float32)}), "has 24 float32 for its absmax"),
        (lambda t: t.update({f"{UP}.nested_absmax": np.zeros(1)}), "has 1 float64 for its nested_absmax"),
    ],
)
def test_what_is_damaged_or_other_is_refused(
    packed: Path, tmp_path: Path, change: Callable[[dict], Any], message: str
) -> None:
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    write(tmp_path / "m", packed, tensors)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path / "m")
    assert "\n" not in str(raised.value)


def test_quantising_twice_otherwise_is_refused(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quant\.format is int8, but .* is in NF4 already"):
        load_model(packed, quant=QuantConfig(format="int8"))
    single = load_model(source, quant=QuantConfig(format="nf4", double=False))
    save_quantized(tmp_path / "single", single.params, single)
    assert_same(load_model(tmp_path / "single", quant=QuantConfig(format="nf4")).params, single.params)
    mixed = load_file(packed / "model.safetensors")
    ones = load_file(tmp_path / "single" / "model.safetensors")
    mixed = {k: v for k, v in mixed.items() if not k.startswith(UP)} | {k: v for k, v in ones.items() if UP in k}
    write(tmp_path / "mixed", packed, mixed)
    with pytest.raises(ValueError, match="absmax values in 8 bits in some of its weights alone"):
        load_model(tmp_path / "mixed")


def test_only_nf4_bases_are_written(source: Path, tmp_path: Path) -> None:
    for quant in (QuantConfig(), QuantConfig(format="int8")):
        model = load_model(source, quant=quant)
        with pytest.raises(ValueError, match="save_quantized writes bases with kernels in NF4"):
            save_quantized(tmp_path / "m", model.params, model)
    model = load_model(source, quant=QuantConfig(format="nf4"))
    with pytest.raises(ValueError, match="unexpected or missing leaf 'norm/scale'"):
        save_quantized(tmp_path / "m", {k: v for k, v in model.params.items() if k != "norm"}, model)
    with pytest.raises(ValueError, match="is where the model was loaded from"):
        save_quantized(source, model.params, model)
    assert not (tmp_path / "m").exists()


CHANGING = {
    "pissa": AdapterConfig(rank=3, alpha=6, init="pissa"),
    "loftq": AdapterConfig(rank=3, alpha=6, init="loftq"),
    "olora": AdapterConfig(rank=3, alpha=6, init="olora"),
    "pissa_dora": AdapterConfig(rank=3, alpha=6, init="pissa", dora=True),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_base_without_its_start_goes_with_its_adapter(source: Path, tmp_path: Path, name: str) -> None:
    model = load_model(source, quant=QuantConfig(format="nf4"))
    params = adapted(model, CHANGING[name], rounds=2)
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="was quantised without its start, so its adapter is for that base alone"):
        save_peft(run / "adapter", params, model)
    with pytest.raises(ValueError, match="was quantised without its start"):
        save_for_vllm(run / "adapter", params, model)
    assert not run.exists()
    save_quantized(run / "nf4_base", params, model)
    save_peft(run / "adapter", params, model, base=run / "nf4_base")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(run / "nf4_base"))
    base = load_model(run / "nf4_base")
    again = load_peft(run / "adapter", base)
    assert not any("lora_a0" in layer for layer in modules(again).values())
    np.testing.assert_allclose(logits(base, again), logits(model, params), atol=1e-5)
    assert np.abs(logits(base) - logits(model)).max() > 0.1
    with pytest.raises(ValueError, match=rf"was trained on {run / 'nf4_base'}, not on {source}; load that with it"):
        load_peft(run / "adapter", model)
    merged = merge_adapters(again, layout=base.layout)
    np.testing.assert_allclose(logits(base, merged), logits(model, params), atol=1e-4)
    shutil.copytree(run / "adapter", tmp_path / "moved")  # away from its base, which it still names
    with pytest.raises(ValueError, match="was trained on"):
        load_peft(tmp_path / "moved", model)
    save_peft(tmp_path / "other", adapted(model, AdapterConfig(rank=3)), model)
    assert (base.without_start, model.without_start) == (True, False)
    with pytest.raises(ValueError, match="nf4_base lacks another adapter's start"):
        load_peft(tmp_path / "other", base)
    save_model(tmp_path / "merged", again, base)
    assert not load_model(tmp_path / "merged").without_start


@pytest.mark.parametrize("name", CHANGING)
def test_a_base_without_its_start_is_computed_again_bitwise(source: Path, name: str) -> None:
    quant = QuantConfig(format="nf4")
    model = load_model(source, quant=quant)
    params = adapted(model, CHANGING[name], rounds=2)
    adapters, _ = partition(params, by="ownership")
    anew = load_model(source, quant=quant)
    again = attach_adapters(anew.params, adapters, layout=anew.layout, originals=anew.originals)
    assert_same(again, params)
    kernel = ("layers", "mlp", "up_proj", "kernel")
    assert not np.array_equal(leaf_at(again, kernel).codes, leaf_at(anew.params, kernel).codes)


def leaf_at(tree: dict, path: tuple[str, ...]) -> Any:
    return tree if not path else leaf_at(tree[path[0]], path[1:])


def test_a_start_can_be_taken_out_of_a_packed_checkpoint(packed: Path, tmp_path: Path) -> None:
    """W is then what the checkpoint dequantises to."""
    model = load_model(packed)
    config = AdapterConfig(rank=3, alpha=3, init="pissa")
    params = add_adapters(
        model.params, config, layout=model.layout, key=jax.random.key(0), originals=model.originals, rounds=3
    )
    whole = merge_adapters(params, layout=model.layout)
    for path in ("mlp/up_proj", "self_attn/v_proj"):
        path = ("layers", *path.split("/"), "kernel")
        w = dense(leaf_at(model.params, path))
        assert 0 < jnp.abs(leaf_at(whole, path) - w).max() < 0.3 * jnp.abs(w).max()


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(
    "config",
    [AdapterConfig(rank=3), AdapterConfig(rank=3, dora=True), AdapterConfig(rank=3, init="pissa", keep_base=True)],
    ids=["lora", "dora", "pissa_keep_base"],
)
def test_adapters_on_quantised_bases(source: Path, tmp_path: Path, format: Any, config: AdapterConfig) -> None:
    """To PEFT and back, switched off, merged, merged with weights."""
    model = load_model(source, quant=QuantConfig(format=format))
    params = adapted(model, config)
    save_peft(tmp_path / "adapter", params, model)
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank == (6 if config.keep_base else 3)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(logits(model, again), logits(model, params), atol=1e-4)
    off = switched_off(again, model.params, layout=model.layout)
    assert jax.tree.structure(off) == jax.tree.structure(again)
    np.testing.assert_allclose(logits(model, off), logits(model), atol=1e-5)
    assert np.abs(logits(model, again) - logits(model)).max() > 0.1

    save_model(tmp_path / "merged", params, model)
    merged = load_model(tmp_path / "merged")
    assert model.base == f"{source} in {format}"
    assert merged.base == str(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), logits(model, params), atol=1e-4)
    if not config.dora:
        halves = merge_weighted(model.params, [params, params], [0.5, 0.5], layout=model.layout)
        np.testing.assert_allclose(logits(model, halves), logits(merged), atol=1e-4)


def test_a_module_trained_whole_needs_a_base_that_is_not_quantised(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    layers = modules(adapted(model, AdapterConfig(rank=3, exclude=("up_proj",))))
    layers["layers/mlp/up_proj"]["kernel"] += jnp.float32(0.1)
    save_peft(tmp_path / "adapter", from_modules(layers), model)
    quantised = load_model(source, quant=QuantConfig(format="nf4"))
    with pytest.raises(ValueError, match=r"up_proj\.weight was trained whole; the model's is quantised"):
        load_peft(tmp_path / "adapter", quantised)


def test_the_dtype_of_a_packed_kernel_is_the_one_asked_for(packed: Path) -> None:
    kernel = load_model(packed, dtype="bfloat16").params["layers"]["mlp"]["up_proj"]["kernel"]
    whole = load_model(packed).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dequantized().dtype == jnp.bfloat16
    assert_same(dataclasses.replace(kernel, dtype="float32"), whole)


def test_experts_there_and_back(tmp_path: Path) -> None:
    """Each in its own tensors, beside a router that is not packed."""
    own = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    hf_config = HF_CONFIG | own
    config = decoder_config(hf_config, source="these tests")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(config))
    save_model(tmp_path / "source", params, Model(config=config, params=params, hf_config=hf_config))
    model = load_model(tmp_path / "source", quant=QuantConfig(format="nf4"))
    save_quantized(tmp_path / "packed", model.params, model)
    assert_same(load_model(tmp_path / "packed").params, model.params)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written["llm_int8_skip_modules"] == [
        "lm_head",
        *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)),
    ]
