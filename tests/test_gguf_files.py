"""GGUF round trips for every family and tokenizer type, without llama.cpp."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_cases import FAMILIES, SENTENCEPIECE, SIZES, by_score, texts, tokenizer_keys

from lorax_ft.config import EMBEDDED_MODEL
from lorax_ft.interop.gguf_tokenizer import read_tokenizer
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save_gguf import save_gguf
from lorax_ft.models.model import LoadedModel, Model, abstract_params
from lorax_ft.tree import flatten, unflatten


def random_model(fields: dict[str, Any], tokenizer: Any = None) -> Model:
    """A model whose weights are exact in float16."""
    tokenizer = tokenizer or load_model(EMBEDDED_MODEL).tokenizer
    fields = (
        SIZES
        | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        | fields
    )
    config = decoder_config(fields, source="these tests")
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(
            rng.normal(float(path.endswith("scale") and not config.norm_offset), 0.2, leaf.shape),
            "f2",
        )
        for path, leaf in flatten(abstract_params(config)).items()
    }
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), unflatten(params))
    return LoadedModel(config=config, params=params, hf_config=fields, tokenizer=tokenizer)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", FAMILIES)
def test_there_and_back(tmp_path: Path, case: str) -> None:
    model = random_model(FAMILIES[case])
    save_gguf(tmp_path / "model.gguf", model.params, model, kind="F16")
    again = load_model(tmp_path / "model.gguf")
    assert dataclasses.replace(again.config, layer_types=model.config.layer_types) == model.config
    assert flatten(again.params).keys() == flatten(model.params).keys()
    for path, leaf in flatten(again.params).items():
        np.testing.assert_allclose(
            leaf, flatten(model.params)[path], atol=1e-6 if model.config.norm_offset else 0
        )
    tokens = jnp.arange(3, 43)[None]
    for positions in (None, tokens + 300):
        ours, theirs = (m.apply({"params": m.params}, tokens, positions) for m in (model, again))
        np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4)


def test_the_tensors_of_gpt_oss_have_llama_cpps_names(tmp_path: Path) -> None:
    model = random_model(FAMILIES["gpt_oss"])
    save_gguf(tmp_path / "model.gguf", model.params, model, kind="Q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    known = set()
    for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT_OSS]:
        name = gguf.TENSOR_NAMES[tensor]
        known |= {name.format(bid=layer) for layer in range(3)}
    assert {name.rpartition(".")[0] for name in tensors} == known
    # Vectors are exact, the biases of several experts too.
    exact = {name for name, tensor in tensors.items() if tensor.tensor_type.name == "F32"}
    assert {"blk.0.ffn_up_exps.bias", "blk.0.attn_sinks.weight", "blk.0.attn_q.bias"} <= exact


def test_llama3_is_recognized(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama3"])
    save_gguf(tmp_path / "model.gguf", model.params, model)
    again = load_model(tmp_path / "model.gguf")
    assert again.config == model.config
    assert again.hf_config["rope_parameters"] == model.hf_config["rope_parameters"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "(mistral) has layer_types = "),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "(smollm3) has layer_types = "),
        (
            FAMILIES["gemma2"] | {"query_pre_attn_scalar": 24},
            "(gemma2) has attention_scale = 0.204",
        ),
        (FAMILIES["qwen3_moe"] | {"norm_topk_prob": False}, "(qwen3_moe) has experts = "),
        (FAMILIES["gpt_oss"] | {"attention_bias": False}, "(gpt_oss) has biases = "),
        (FAMILIES["gpt_oss"] | {"swiglu_limit": 3.0}, "(gpt_oss) has clamped_gate = "),
        (
            FAMILIES["gpt_oss"] | {"layer_types": ["full_attention"] * 3},
            "(gpt_oss) has layer_types = ",
        ),
        (
            {"model_type": "qwen2", "rope_parameters": FAMILIES["llama3"]["rope_parameters"]},
            "(qwen2) has layer_types = ",
        ),
        (
            {"model_type": "llama", "hidden_act": "gelu"},
            "(llama) has activation = gelu, which llama.cpp's llama does",
        ),
    ],
)
def test_what_a_file_cannot_say_is_not_written(tmp_path: Path, fields: dict, message: str) -> None:
    model = random_model(fields)
    with pytest.raises(ValueError, match="does not support; write a folder instead") as error:
        save_gguf(tmp_path / "model.gguf", model.params, model, kind="F16")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_head_that_llama_cpp_has_not(tmp_path: Path) -> None:
    model = random_model(FAMILIES["gemma"])
    params = model.params | {"lm_head": {"kernel": model.params["embed_tokens"]["embedding"].T + 1}}
    with pytest.raises(ValueError, match=r"the head is tuned, and llama\.cpp's gemma has none"):
        save_gguf(tmp_path / "model.gguf", params, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "olmo2.attention.sliding_window",
            8,
            "olmo2.attention.sliding_window = 8, which is not supported",
        ),
        ("olmo2.rope.scaling.type", "longrope", "rotary scaling longrope"),
        ("split.count", 2, "is one of 2 files; join them with"),
        (
            "olmo2.expert_count",
            4,
            "architecture 'olmo2 with experts'; supported in GGUF: llama, llama with experts",
        ),
    ],
)
def test_what_is_not_known_is_not_read(tmp_path: Path, key: str, value: Any, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "olmo2")
    for name in (
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
    ):
        writer.add_uint32(f"olmo2.{name}", 1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((1, 1), np.float32))
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model.gguf (has|is) ") as error:
        load_model(tmp_path / "model.gguf")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece(tmp_path: Path, kind: str) -> None:
    keys = tokenizer_keys(kind)
    tokenizer = read_tokenizer(keys)
    family = "gemma4" if kind == "gemma4" else "llama"
    model = random_model(FAMILIES[family], tokenizer)
    save_gguf(tmp_path / "model.gguf", model.params, model)
    tokenizer.save_pretrained(tmp_path / "folder")
    again, folder = (
        load_model(tmp_path / "model.gguf").tokenizer,
        type(tokenizer).from_pretrained(tmp_path / "folder"),
    )
    for text in texts():
        ids = [1, *by_score(text, keys)]
        assert tokenizer(text).input_ids == again(text).input_ids == folder(text).input_ids == ids
        if "<" not in text:
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_first_token_that_is_not_said() -> None:
    for kind, first in (("llama", [1]), ("llama-bpe", [1]), ("qwen2", [])):
        keys = tokenizer_keys(kind)
        assert read_tokenizer(keys)("").input_ids == [1]
        del keys["tokenizer.ggml.add_bos_token"]
        assert read_tokenizer(keys)("").input_ids == first
