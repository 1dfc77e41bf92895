"""Soft prompts keep their logits from here to PEFT and back. Needs torch and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft_logits import TOKENS, sparse_checkpoint, their_logits, train_a_little  # noqa: E402

import lorax_ft as lft  # noqa: E402
from lorax_ft.soft_prompts import encoder  # noqa: E402
from lorax_ft.soft_prompts.door import KEY, PROMPT, virtual_ids, virtual_tokens  # noqa: E402
from lorax_ft.tree import Tree, flatten  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
VIRTUAL = 5
THEIRS: dict[str, Any] = {
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "p_tuning_lstm": peft.PromptEncoderConfig,
    "prefix_tuning": peft.PrefixTuningConfig,
    "prefix_tuning_projected": peft.PrefixTuningConfig,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "p_tuning": {"encoder_hidden_size": 7},
    "p_tuning_lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7},
    "prefix_tuning_projected": {"prefix_projection": True, "encoder_hidden_size": 9},
}
OURS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"kind": "prompt"},
    "p_tuning": {"kind": "prompt", "encoder": "mlp"},
    "p_tuning_lstm": {"kind": "prompt", "encoder": "lstm", "encoder_width": 6},
    "prefix_tuning": {"kind": "prefix"},
    "prefix_tuning_projected": {"kind": "prefix", "encoder": "mlp"},
}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "gemma2": transformers.Gemma2Config,
    "qwen3": transformers.Qwen3Config,
}


def checkpoint(folder: Path, family: str) -> Path:
    if family == "mixtral":
        return sparse_checkpoint(folder, family)
    torch.manual_seed(0)
    config = CONFIGS[family](
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        sliding_window=6,
        attn_implementation="eager",
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def ours_of(model: Any, params: Tree) -> np.ndarray:
    count = virtual_tokens(params)
    ids = np.tile(virtual_ids(count, vocab_size=61), (len(TOKENS), 1))
    tokens = jnp.asarray(np.concatenate([ids, TOKENS], axis=1))
    return np.asarray(model.apply({"params": params}, tokens))[:, count:]


def last(logits: np.ndarray) -> np.ndarray:
    """The logits of the tokens; PEFT's of a prompt have those of the virtual tokens too."""
    return logits[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral"])
@pytest.mark.parametrize("name", THEIRS)
def test_peft_loads_ours(name: str, family: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", family)
    model = lft.load_model(folder)
    start = lft.PromptConfig(virtual_tokens=VIRTUAL, **OURS[name])
    params = lft.add_soft_prompt(model.params, start, model, key=jax.random.key(0))
    lft.save_peft(tmp_path / "adapter", params, model)
    base = theirs_of(folder)
    plain = their_logits(base)
    expected = last(their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")))
    assert np.abs(expected - plain).max() > 0.05
    for tree in (params, lft.load_peft(tmp_path / "adapter", model)):
        np.testing.assert_allclose(ours_of(model, tree), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "method"),
    [("prompt_tuning", "lora"), ("p_tuning", "ia3"), ("prefix_tuning", "shira")],
)
def test_peft_loads_a_prompt_on_the_merged_adapter(name: str, method: Any, tmp_path: Path) -> None:
    """As the card says, since PEFT holds one of the two at a time."""
    folder = checkpoint(tmp_path / "model", "llama")
    model = lft.load_model(folder)
    start = lft.PromptConfig(virtual_tokens=VIRTUAL, **OURS[name])
    key = jax.random.key(0)
    params = lft.add_soft_prompt(model.params, start, model, key=key)
    adapters = lft.AdapterConfig(method=method)
    params = lft.add_adapters(params, adapters, layout=model.layout, key=key)
    trained, frozen = lft.partition(params)
    params = lft.combine(jax.tree.map(lambda leaf: leaf + 0.05, trained), frozen)
    adapter = tmp_path / "adapter"
    lft.save_peft(adapter, params, model)
    card = (adapter / "README.md").read_text()
    # transformers' default attention is as exact here, so that the card's own lines run.
    lines = card.partition("```python\n")[2].partition("```")[0].splitlines()
    shown = [line for line in lines if not line.startswith("tokenizer = ")]
    names: dict[str, Any] = {}
    exec("\n".join(shown).replace('adapter = "."', f"adapter = {str(adapter)!r}"), names)
    expected = last(their_logits(names["model"]))
    alone = peft.PeftModel.from_pretrained(theirs_of(folder), adapter)
    assert np.abs(expected - their_logits(alone)).max() > 0.05
    np.testing.assert_allclose(ours_of(model, params), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_theirs(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "llama")
    config = THEIRS[name](
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **OPTIONS.get(name, {})
    )
    torch.manual_seed(2)
    tuned = peft.get_peft_model(theirs_of(folder), config)
    train_a_little(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = last(their_logits(tuned))
    model = lft.load_model(folder)
    params = lft.load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(ours_of(model, params), expected, atol=1e-4, rtol=1e-4)
    # Our generation, with a cache, takes the likeliest token of PEFT's whole forward each time.
    # With its cache PEFT's own `generate` gives other tokens than its forward (peft 0.21.2 on
    # transformers 5.24, which ignores the prefix).
    text = TOKENS[:1, :6]
    for _ in range(6):
        best = their_logits(tuned, text)[:, -1:].argmax(-1)
        text = np.concatenate([text, best], axis=1)
    found = lft.generate(model, params, [text[0, :6]], max_new_tokens=6, stop_ids=())
    assert found[0] == text[0, 6:].tolist()


def test_our_encoders_compute_what_pefts_do() -> None:
    """The same weights give the same prompt, for P-tuning's MLP and LSTM and for a projection."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": VIRTUAL,
        "num_transformer_submodules": 1,
        "num_attention_heads": 2,
        "num_layers": 3,
    }
    for kind in ("MLP", "LSTM"):
        config = peft.PromptEncoderConfig(
            token_dim=8,
            encoder_hidden_size=6,
            encoder_reparameterization_type=kind,
            **common,
        )
        theirs = peft.PromptEncoder(config)
        expected = theirs(torch.arange(VIRTUAL)[None])[0].detach().numpy()
        layer = mlp_leaves(theirs) if kind == "MLP" else lstm_leaves(theirs)
        (found,) = flatten(encoder.encoded({"door": layer})).values()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    config = peft.PrefixTuningConfig(
        token_dim=8, encoder_hidden_size=6, prefix_projection=True, **common
    )
    projected = peft.PrefixEncoder(config)
    expected = projected(torch.arange(VIRTUAL)[None])[0].detach().numpy()
    first, _, second = projected.transform
    shape = (3, 2, 2, 4)
    layer = {
        encoder.ENCODER_INPUT: array(projected.embedding.weight),
        "encoder_kernel_0": array(first.weight).T,
        "encoder_bias_0": array(first.bias),
        "encoder_to_prefix": array(second.weight).T.reshape(6, *shape),
        "encoder_prefix_bias": array(second.bias).reshape(shape),
    }
    found = encoder.encoded({"door": layer})["door"]
    table = expected.reshape(VIRTUAL, *shape)  # [V, L, 2, K, C]
    for place, name in enumerate((KEY, "prefix_value")):
        known = np.moveaxis(table[:, :, place], 1, 0)
        np.testing.assert_allclose(found[name], known, atol=1e-5)
    assert PROMPT not in found


def array(tensor: Any) -> np.ndarray:
    value: np.ndarray = tensor.detach().numpy()
    return value


def mlp_leaves(theirs: Any) -> Tree:
    first, _, second, _, third = theirs.mlp_head
    layer = {encoder.ENCODER_INPUT: array(theirs.embedding.weight)}
    for number, linear in enumerate((first, second)):
        layer[f"encoder_kernel_{number}"] = array(linear.weight).T
        layer[f"encoder_bias_{number}"] = array(linear.bias)
    return layer | {
        "encoder_to_prompt": array(third.weight).T,
        "encoder_prompt_bias": array(third.bias),
    }


def lstm_leaves(theirs: Any) -> Tree:
    layer = {encoder.ENCODER_INPUT: array(theirs.embedding.weight)}
    lstm = theirs.lstm_head
    for number in (0, 1):
        for ours, kind in (("input", "ih"), ("hidden", "hh")):
            parts = [getattr(lstm, f"weight_{kind}_l{number}{end}") for end in ("", "_reverse")]
            layer[f"lstm_{ours}_{number}"] = np.stack([array(part).T for part in parts])
        biases = []
        for end in ("", "_reverse"):
            both = [getattr(lstm, f"bias_{kind}_l{number}{end}") for kind in ("ih", "hh")]
            biases.append(array(both[0]) + array(both[1]))
        layer[f"lstm_bias_{number}"] = np.stack(biases)
    first, _, second = theirs.mlp_head
    return layer | {
        "encoder_kernel_0": array(first.weight).T,
        "encoder_bias_0": array(first.bias),
        "encoder_to_prompt": array(second.weight).T,
        "encoder_prompt_bias": array(second.bias),
    }
