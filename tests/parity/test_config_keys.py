"""Keys of config.json that transformers ignores in a family change no logits here. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from test_transformers import (  # noqa: E402
    CASES,
    TOKENS,
    assert_same_logits,
    checkpoint,
    reference,
)

from lorax_ft.interop.families import FAMILIES  # noqa: E402
from lorax_ft.interop.families.family import OPTIONAL_KEYS  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402

# Each would change the logits where it is heeded.
KEYS: dict[str, Any] = {
    "attention_bias": True,
    "attention_multiplier": 3.0,
    "attn_logit_softcapping": 0.5,
    "embedding_multiplier": 2.0,
    "final_logit_softcapping": 0.5,
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "logit_scale": 0.5,
    "max_window_layers": 0,
    "mlp_bias": True,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 8,
    "no_rope_layers": [0, 0, 0],
    "norm_topk_prob": True,
    "num_experts_per_tok": 1,
    "original_max_position_embeddings": 8,
    "partial_rotary_factor": 0.5,
    "query_pre_attn_scalar": 3,
    "residual_multiplier": 2.0,
    "rope_local_base_freq": 10.0,
    "sliding_window": 4,
    "use_bidirectional_attention": True,
    "use_sliding_window": True,
}


def others_keys(case: str) -> dict[str, Any]:
    """`KEYS` without those that the config class of the case's family declares as its own."""
    config_class = transformers.CONFIG_MAPPING[CASES[case]["model_type"]]
    own = config_class().to_dict()
    # With a scaling, transformers fails on a part of a head, and so do we.
    rope = CASES[case].get("rope_parameters", {})
    of_types = [value for value in rope.values() if isinstance(value, dict)]
    if any(one.get("rope_type", "default") != "default" for one in [rope, *of_types]):
        own["partial_rotary_factor"] = None
    # There it asks for the window of a Ministral.
    if case == "mistral_without_window":
        own["layer_types"] = None
    keys = {key: value for key, value in KEYS.items() if key not in own}
    layers = CASES[case].get("num_hidden_layers", 3)
    if "layer_types" in keys:
        keys["layer_types"] = (keys["layer_types"] * 2)[:layers]
    return keys


@pytest.mark.parametrize("case", CASES)
def test_left_over_keys(tmp_path: Path, case: str) -> None:
    checkpoint(tmp_path, case)
    file = tmp_path / "config.json"
    keys = others_keys(case)
    assert keys
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours = load_model(tmp_path)
    # Its cache, though not its model, fails on layers of types that it has no window for.
    assert_same_logits(
        ours.apply({"params": ours.params}, jnp.asarray(TOKENS)),
        reference(theirs, TOKENS, use_cache=False),
        case,
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_heeds_the_keys_that_its_config_declares(model_type: str) -> None:
    declared = set(transformers.CONFIG_MAPPING[model_type]().to_dict())
    if model_type == "mistral":
        declared.add("layer_types")  # of a Ministral
    assert FAMILIES[model_type].keys == OPTIONAL_KEYS & declared


def test_what_transformers_fails_on_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama_linear")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, said in (
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 with rope_type 'linear'"),
        ({"is_causal": False}, "is_causal False; supported: True"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path)
