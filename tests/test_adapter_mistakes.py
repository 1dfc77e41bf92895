"""Mistakes in an adapter's config or tree raise a clear one-line error."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from method_cases import KEY, Adapted

from lorax_ft import AdapterConfig, adapt, add_adapters, merged_kernel

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ("q_porj",)},
            r"adapter\.targets: 'q_porj' matches no module.*'q_proj'.*layers/\*/self_attn/q_proj",
        ),
        ({"targets": ("zzz",)}, r"adapter\.targets: 'zzz' matches no module; there are .*lm_head"),
        (
            {"targets": ("q_proj,v_proj",)},
            r"adapter\.targets: 'q_proj,v_proj' matches .* without commas, as in q_proj v_proj$",
        ),
        ({"exclude": ("upproj",)}, r"adapter\.exclude: 'upproj' matches no module.*'up_proj'"),
        (
            {"rank_pattern": ("q_prj=4",)},
            r"adapter\.rank_pattern: 'q_prj' matches no module.*'q_proj'",
        ),
        (
            {"rank_pattern": ("all-linear=4",)},
            r"adapter\.rank_pattern: 'all-linear' matches no module",
        ),
        (
            {"alpha_pattern": ("layers/7/.*=4",)},
            r"adapter\.alpha_pattern: 'layers/7/\.\*' matches no module",
        ),
        ({"layers": (0, 3)}, r"adapter\.layers: there is no layer 3; the model has layers 0 to 2"),
        ({"targets": ("q_proj",), "exclude": ("self_attn/.*", "q_proj")}, "adapter.exclude"),
        (
            {"rank": 17, "init": "pissa", "targets": ("k_proj",)},
            r"layers/self_attn/k_proj: rank 17 is above .* 32 × 16",
        ),
        (
            {"init": "pissa", "rank_pattern": ("layers/1/.*k_proj=17",)},
            r"layers/self_attn/k_proj: rank 17 is above",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(
    adapted: Adapted, fields: dict[str, Any], message: str
) -> None:
    if fields.get("exclude") == ("self_attn/.*", "q_proj"):
        fields = fields | {"exclude": ("q_proj",)}
    with pytest.raises(ValueError, match=message) as error:
        adapted("decoder", "kaiming-standard", **fields)
    assert "\n" not in str(error.value)


def test_adding_twice_raises(zoo: Any, adapted: Adapted) -> None:
    case = zoo("decoder")
    once = adapted("decoder", "kaiming-standard", targets=("q_proj",))
    with pytest.raises(ValueError, match="self_attn/q_proj has an adapter already; merge it first"):
        add_adapters(once, AdapterConfig(rank=2), layout=case.layout, key=KEY)
    add_adapters(once, AdapterConfig(rank=2, targets=("k_proj",)), layout=case.layout, key=KEY)


def test_factors_that_do_not_fit_raise() -> None:
    layer = {"kernel": jnp.ones((4, 3)), "lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"\(5, 2\).*\(4, 3\)"):
        merged_kernel(layer | {"lora_scale": jnp.float32(1)})


def test_merging_a_transposed_kernel_without_its_layout_raises(zoo: Any, adapted: Adapted) -> None:
    """`...D,FD->...F` with D = F: the shape alone does not reveal that the kernel is transposed."""
    for target in ("square", "query"):
        with pytest.raises(ValueError, match="layout"):
            merged_kernel(adapted("einsums", "kaiming-standard", targets=(target,))[target])


def test_an_adapter_on_a_layer_that_takes_none_raises() -> None:
    module = nn.Conv(4, 3, feature_group_count=2)
    x = jnp.ones((1, 5, 4))
    params = module.init(KEY, x)["params"] | {"lora_a": jnp.ones((3, 2, 2))}
    with pytest.raises(ValueError, match="supports none"):
        adapt(module.apply)({"params": params}, x)
