"""Data-driven inits against PEFT's on the same tokens: EVA, CorDA, and parts of LoRA-GA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import Model  # noqa: E402
from lorax_ft.training.calibration import calibrate  # noqa: E402
from lorax_ft.tree import Tree, from_modules, modules  # noqa: E402

# torch, transformers and PEFT warn about one another.
pytestmark = pytest.mark.filterwarnings("ignore")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).zipf(1.3, (1, 256)) % 61


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def batch() -> dict[str, np.ndarray]:
    """The tokens as a batch of this library."""
    targets = np.roll(TOKENS, -1, axis=1)
    weights = np.ones(TOKENS.shape, np.float32)
    weights[:, -1] = 0
    integers = {"tokens": TOKENS, "targets": targets, "segment_ids": np.ones(TOKENS.shape)}
    integers |= {"positions": np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)}
    return {name: leaf.astype(np.int32) for name, leaf in integers.items()} | {"weights": weights}


def started(model: Model, **fields: Any) -> tuple[Tree, dict[str, np.ndarray]]:
    config = AdapterConfig(rank=4, alpha=8, **fields)
    statistics = calibrate(model, config, [batch()])
    key = jax.random.key(0)
    return add_adapters(
        model.params, config, layout=model.layout, key=key, statistics=statistics
    ), statistics


def matrices(params: Tree) -> dict[str, dict[str, np.ndarray]]:
    """The leaves of each layer by PEFT's name for the module, in float64."""
    found = {}
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            for i in range(3):
                module = path.replace("layers/", f"layers.{i}.").replace("/", ".")
                name = f"base_model.model.model.{module}"
                found[name] = {leaf: np.float64(value[i]) for leaf, value in layer.items()}
    return found


def theirs(model: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A `[in, r]`, B `[r, out]` and the base weight `[in, out]` of PEFT's module, in float64."""
    module = model.get_submodule(name)
    parts = (
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        module.base_layer.weight,
    )
    a, b, w = (part.detach().double().numpy().T for part in parts)
    return a, b, w


@pytest.mark.parametrize(
    ("init", "keep_base"),
    [
        ("eva", False),
        ("corda", False),
        ("corda", True),
        ("lora_ga", False),
        ("lora_ga", True),
        ("lora_one", False),
    ],
)
def test_peft_loads_ours(
    checkpoint: Path, tmp_path: Path, init: str, keep_base: bool, randomize: Any
) -> None:
    """On the original base, with different ranks, and with A₀ B₀ as additional columns."""
    model = load_model(checkpoint)
    params, _ = started(model, init=init, keep_base=keep_base)
    used = {
        path: (layer["lora_a"] != 0).any(-2, keepdims=True)
        for path, layer in matrices_of(params).items()
    }
    layers = modules(randomize(params))
    for path, mask in used.items():  # padding stays zero
        layers[path] |= {
            "lora_a": layers[path]["lora_a"] * mask,
            "lora_b": layers[path]["lora_b"] * mask.swapaxes(1, 2),
        }
    params = from_modules(layers)
    save_peft(tmp_path / "adapter", params, model)
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        plain = base(torch.as_tensor(TOKENS)).logits.numpy()
        theirs = (
            peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
            .eval()(torch.as_tensor(TOKENS))
            .logits.numpy()
        )
    assert np.abs(theirs - plain).max() > 0.1
    for ours in (params, load_peft(tmp_path / "adapter", model)):
        logits = jax.jit(lambda p: model.apply({"params": p}, TOKENS.astype(np.int32)))(ours)
        np.testing.assert_allclose(logits, theirs, atol=1e-4 * np.abs(theirs).max())


def matrices_of(params: Tree) -> dict[str, Any]:
    """The adapted modules by path."""
    return {path: layer for path, layer in modules(params).items() if "lora_a" in layer}


def test_eva_explains_what_pefts_does(checkpoint: Path) -> None:
    """PEFT's incremental, randomized SVD explains almost as much as the exact one, never more."""
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    eva = peft.EvaConfig(rho=2.0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ALL_LINEAR,
        init_lora_weights="eva",
        eva_config=eva,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    inputs = {
        "input_ids": torch.as_tensor(TOKENS),
        "attention_mask": torch.ones(TOKENS.shape, dtype=torch.long),
    }
    peft.initialize_lora_eva_weights(model, [inputs], show_progress_bar=False)
    params, covariances = started(load_model(checkpoint), init="eva")
    totals = np.zeros(2)
    for name, ours in matrices(params).items():
        index, module = name.split("layers.")[1].split(".", 1)
        c = np.float64(covariances["layers/" + module.replace(".", "/")][int(index)])
        rank = int((ours["lora_a"] != 0).any(0).sum())
        module = model.get_submodule(name)
        a = theirs(model, name)[0] if hasattr(module, "lora_A") else np.zeros((len(c), 0))
        assert abs(a.shape[1] - rank) <= 2, name
        if a.shape[1]:
            assert module.scaling["default"] == pytest.approx(ours["lora_scale"])
        shared = min(a.shape[1], rank)
        explained = [
            np.trace(q.T @ c @ q) / np.trace(c) for q in (ours["lora_a"][:, :shared], a[:, :shared])
        ]
        assert explained[1] <= explained[0] * (1 + 1e-6), name
        totals += explained
    assert totals[1] > 0.99 * totals[0]


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_starts_as_pefts(checkpoint: Path, mode: str) -> None:
    """The same product A B and the same base; A and B differ by the scale of C.

    PEFT scales C by the largest input.
    """
    pytest.importorskip("attr")  # PEFT's CorDA imports it, but PEFT does not depend on it (0.21)
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    corda = CordaConfig(corda_method=mode)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=ALL_LINEAR, init_lora_weights="corda", corda_config=corda
    )
    preprocess_corda(base, config, run_model=lambda: base(torch.as_tensor(TOKENS)))
    model = peft.get_peft_model(base, config)
    params, _ = started(load_model(checkpoint), init="corda", corda_mode=mode)
    for name, ours in matrices(params).items():
        a, b, w = theirs(model, name)
        product = ours["lora_a"] @ ours["lora_b"]
        np.testing.assert_allclose(a @ b, product, atol=1e-3 * np.abs(product).max(), err_msg=name)
        np.testing.assert_allclose(w, ours["kernel"], atol=1e-3 * np.abs(w).max(), err_msg=name)
        b = b[::-1] if mode == "kpm" else b  # ours orders the smallest first
        scale = np.linalg.norm(ours["lora_b"]) / np.linalg.norm(b)
        np.testing.assert_allclose(
            np.abs(b) * scale, np.abs(ours["lora_b"]), atol=1e-2 * np.abs(b).max() * scale
        )


def test_lora_ga_takes_the_singular_vectors_that_peft_takes(checkpoint: Path) -> None:
    """Unlike the paper, PEFT multiplies B by singular values of the gradient and scales only B."""
    loraga = pytest.importorskip("peft.tuners.lora.loraga")
    base = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ALL_LINEAR,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    tokens = torch.as_tensor(TOKENS)
    loraga.preprocess_loraga(
        base, config, train_step=lambda: base(tokens, labels=tokens).loss.backward()
    )
    gradients = {
        f"base_model.model.{name}": module._peft_loraga_grad.double().numpy().T
        for name, module in base.named_modules()
        if hasattr(module, "_peft_loraga_grad")
    }
    model = peft.get_peft_model(base, config)
    params, measured = started(load_model(checkpoint), init="lora_ga")
    for name, ours in matrices(params).items():
        index, module = name.split("layers.")[1].split(".", 1)
        gradient = gradients[name]
        got = measured["layers/" + module.replace(".", "/")][int(index)]
        np.testing.assert_allclose(got, gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name)
        a, b, _ = theirs(model, name)
        c = b.shape[1] ** 0.25 / 4  # γ = 16
        np.testing.assert_allclose(
            np.abs(a.T @ ours["lora_a"]) / c, np.eye(4), atol=0.05, err_msg=name
        )
        unit = b / np.linalg.norm(b, axis=1, keepdims=True)
        np.testing.assert_allclose(
            np.abs(unit @ ours["lora_b"].T) / c, np.eye(4), atol=0.05, err_msg=name
        )
