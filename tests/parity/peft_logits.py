"""What several tests with PEFT share: small checkpoints, logits of both sides, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lorax_ft.lowrank.merge import merge_adapters
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree, flatten

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 15))


def our_logits(model: Model, params: Tree) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(TOKENS)))(params))


def their_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()


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


def check_gradients(model: Model, params: Tree, *, scale: float) -> list[str]:
    """Compare ∂L/∂A and ∂L/∂B with those by the chain rule from ∂L/∂W of the merged model.

    Returns the paths of the adapted modules.
    """

    def loss(params: Tree) -> jax.Array:
        return jnp.sum(jax.nn.log_softmax(model.apply({"params": params}, TOKENS))[..., 5])

    ours = flatten(jax.jit(jax.grad(loss))(params))
    merged = merge_adapters(params, layout=model.layout)
    dense = flatten(jax.jit(jax.grad(loss))(merged))
    leaves = flatten(params)
    adapted = [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]
    for path in adapted:
        a, b = leaves[f"{path}/lora_a"], leaves[f"{path}/lora_b"]
        for name, expected in _by_chain_rule(a, b, scale * dense[f"{path}/kernel"]):
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
