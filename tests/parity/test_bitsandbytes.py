"""NF4 and its checkpoints agree with bitsandbytes and transformers.

Needs torch, bitsandbytes and peft.

Widths are multiples of 64, and everything is float32: on CPUs with AVX-512, bitsandbytes 0.50
dequantizes other rows incorrectly. If LORAX_FT_SMOLLM2 names a folder with SmolLM2-135M, its
weights are quantized too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from lorax_ft.config import AdapterConfig, QuantConfig  # noqa: E402
from lorax_ft.interop.lazy_tensor import lazy_tensors  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import save_peft  # noqa: E402
from lorax_ft.interop.save import save_quantized  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import Model  # noqa: E402
from lorax_ft.quant.double import VALUES, DoubleQuantized  # noqa: E402
from lorax_ft.quant.kernels import quantize  # noqa: E402
from lorax_ft.quant.nf4 import NF4  # noqa: E402
from lorax_ft.tree import flatten, from_modules, modules  # noqa: E402

# torch, transformers and PEFT warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")
SMOLLM2 = os.environ.get("LORAX_FT_SMOLLM2", "")
TOKENS = np.random.default_rng(0).integers(0, 90, (2, 17))
SHAPES = [(64, 64), (192, 128), (128, 576), (33, 40), (3, 5), (7, 64), (50, 100)]  # [O, I]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def packing(*, double: bool) -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def theirs_of(folder: Path, **options: object) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def our_logits(model: Model, params: dict | None = None) -> np.ndarray:
    params = model.params if params is None else params
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(TOKENS)))(params))


def their_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        # No model.eval(): on CPUs with AVX-512, bitsandbytes 0.50 would then multiply in bfloat16.
        # The model has no dropout.
        return model.train()(torch.as_tensor(TOKENS)).logits.float().numpy()


def assert_as_bitsandbytes(weight: np.ndarray) -> None:
    """Compare codes, absmax values (in 8 bits, to one code) and dequantized weights.

    Around 0, where codes are closest, bitsandbytes 0.50 picks some that are not the nearest, up to
    3 codes away. Dequantized weights are compared only where bitsandbytes is right (see above).
    """
    for double_quant in (False, True):
        ours = quantize(
            jnp.asarray(weight.T), format="nf4", double_quant=double_quant, n_stack=0, n_in=1
        )
        assert isinstance(ours, NF4)
        codes, state = bnb.functional.quantize_4bit(
            torch.as_tensor(np.array(weight)),
            blocksize=64,
            quant_type="nf4",
            compress_statistics=double_quant,
        )
        np.testing.assert_array_equal(np.asarray(ours.codes).reshape(-1), codes.numpy().reshape(-1))
        if isinstance(ours.absmax, DoubleQuantized):
            np.testing.assert_allclose(ours.absmax.offset, state.offset.numpy(), rtol=1e-6)
            scale, rounding = np.asarray(ours.absmax.scale), 1e-6 * float(state.offset)
            np.testing.assert_allclose(scale, state.state2.absmax.numpy(), rtol=1e-5, atol=rounding)
            a, b = (
                np.asarray(ours.absmax.codes).reshape(-1).astype(int),
                state.absmax.numpy().astype(int),
            )
            # If all absmax of a group are equal, its codes only hold rounding errors.
            exact = np.repeat(scale > rounding, 256)[: a.size]
            assert ((np.abs(a - b) <= 1) | (np.abs(VALUES[a] - VALUES[b]) < 3e-5) | ~exact).all()
            assert (a != b)[exact].sum() <= max(1, a.size // 100)
        else:
            np.testing.assert_array_equal(np.asarray(ours.absmax).reshape(-1), state.absmax.numpy())
            if weight.shape[1] % 64 == 0:
                back = bnb.functional.dequantize_4bit(codes, state).numpy()
                np.testing.assert_array_equal(np.asarray(ours.dequantized()).T, back)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "tails", "halves"])
def test_random_weights(shape: tuple[int, int], kind: str) -> None:
    rng = np.random.default_rng(sum(shape))
    w = {
        "normal": rng.normal(0, 0.02, shape),
        "tails": rng.standard_t(2, shape),
        "halves": rng.integers(-8, 9, shape) / 8,  # ties, and blocks of zeros
    }[kind]
    w[0, : shape[1] // 2] = 0
    assert_as_bitsandbytes(w.astype(np.float32))


@pytest.mark.skipif(not SMOLLM2, reason="LORAX_FT_SMOLLM2 names no folder")
def test_weights_of_smollm2() -> None:
    def weights() -> Iterator[np.ndarray]:
        for name, stored in lazy_tensors(Path(SMOLLM2) / "model.safetensors").items():
            if name.endswith("_proj.weight") and ".layers.1" in name:  # 1 and 10 to 19
                yield stored.read(()).astype(np.float32)

    assert sum(assert_as_bitsandbytes(weight) is None for weight in weights()) == 77


@pytest.mark.parametrize("double", [True, False])
def test_theirs_here(checkpoint: Path, tmp_path: Path, double: bool) -> None:
    theirs = theirs_of(checkpoint, quantization_config=packing(double=double))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    for module, kernel in (
        (m, layer["kernel"]) for m, layer in modules(ours.params).items() if "_proj" in m
    ):
        for i in range(2):
            name = f"model.layers.{i}.{module.removeprefix('layers/').replace('/', '.')}.weight"
            np.testing.assert_array_equal(
                np.asarray(kernel.codes[i]).reshape(-1), tensors[name].reshape(-1)
            )
            absmax = kernel.absmax.codes if double else kernel.absmax
            np.testing.assert_array_equal(
                np.asarray(absmax[i]).reshape(-1), tensors[f"{name}.absmax"].reshape(-1)
            )
    np.testing.assert_allclose(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        our_logits(ours), their_logits(theirs_of(tmp_path / "theirs")), atol=1e-4, rtol=1e-4
    )

    save_quantized(tmp_path / "again", ours.params, ours)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in again.items():
        if name.endswith("__nf4"):
            assert json.loads(value.tobytes()) == json.loads(tensors[name].tobytes())
        else:
            assert (value.dtype, value.shape) == (tensors[name].dtype, tensors[name].shape)
            np.testing.assert_allclose(value, tensors[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("double", [True, False])
def test_ours_there(checkpoint: Path, tmp_path: Path, double: bool) -> None:
    ours = load_model(checkpoint, quant=QuantConfig(format="nf4", double=double))
    save_quantized(tmp_path / "ours", ours.params, ours, shard_bytes=100_000)
    theirs = theirs_of(tmp_path / "ours")
    linear = [module for module in theirs.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(linear) == 14
    assert {module.weight.quant_state.nested for module in linear} == {double}
    np.testing.assert_allclose(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=1e-4)
    assert np.abs(our_logits(ours) - our_logits(load_model(checkpoint))).max() > 0.1


def adapted(model: Model, config: AdapterConfig) -> dict:
    """Random factors, and magnitudes that differ from the norm."""
    rng = np.random.default_rng(1)
    key = jax.random.key(0)
    layers = modules(
        add_adapters(model.params, config, layout=model.layout, key=key, originals=model.originals)
    )
    for layer in layers.values():
        if "lora_a" in layer:
            layer |= {
                n: jnp.asarray(rng.normal(0, 0.1, layer[n].shape), jnp.float32)
                for n in ("lora_a", "lora_b")
            }
        if "magnitude" in layer:
            layer["magnitude"] *= 1.2
    return from_modules(layers)


@pytest.mark.parametrize("init", ["pissa", "loftq", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_base_without_its_start(
    checkpoint: Path, tmp_path: Path, init: str, dora: bool
) -> None:
    model = load_model(checkpoint, quant=QuantConfig(format="nf4"))
    params = adapted(model, AdapterConfig(rank=4, alpha=8, init=init, dora=dora))
    save_quantized(tmp_path / "nf4_base", params, model)
    save_peft(tmp_path / "adapter", params, model, base=tmp_path / "nf4_base")
    named = peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    assert named == str(tmp_path / "nf4_base")
    theirs = peft.PeftModel.from_pretrained(theirs_of(named), tmp_path / "adapter")
    np.testing.assert_allclose(
        our_logits(model, params), their_logits(theirs), atol=2e-4, rtol=2e-4
    )


def test_an_adapter_on_a_base_that_transformers_quantizes(checkpoint: Path, tmp_path: Path) -> None:
    """QLoRA: transformers quantizes the source model itself."""
    model = load_model(checkpoint, quant=QuantConfig(format="nf4", double=False))
    params = adapted(model, AdapterConfig(rank=4, alpha=8))
    save_peft(tmp_path / "adapter", params, model)
    base = theirs_of(checkpoint, quantization_config=packing(double=False))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(
        our_logits(model, params), their_logits(theirs), atol=2e-4, rtol=2e-4
    )
    assert len(flatten(params)) > len(flatten(model.params))
