"""Round trips of bitsandbytes NF4 checkpoints, and what is rejected; without torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nf4_cases import HF_CONFIG, assert_same, logits
from safetensors.numpy import load_file, save_file

from lorax_ft.config import MeshConfig, QuantConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.quant.kernels import dense
from lorax_ft.quant.nf4 import NF4
from lorax_ft.sharding import DECODER_RULES, base_sharding, make_mesh
from lorax_ft.tree import flatten

STATE = "quant_state.bitsandbytes__nf4"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_there_and_back_bitwise(
    source: Path, tmp_path: Path, double: bool, shard_bytes: int, strict: None
) -> None:
    model = load_model(source, quant=QuantConfig(format="nf4", double=double))
    save_quantized(tmp_path / "packed", model.params, model, shard_bytes=shard_bytes)
    again = load_model(tmp_path / "packed")
    assert_same(again.params, model.params)
    assert sum(isinstance(leaf, NF4) for leaf in flatten(again.params).values()) == 7
    assert_same(
        load_model(tmp_path / "packed", quant=QuantConfig(format="nf4")).params, model.params
    )
    save_quantized(tmp_path / "again", again.params, again, shard_bytes=shard_bytes)
    for file in sorted((tmp_path / "packed").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_what_is_written(packed: Path) -> None:
    config, tensors = (
        json.loads((packed / "config.json").read_text()),
        load_file(packed / "model.safetensors"),
    )
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
    shapes = {
        key.removeprefix(name): value.shape
        for key, value in tensors.items()
        if key.startswith(name)
    }
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
        return base_sharding(path, leaf, DECODER_RULES, mesh=mesh)

    split, whole = load_model(packed, shardings=shardings), load_model(packed)
    assert_same(split.params, whole.params)
    places = flatten(split.params)["layers/mlp/down_proj/kernel"]  # 24 rows of 64
    assert len({str(shard.index) for shard in places.codes.addressable_shards}) == 8


def test_bytes_stored_as_another_dtype(packed: Path, tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: the codes are stored in a float dtype, padded to whole elements."""
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if f"{name}.{STATE}" in tensors]:
        codes = tensors[name].reshape(-1)
        tensors[name] = np.pad(codes, (0, -len(codes) % 4)).view(np.float32).reshape(-1, 1)
    write(tmp_path / "stored", packed, tensors)
    assert_same(load_model(tmp_path / "stored").params, load_model(packed).params)


def test_what_is_packed_in_part_or_is_no_linear_layer_of_ours_is_dequantized(
    source: Path, tmp_path: Path
) -> None:
    model = load_model(source, quant=QuantConfig(format="nf4"))
    save_quantized(tmp_path / "packed", model.params, model)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    own = load_file(source / "model.safetensors")[UP]
    write(
        tmp_path / "part",
        tmp_path / "packed",
        {k: v for k, v in tensors.items() if not k.startswith(UP)} | {UP: own},
    )
    part = load_model(tmp_path / "part")
    kernel = part.params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
        kernel[0], dense(model.params["layers"]["mlp"]["up_proj"]["kernel"])[0]
    )
    np.testing.assert_array_equal(kernel[1], own.T)
    assert isinstance(part.params["layers"]["mlp"]["down_proj"]["kernel"], NF4)
    # Saved unquantized, without any mention of quantization in the config.
    save_model(tmp_path / "whole", part.params, part)
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    np.testing.assert_allclose(logits(load_model(tmp_path / "whole")), logits(part), atol=1e-5)


def write(
    folder: Path, like: Path, tensors: dict[str, np.ndarray], config: dict | None = None
) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(json.loads((like / "config.json").read_text()) | (config or {}))
    )
    save_file(tensors, folder / "model.safetensors")


def restated(**fields: Any) -> Callable[[dict], None]:
    """Change fields in the quantization state of one weight."""

    def change(tensors: dict) -> None:
        state = json.loads(tensors[f"{UP}.{STATE}"].tobytes()) | fields
        tensors[f"{UP}.{STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (
            {"bnb_4bit_quant_type": "fp4"},
            "of 'bitsandbytes fp4'; only bitsandbytes nf4 and mxfp4 are supported",
        ),
        (
            {"load_in_4bit": False, "load_in_8bit": True},
            r"of 'bitsandbytes LLM\.int8\(\)'; .* load the original checkpoint",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config of 'gptq'"),
        ({"quant_method": "awq"}, "quantization_config of 'awq'"),
        (None, "quantization_config of 'int4'"),
    ],
)
def test_other_quantization_is_refused(
    packed: Path, tmp_path: Path, packing: dict | None, message: str
) -> None:
    given = json.loads((packed / "config.json").read_text())["quantization_config"]
    write(
        tmp_path / "m",
        packed,
        {},
        {"quantization_config": "int4" if packing is None else given | packing},
    )
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            restated(blocksize=128),
            "up_proj.weight has the blocksize 128; only 64 is supported: load the original",
        ),
        (restated(nested_blocksize=128), "has the nested_blocksize 128; only 256 is supported"),
        (restated(quant_type="fp4"), "has the quant_type 'fp4'; only 'nf4' is supported"),
        (restated(shape=[64, 23]), "has 24 uint8 for its absmax; 64 × 23 needs 23 uint8"),
        (
            restated(shape=[64]),
            r"has the shape \[64\] in its quant_state.bitsandbytes__nf4, which is not a matrix's",
        ),
        (restated(shape=[24, 64]), r"has the shape \(24, 64\), not \(64, 24\)"),
        (restated(nested_offset="x"), "is damaged"),
        (lambda t: t.update({f"{UP}.{STATE}": np.zeros(9, np.uint8)}), "is damaged"),
        (lambda t: t.pop(f"{UP}.absmax"), "up_proj.weight lacks its absmax"),
        (lambda t: t.pop(f"{UP}.nested_quant_map"), "up_proj.weight lacks its nested_quant_map"),
        (lambda t: t.pop(UP), "lacks the tensor model.layers.1.mlp.up_proj.weight$"),
        (lambda t: t.pop(f"{UP}.{STATE}"), "holds the tensor .*up_proj.weight.absmax and 3 more"),
        (
            lambda t: t.update({f"{UP}.quant_map": -t[f"{UP}.quant_map"]}),
            "quant_map differs from the values of",
        ),
        (
            lambda t: t.update({f"{UP}.nested_quant_map": np.arange(256.0)}),
            "nested_quant_map differs from the values of",
        ),
        (
            lambda t: t.update({f"{UP}.absmax": np.zeros(3, np.uint8)}),
            "has 3 uint8 for its absmax; 64 × 24 needs 24 uint8",
        ),
        (
            lambda t: t.update({UP: t[UP][:700]}),
            "has 700 uint8 for its codes; 64 × 24 needs 768 uint8",
        ),
        (
            lambda t: t.update({f"{UP}.absmax": np.zeros(24, np.float32)}),
            "has 24 float32 for its absmax",
        ),
        (
            lambda t: t.update({f"{UP}.nested_absmax": np.zeros(1)}),
            "has 1 float64 for its nested_absmax",
        ),
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


def test_quantizing_twice_otherwise_is_refused(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quant\.format is int8, but .* is in NF4 already"):
        load_model(packed, quant=QuantConfig(format="int8"))
    single = load_model(source, quant=QuantConfig(format="nf4", double=False))
    save_quantized(tmp_path / "single", single.params, single)
    assert_same(
        load_model(tmp_path / "single", quant=QuantConfig(format="nf4")).params, single.params
    )
    mixed = load_file(packed / "model.safetensors")
    ones = load_file(tmp_path / "single" / "model.safetensors")
    mixed = {k: v for k, v in mixed.items() if not k.startswith(UP)} | {
        k: v for k, v in ones.items() if UP in k
    }
    write(tmp_path / "mixed", packed, mixed)
    with pytest.raises(ValueError, match="double quantization for some of its weights only"):
        load_model(tmp_path / "mixed")


def test_only_nf4_bases_are_written(source: Path, tmp_path: Path) -> None:
    for quant in (QuantConfig(), QuantConfig(format="int8")):
        model = load_model(source, quant=quant)
        with pytest.raises(ValueError, match="save_quantized writes bases with kernels in NF4"):
            save_quantized(tmp_path / "m", model.params, model)
    model = load_model(source, quant=QuantConfig(format="nf4"))
    with pytest.raises(ValueError, match="unexpected or missing leaf 'norm/scale'"):
        save_quantized(
            tmp_path / "m", {k: v for k, v in model.params.items() if k != "norm"}, model
        )
    with pytest.raises(ValueError, match="is where the model was loaded from"):
        save_quantized(source, model.params, model)
    assert not (tmp_path / "m").exists()


def test_the_dtype_of_a_packed_kernel_is_the_one_asked_for(packed: Path) -> None:
    kernel = load_model(packed, dtype="bfloat16").params["layers"]["mlp"]["up_proj"]["kernel"]
    whole = load_model(packed).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dequantized().dtype == jnp.bfloat16
    assert_same(dataclasses.replace(kernel, dtype="float32"), whole)


def test_experts_there_and_back(tmp_path: Path) -> None:
    """Each expert has its own tensors; the router is not quantized."""
    own = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    hf_config = HF_CONFIG | own
    config = decoder_config(hf_config, source="these tests")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), abstract_params(config)
    )
    save_model(
        tmp_path / "source", params, LoadedModel(config=config, params=params, hf_config=hf_config)
    )
    model = load_model(tmp_path / "source", quant=QuantConfig(format="nf4"))
    save_quantized(tmp_path / "packed", model.params, model)
    assert_same(load_model(tmp_path / "packed").params, model.params)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written["llm_int8_skip_modules"] == [
        "lm_head",
        *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)),
    ]
