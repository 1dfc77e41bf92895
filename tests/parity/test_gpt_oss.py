"""gpt-oss beside transformers and PEFT: MXFP4 checkpoints, generation, adapters. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_transformers import CASES, SIZES, TOKENS, reference  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from lorax_ft.config import QuantConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.mxfp4 import dequantized  # noqa: E402
from lorax_ft.interop.save import save_model  # noqa: E402
from lorax_ft.models.model import LoadedModel  # noqa: E402

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


def logits(model: LoadedModel) -> np.ndarray:
    return np.asarray(model.apply({"params": model.params}, jnp.asarray(TOKENS)))


def test_mxfp4_checkpoint(tmp_path: Path) -> None:
    theirs = mxfp4_checkpoint(tmp_path / "model")
    expected = reference(theirs, TOKENS)
    assert np.abs(expected).max() > 1
    ours = load_model(tmp_path / "model")
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4, rtol=1e-4)
    assert not ours.prequantized

    save_model(tmp_path / "again", ours.params, ours)  # in full precision
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    np.testing.assert_allclose(reference(again, TOKENS), expected, atol=1e-6)


def test_quantized_anew(tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path / "model")
    plain = load_model(tmp_path / "model")
    ours = load_model(tmp_path / "model", quant=QuantConfig(format="int8"))
    difference = np.abs(logits(ours) - logits(plain))
    # The median, because rounding changes which experts a few tokens go to.
    assert 0 < np.median(difference) < 0.02 * np.abs(logits(plain)).max()
