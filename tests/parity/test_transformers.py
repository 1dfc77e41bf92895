"""Our logits are those of transformers' LlamaForCausalLM, and it loads what we write. Needs torch."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from lorax_ft.interop.huggingface import save_model  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CASES = {
    "tied_grouped": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one_key_head": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "wide_heads": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 21))


def checkpoint(folder: Path, case: str = "tied_grouped", **options: object) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **CASES[case], initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.normal_(1, 0.3)
    model.save_pretrained(folder, **options)
    return model


def reference(model: torch.nn.Module, tokens: np.ndarray, **options: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path: Path, case: str) -> None:
    theirs = checkpoint(tmp_path / "model", case)
    ours = load_model(tmp_path / "model")
    logits = ours.apply({"params": ours.params}, jnp.asarray(TOKENS))
    expected = reference(theirs, TOKENS)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "model")
    np.testing.assert_allclose(
        ours.apply({"params": ours.params}, jnp.asarray(TOKENS)), reference(theirs, TOKENS), atol=1e-4, rtol=1e-4
    )
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "model")


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path / "float32").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = load_model(tmp_path / "model")
    np.testing.assert_allclose(
        ours.apply({"params": ours.params}, jnp.asarray(TOKENS)), reference(theirs, TOKENS), atol=1e-4, rtol=1e-4
    )


def test_right_padding(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    lengths = np.array([21, 9])
    mask = np.arange(21) < lengths[:, None]
    expected = reference(theirs, TOKENS, attention_mask=torch.as_tensor(mask.astype(int)))
    logits = ours.apply({"params": ours.params}, jnp.asarray(TOKENS), None, jnp.asarray(mask, jnp.int32))
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_packed_samples_are_as_separate_ones(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    lengths = (8, 10)  # and 3 tokens of padding
    segments = np.repeat([1, 2, 0], [*lengths, 3])[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])[None]
    logits = ours.apply({"params": ours.params}, jnp.asarray(TOKENS[:1]), jnp.asarray(positions), jnp.asarray(segments))
    first, second = TOKENS[:1, :8], TOKENS[:1, 8:18]
    np.testing.assert_allclose(logits[:, :8], reference(theirs, first), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(logits[:, 8:18], reference(theirs, second), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_write(tmp_path: Path, case: str) -> None:
    theirs = checkpoint(tmp_path / "model", case)
    ours = load_model(tmp_path / "model")
    save_model(tmp_path / "again", ours.params, ours)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(reference(again, TOKENS), reference(theirs, TOKENS))
    assert again.config.rope_parameters == theirs.config.rope_parameters
    save_model(tmp_path / "half", ours.params, ours, dtype="bfloat16")
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_transformers_loads_an_untied_model(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", "tied_grouped")
    ours = load_model(tmp_path / "model")
    params = ours.params | {"lm_head": {"kernel": ours.params["embed_tokens"]["embedding"].T + 0.1}}
    save_model(tmp_path / "again", params, ours)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    logits = ours.apply({"params": params}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, reference(again, TOKENS), atol=1e-4, rtol=1e-4)
