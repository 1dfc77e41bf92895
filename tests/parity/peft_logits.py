"""What several tests with PEFT share: small checkpoints, logits and folders of both sides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.lowrank.merge import merge_adapters
from lorax_ft.models.model import LoadedModel, Model
from lorax_ft.tree import Tree, flatten, unflatten

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 15))


def our_logits(model: Model, params: Tree) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(TOKENS)))(params))


def their_logits(model: torch.nn.Module, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(tokens)).logits.numpy()


def qwen2_with_biases(folder: Path, *, layers: int) -> Path:
    """A checkpoint of Qwen 2, whose q, k and v have biases."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def sparse_checkpoint(folder: Path, model_type: str) -> Path:
    """A checkpoint of Mixtral or Qwen 3 MoE with 4 experts, 2 for each token."""
    torch.manual_seed(0)
    count = "num_experts" if model_type == "qwen3_moe" else "num_local_experts"
    config = transformers.CONFIG_MAPPING[model_type](
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
        initializer_range=0.2,
        **{count: 4},
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("gate.weight"):
            weight.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


def train_a_little(model: torch.nn.Module) -> None:
    """Move every trainable weight of PEFT's model, as training would."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)


def random_factors(params: Tree) -> Tree:
    """Adapters that change the logits; with B = 0 all would agree."""
    rng = np.random.default_rng(1)
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if path.endswith(("lora_a", "lora_b")):
            leaves[path] = jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
    return unflatten(leaves)


def check_peft_loads_ours(
    folder: Path, base: torch.nn.Module, config: AdapterConfig, *, tokens: np.ndarray
) -> None:
    """PEFT and `load_peft` read what we save of an adapter of `folder / "model"`."""
    plain = their_logits(base, tokens)
    model = load_model(folder / "model")
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    changes_base = config.init == "pissa"
    if not changes_base:
        params = random_factors(params)
    save_peft(folder / "adapter", params, model, config=config)
    expected = their_logits(peft.PeftModel.from_pretrained(base, folder / "adapter"), tokens)
    assert changes_base or np.abs(expected - plain).max() > 0.1
    for tree in (params, load_peft(folder / "adapter", model)):
        ours = model.apply({"params": tree}, jnp.asarray(tokens))
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def check_we_load_theirs(
    folder: Path, base: torch.nn.Module, config: peft.LoraConfig, *, tokens: np.ndarray
) -> tuple[LoadedModel, Tree, np.ndarray]:
    """We read what PEFT saves of an adapter of `folder / "model"`.

    Returns the model, the parameters with the adapter, and PEFT's logits.
    """
    theirs = peft.get_peft_model(base, config)
    train_a_little(theirs)
    theirs.save_pretrained(folder / "adapter")
    expected = their_logits(theirs, tokens)
    model = load_model(folder / "model")
    params = load_peft(folder / "adapter", model)
    ours = model.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
    return model, params, expected


def check_gradients(folder: Path) -> list[str]:
    """Compare ∂L/∂A and ∂L/∂B with those by the chain rule from ∂L/∂W of the merged model.

    Adapts all linear modules of the model in `folder`, and returns their paths.
    """
    model = load_model(folder)
    config = AdapterConfig(rank=2, alpha=3, targets=("all-linear",))
    added = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    params = random_factors(added)

    def loss(params: Tree) -> jax.Array:
        return jnp.sum(jax.nn.log_softmax(model.apply({"params": params}, TOKENS))[..., 5])

    ours = flatten(jax.jit(jax.grad(loss))(params))
    merged = merge_adapters(params, layout=model.layout)
    dense = flatten(jax.jit(jax.grad(loss))(merged))
    leaves = flatten(params)
    adapted = [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]
    for path in adapted:
        a, b = leaves[f"{path}/lora_a"], leaves[f"{path}/lora_b"]
        for name, expected in _by_chain_rule(a, b, 1.5 * dense[f"{path}/kernel"]):
            size = float(jnp.abs(expected).max())
            assert size > 0
            found = ours[f"{path}/{name}"]
            np.testing.assert_allclose(found, expected, atol=2e-4 * size, err_msg=path)
    return adapted


def _by_chain_rule(
    a: jax.Array, b: jax.Array, gradient: jax.Array
) -> Iterator[tuple[str, jax.Array]]:
    yield "lora_b", jnp.swapaxes(a, -1, -2) @ gradient
    yield "lora_a", gradient @ jnp.swapaxes(b, -1, -2)
