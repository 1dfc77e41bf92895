"""Logits equal transformers' for every family, and it loads our checkpoints. Needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.save import save_model  # noqa: E402
from lorax_ft.models.mlp import router_loss  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [2.0, 3.0, 4.0],
    "partial_rotary_factor": 0.75,
}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "num_hidden_layers": 4}
QWEN3_5 = {
    # With 0.2, transformers in float32 is off by up to 6e-4 of itself in float64.
    "initializer_range": 0.1,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e4,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "sliding_window": 8,
    "rope_parameters": YARN | {"truncate": False},
    "swiglu_limit": 2.0,
}
CASES: dict[str, dict[str, Any]] = {
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_one_key_head": {"model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama_wide_heads": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "llama_yarn": {"model_type": "llama", "head_dim": 16, "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "mistral_without_window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_upper_windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "qwen3_5": {"model_type": "qwen3_5_text", **QWEN3_5},
    "qwen3_5_grouped_values": {
        "model_type": "qwen3_5_text",
        **QWEN3_5,
        "num_hidden_layers": 8,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 8,
        "tie_word_embeddings": True,
    },
    "qwen3_5_no_period": {
        "model_type": "qwen3_5_text",
        **QWEN3_5,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        **GEMMA,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        **GEMMA,
    },
    "gemma4": GEMMA4,
    "gemma4_options": {
        **GEMMA4,
        "attention_k_eq_v": False,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": "vision",
        "layer_types": ["full_attention"] + ["sliding_attention"] * 4 + ["full_attention"],
        "hidden_activation": "gelu",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gpt_oss": GPT_OSS,
    "gpt_oss_options": {
        **GPT_OSS,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "swiglu_alpha": 1.2,
        "swiglu_limit": 1.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "num_experts_per_tok": 1,
        "rms_norm_eps": 1e-3,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 8},
    "phi4_mini": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_parameters": LONGROPE,
        "tie_word_embeddings": True,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "olmo2": {"model_type": "olmo2"},
}
LLAMAS = ["llama_tied", "llama_untied", "llama_wide_heads"]
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 21))


def checkpoint(
    folder: Path, case: str = "llama_tied", *, original: int | None = None, **options: object
) -> torch.nn.Module:
    torch.manual_seed(0)
    fields = (
        SIZES | CASES[case] | ({"original_max_position_embeddings": original} if original else {})
    )
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith(("bias", "sinks")):
            weight.data.normal_(float("norm" in name), 0.3)
        if name.endswith("A_log"):
            # Decays as of trained models. With random ones, transformers is itself off by 1e-4.
            weight.data.normal_(-2, 0.5)
    for name, number in model.named_buffers():
        if name.endswith("layer_scalar"):
            number.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **options)
    return model


def reference(model: torch.nn.Module, tokens: np.ndarray, **options: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options).logits.float().numpy()


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray, case: str) -> None:
    """Equal within 1e-4; of linear attention, whose norms divide by small numbers, within 5e-4.

    There transformers in float32 is 3e-5 away from itself in float64, and more on some processors.
    """
    atol = 5e-4 if case.startswith("qwen3_5") else 1e-4
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, case: str) -> None:
    theirs = checkpoint(tmp_path / "model", case)
    ours = load_model(tmp_path / "model")
    apply = jax.jit(lambda *inputs: ours.apply({"params": ours.params}, *inputs))
    expected = reference(theirs, TOKENS)
    assert np.abs(expected).max() > 1
    assert_same_logits(apply(TOKENS), expected, case)
    far = np.broadcast_to(np.arange(2000, 2021), TOKENS.shape)
    expected = reference(theirs, TOKENS, position_ids=torch.as_tensor(far.copy()))
    assert_same_logits(apply(TOKENS, far), expected, case)
    padding = np.arange(21) < np.array([21, 9])[:, None]
    expected = reference(theirs, TOKENS, attention_mask=torch.as_tensor(padding.astype(int)))
    padded = np.asarray(apply(TOKENS, None, padding.astype(int)))
    assert_same_logits(padded[padding], expected[padding], case)
    positions = np.broadcast_to(np.concatenate([np.arange(8), np.arange(13)]), TOKENS.shape)
    segments = np.broadcast_to(np.repeat([1, 2], [8, 13]), TOKENS.shape)
    expected = np.concatenate(
        [reference(theirs, part) for part in (TOKENS[:, :8], TOKENS[:, 8:])], axis=1
    )
    assert_same_logits(apply(TOKENS, positions, segments), expected, case)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_router_loss(tmp_path: Path, case: str) -> None:
    """The load-balancing loss without and with padding, at different loads of the experts."""
    theirs = checkpoint(tmp_path / "model", case)
    ours = load_model(tmp_path / "model")

    @jax.jit
    def router_loss_of(tokens: jax.Array, real: jax.Array) -> jax.Array:
        _, usages = ours.features_and_usage(ours.params, tokens, counted=real)
        return router_loss(usages)

    for lengths in ([21, 21], [21, 9]):
        real = np.arange(21) < np.array(lengths)[:, None]
        with torch.no_grad():
            result = theirs(
                torch.as_tensor(TOKENS),
                attention_mask=torch.as_tensor(real.astype(int)),
                labels=torch.as_tensor(TOKENS),
                output_router_logits=True,
            )
        np.testing.assert_allclose(router_loss_of(TOKENS, real), result.aux_loss, rtol=1e-5)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "model")
    np.testing.assert_allclose(
        ours.apply({"params": ours.params}, jnp.asarray(TOKENS)),
        reference(theirs, TOKENS),
        atol=1e-4,
        rtol=1e-4,
    )
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "model")


def test_transformers_loads_our_shards(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "model", "llama_untied")
    ours = load_model(tmp_path / "model")
    save_model(tmp_path / "again", ours.params, ours, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "again" / name).stat().st_size < 25_000 for name in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    np.testing.assert_array_equal(reference(again, TOKENS), reference(theirs, TOKENS))
    assert again.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float32").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    ours = load_model(tmp_path / "model")
    np.testing.assert_allclose(
        ours.apply({"params": ours.params}, jnp.asarray(TOKENS)),
        reference(theirs, TOKENS),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_write(tmp_path: Path, case: str) -> None:
    theirs = checkpoint(tmp_path / "model", case)
    ours = load_model(tmp_path / "model")
    save_model(tmp_path / "again", ours.params, ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    np.testing.assert_array_equal(reference(again, TOKENS), reference(theirs, TOKENS))
    assert again.config.to_dict() | {
        "dtype": None,
        "_name_or_path": None,
    } == theirs.config.to_dict() | {
        "dtype": None,
        "_name_or_path": None,
    }
    save_model(tmp_path / "half", ours.params, ours, dtype="bfloat16")
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    )


def test_transformers_loads_an_untied_model(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", "llama_tied")
    ours = load_model(tmp_path / "model")
    params = ours.params | {"lm_head": {"kernel": ours.params["embed_tokens"]["embedding"].T + 0.1}}
    save_model(tmp_path / "again", params, ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    logits = ours.apply({"params": params}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, reference(again, TOKENS), atol=1e-4, rtol=1e-4)
