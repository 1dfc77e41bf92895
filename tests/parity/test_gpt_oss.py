"""gpt-oss beside transformers and PEFT: MXFP4 checkpoints, generation, adapters. Needs torch."""

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
from peft_logits import (  # noqa: E402
    check_gradients,
    check_peft_loads_ours,
    check_we_load_theirs,
    our_logits,
    their_logits,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from test_transformers import CASES, SIZES, TOKENS, checkpoint  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from lorax_ft.config import AdapterConfig, QuantConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.mxfp4 import dequantized  # noqa: E402
from lorax_ft.interop.peft import save_peft  # noqa: E402
from lorax_ft.interop.save import save_model  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.tree import flatten, unflatten  # noqa: E402

WIDTHS = {"hidden_size": 64, "intermediate_size": 96}  # rows of whole blocks of 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantized_bit_by_bit(dtype: str) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 40, 4, 16), np.uint8)
    blocks[0, 0].reshape(-1)[:] = np.arange(64)
    scales = rng.integers(0, 252, (3, 40, 4), np.uint8)  # values above those are infinite
    expected = convert_moe_packed_tensors(
        torch.as_tensor(blocks), torch.as_tensor(scales), dtype=getattr(torch, dtype)
    )
    ours = dequantized(blocks, scales).swapaxes(1, 2).astype(jnp.dtype(dtype))
    assert np.array_equal(ours.astype(np.float32), expected.float().numpy())
    assert np.array_equal(np.signbit(ours), torch.signbit(expected).numpy())


def mxfp4_checkpoint(folder: Path) -> torch.nn.Module:
    """A random model whose experts are in MXFP4 in the folder, as transformers loads it."""
    torch.manual_seed(0)
    fields = SIZES | CASES["gpt_oss"] | WIDTHS
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            weight.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, ins, outs = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, outs, ins // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )


def test_mxfp4_checkpoint(tmp_path: Path) -> None:
    theirs = mxfp4_checkpoint(tmp_path / "model")
    expected = their_logits(theirs)
    assert np.abs(expected).max() > 1
    ours = load_model(tmp_path / "model")
    np.testing.assert_allclose(our_logits(ours, ours.params), expected, atol=1e-4, rtol=1e-4)
    assert not ours.prequantized

    save_model(tmp_path / "again", ours.params, ours)  # in full precision
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    np.testing.assert_allclose(their_logits(again), expected, atol=1e-6)


def test_quantized_anew(tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path / "model")
    plain = load_model(tmp_path / "model")
    ours = load_model(tmp_path / "model", quant=QuantConfig(format="int8"))
    difference = np.abs(our_logits(ours, ours.params) - our_logits(plain, plain.params))
    # The median, because rounding changes which experts a few tokens go to.
    assert 0 < np.median(difference) < 0.02 * np.abs(our_logits(plain, plain.params)).max()


ADAPTERS = {
    "all-linear": AdapterConfig(rank=3, targets=("all-linear",)),
    "patterns": AdapterConfig(
        rank=3,
        targets=("all-linear",),
        alpha_pattern=("gate_proj=5", "layers/1/.*=7"),
        rank_pattern=("up_proj=2", "layers/2/mlp/.*=4"),
        dropout=0.1,
    ),
    "rslora": AdapterConfig(rank=3, targets=("all-linear",), scaling="rank_stabilized"),
    "gate_of_one_layer": AdapterConfig(rank=2, targets=("experts/gate_proj",), layers=(1,)),
    "down": AdapterConfig(rank=2, targets=("experts/down_proj", "q_proj")),
    "router": AdapterConfig(rank=2, targets=("mlp/gate", "experts/down_proj")),
    "pissa": AdapterConfig(rank=2, targets=("all-linear",), init="pissa"),
    "attention": AdapterConfig(rank=2, targets=("q_proj", "o_proj", "lm_head")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_ours(tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "model", "gpt_oss")
    check_peft_loads_ours(tmp_path, base, ADAPTERS[name], tokens=TOKENS)


STACKED = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "all_linear": {
        "target_modules": "all-linear",
        "target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"gate_up_proj": 3},
    },
    "router": {"target_parameters": ["mlp.router.weight"], "target_modules": []},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STACKED)
def test_we_load_what_peft_writes(tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "model", "gpt_oss")
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]} | STACKED[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    model, params, expected = check_we_load_theirs(tmp_path, base, config, tokens=TOKENS)
    save_peft(tmp_path / "again", params, model)
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", attn_implementation="eager"
        ),
        tmp_path / "again",
    )
    # Gate and up, which PEFT trained with one A, are written with one.
    shapes = []
    for folder in ("adapter", "again"):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        shapes.append({key: tensor.shape for key, tensor in tensors.items()})
    assert shapes[0] == shapes[1]
    np.testing.assert_allclose(their_logits(again, TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", "gpt_oss")
    model = load_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("all-linear",), dora=True)
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    with pytest.raises(ValueError, match="PEFT has no DoRA of experts and routers"):
        save_peft(tmp_path / "adapter", params, model, config=config)


def test_sinks_that_train(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", "gpt_oss")
    model = load_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    leaves = flatten(params)
    leaves["layers/self_attn/sinks"] += 1.0
    with pytest.raises(ValueError, match="self_attn: PEFT has no form for trained sinks"):
        save_peft(tmp_path / "adapter", unflatten(leaves), model)


def test_gradients_are_those_of_merged_kernels(tmp_path: Path) -> None:
    """∂L/∂B by the chain rule from ∂L/∂W of the merged model: s Aᵀ ∂L/∂W."""
    checkpoint(tmp_path / "model", "gpt_oss")
    adapted = check_gradients(tmp_path / "model")
    assert adapted
