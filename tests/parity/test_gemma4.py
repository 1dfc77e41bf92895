"""Gemma 4 beside transformers and PEFT: adapters, and what is refused. Needs torch and peft."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_logits import check_gradients, train_a_little  # noqa: E402
from test_transformers import TOKENS, checkpoint, reference  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft, save_peft  # noqa: E402
from lorax_ft.interop.save_gguf import save_gguf  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402
from lorax_ft.models.model import LoadedModel  # noqa: E402
from lorax_ft.tree import Tree, flatten, unflatten  # noqa: E402


def random_factors(params: Tree) -> Tree:
    """Adapters that change the logits; with B = 0 all would agree."""
    rng = np.random.default_rng(1)
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if path.endswith(("lora_a", "lora_b")):
            leaves[path] = jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
    return unflatten(leaves)


def logits(model: LoadedModel, params: Tree) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)))


ADAPTERS = {
    "all-linear": AdapterConfig(rank=3, targets=("all-linear",)),
    "patterns": AdapterConfig(
        rank=3,
        targets=("all-linear",),
        alpha_pattern=("layers/5/.*=7",),
        rank_pattern=("v_proj=2", "layers/2/self_attn/.*=4"),
    ),
    "dora": AdapterConfig(rank=3, targets=("k_proj", "down_proj"), dora=True),
    "some_layers": AdapterConfig(rank=3, targets=("v_proj", "q_proj"), layers=(1, 2)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_ours(tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "model", "gemma4")
    plain = reference(base, TOKENS)
    model = load_model(tmp_path / "model")
    config = ADAPTERS[name]
    added = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    params = random_factors(added)
    save_peft(tmp_path / "adapter", params, model, config=config)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = reference(theirs, TOKENS)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4, rtol=1e-4)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(logits(model, again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_writes(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "model", "gemma4")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear")
    theirs = peft.get_peft_model(base, config)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = reference(theirs, TOKENS)
    model = load_model(tmp_path / "model")
    params = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_merged_kernels(tmp_path: Path) -> None:
    """∂L/∂A and ∂L/∂B by the chain rule from ∂L/∂W of the merged model."""
    checkpoint(tmp_path / "model", "gemma4")
    model = load_model(tmp_path / "model")
    config = AdapterConfig(rank=2, alpha=3, targets=("all-linear",))
    added = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    params = random_factors(added)

    adapted = check_gradients(model, params, scale=1.5)
    # Three places of a period, with 7 projections each but for the values that are keys.
    assert len(adapted) == 20


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size_per_layer_input", 8, "embeddings for each layer, as in E2B and E4B"),
        ("num_kv_shared_layers", 2, "layers that share keys and values, as in E2B and E4B"),
        ("enable_moe_block", True, "experts beside a dense MLP, as in 26B-A4B"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention all"),
    ],
)
def test_refused(tmp_path: Path, key: str, value: object, said: str) -> None:
    checkpoint(tmp_path / "model", "gemma4")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "model")


def test_no_gguf(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", "gemma4")
    model = load_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"\(gemma4_text\) cannot be written as GGUF"):
        save_gguf(tmp_path / "model.gguf", model.params, model, kind="F16")
