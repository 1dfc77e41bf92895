"""Adapters on embeddings and heads, tied or not."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from method_cases import KEY, Adapted, distance

from lorax_ft import AdapterConfig, add_adapters, layout, merge_adapters, with_norms
from lorax_ft.tree import flatten

pytestmark = pytest.mark.usefixtures("strict")


def test_an_adapted_embedding_changes_the_lookup_alone(
    zoo: Any, adapted: Adapted, randomize: Any
) -> None:
    """In a tied model the head keeps the original table; merging unties the two in the tree."""
    case = zoo("decoder")
    params = adapted("decoder", "kaiming-standard", targets=("embed_tokens",))
    assert not params["embed_tokens"]["lora_a"].any()
    assert params["embed_tokens"]["lora_b"].std() == pytest.approx(1, rel=0.2)
    params = randomize(params)
    merged = merge_adapters(params, layout=case.layout)
    np.testing.assert_array_equal(
        merged["lm_head"]["kernel"], params["embed_tokens"]["embedding"].T
    )
    assert distance(case.plain(merged), case.forward(params)) < 1e-5


def test_an_adapted_tied_head_leaves_the_lookup_alone(
    zoo: Any, adapted: Adapted, randomize: Any
) -> None:
    case = zoo("decoder")
    params = randomize(adapted("decoder", "pissa-standard-dora", targets=("lm_head",)))
    assert "kernel" not in params["lm_head"]
    merged = merge_adapters(params, layout=case.layout)
    np.testing.assert_array_equal(
        merged["embed_tokens"]["embedding"], case.params["embed_tokens"]["embedding"]
    )
    assert distance(case.plain(merged), case.forward(params)) < 1e-5
    normed = with_norms(params, layout=case.layout)
    assert distance(case.forward(normed), case.forward(params)) < 1e-6


def test_merging_without_adapters_on_the_head_keeps_it_tied(zoo: Any, adapted: Adapted) -> None:
    assert "lm_head" not in merge_adapters(
        adapted("decoder", "kaiming-standard", targets=("all-linear",))
    )


def test_all_linear_leaves_out_heads_and_embeddings(adapted: Adapted) -> None:
    flat = flatten(adapted("decoder_untied", "kaiming-standard", targets=("all-linear",)))
    assert not any(path.startswith(("lm_head/lora", "embed_tokens/lora")) for path in flat)
    assert sum(path.endswith("lora_a") for path in flat) == 7


def test_foreign_models_with_an_embedding_get_no_head() -> None:
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: Array) -> Array:
            return nn.Dense(3, name="classes")(nn.Embed(11, 8, name="embed_tokens")(tokens).mean(1))

    tokens = jnp.arange(4)[None]
    params = Encoder().init(KEY, tokens)["params"]
    found = layout(Encoder().apply, params, tokens)
    config = AdapterConfig(rank=2, targets=("embed_tokens", "classes"))
    adapted = add_adapters(params, config, layout=found, key=KEY)
    assert set(flatten(merge_adapters(adapted, layout=found))) == set(flatten(params))
