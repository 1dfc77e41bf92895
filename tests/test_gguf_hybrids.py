"""GGUF files of models with two kinds of layers, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_cases import assert_trees_equal
from gguf_cases import GEMMA4, QWEN3_5
from test_gguf_files import random_model

from lorax_ft.interop.huggingface import hf_tensors
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save_gguf import save_gguf
from lorax_ft.models.model import Model
from lorax_ft.tree import flatten

LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def in_gguf(name: str) -> str:
    """A Hugging Face tensor's name in GGUF."""
    if name in OTHERS:
        return OTHERS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}"


def checkpoint(model: Model) -> dict[str, np.ndarray]:
    """A model's tensors under Hugging Face's names, in PyTorch's order of axes."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten(model.params).items():
        tensors |= dict(hf_tensors(path, np.asarray(leaf), {}))
    return tensors


def write_file(
    file: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """A file with the keys of a tiny byte-level tokenizer, too."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(["<|end|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


COMMON = {
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
QWEN35_KEYS = COMMON | {
    "block_count": 5,  # with one that predicts the token after the next
    "nextn_predict_layers": 1,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "rope.freq_base": 1e4,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [11, 11, 10, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 192,
    "full_attention_interval": 4,
}


def as_qwen35(name: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor with 6 value heads of 32 channels for 2 key heads, as the converter writes it.

    Value heads 0, 1, 2 belong to key head 0, and 3, 4, 5 to key head 1. llama.cpp repeats the key
    heads as a whole, so that its value heads belong to key heads 0, 1, 0, 1, 0, 1.
    """
    order = [0, 3, 1, 4, 2, 5]
    rows = np.concatenate([np.arange(head * 32, head * 32 + 32) for head in order])
    # 2 · 2 · 32 rows of queries and keys come first.
    mixed = np.concatenate([np.arange(128), 128 + rows])
    if name.endswith("conv1d.weight"):
        return tensor[mixed, 0]
    if name.endswith("in_proj_qkv.weight"):
        return tensor[mixed]
    if name.endswith("in_proj_z.weight"):
        return tensor[rows]
    if name.endswith("out_proj.weight"):
        return tensor[:, rows]
    if name.endswith("A_log"):
        return -np.exp(tensor[order])
    if name.endswith(("in_proj_a.weight", "in_proj_b.weight", "dt_bias")):
        return tensor[order]
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return tensor + 1
    return tensor


@pytest.mark.parametrize(
    "more", [{}, {"attention.recurrent_layers": [True, True, True, False, False]}]
)
def test_qwen3_5(tmp_path: Path, more: dict[str, Any]) -> None:
    model = random_model(QWEN3_5)
    tensors = {in_gguf(n): as_qwen35(n, t) for n, t in checkpoint(model).items()}
    ahead = {
        "blk.4.attn_norm.weight": np.ones(64),
        "blk.4.nextn.eh_proj.weight": np.ones((64, 128)),
    }
    write_file(tmp_path / "given.gguf", "qwen35", QWEN35_KEYS | more, tensors | ahead)
    again = load_model(tmp_path / "given.gguf")
    assert again.config == model.config
    assert again.hf_config["rope_parameters"]["mrope_section"] == [11, 11, 10]
    for path, leaf in flatten(model.params).items():
        np.testing.assert_allclose(flatten(again.params)[path], leaf, atol=1e-6, err_msg=path)

    save_gguf(tmp_path / "ours.gguf", model.params, model, kind="F16")
    assert_same_tensors(tmp_path / "ours.gguf", tensors)
    ours = {"block_count": 4, "attention.recurrent_layers": [True, True, True, False]}
    expected = QWEN35_KEYS | ours
    del expected["nextn_predict_layers"]
    assert_same_keys(tmp_path / "ours.gguf", "qwen35", expected)


GEMMA4_KEYS = COMMON | {
    "block_count": 6,
    "attention.head_count_kv": [2, 2, 1, 2, 2, 1],
    "attention.key_length": 64,
    "attention.value_length": 64,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "attention.sliding_window": 8,
    "attention.sliding_window_pattern": [True, True, False] * 2,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "final_logit_softcapping": 9.0,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count": 64,
    "rope.dimension_count_swa": 32,
}
# A quarter of 32 pairs rotates.
ROPE_FREQS = {"rope_freqs.weight": np.array([1.0] * 8 + [1e30] * 24)}


def test_gemma4(tmp_path: Path) -> None:
    model = random_model(GEMMA4)
    tensors = {in_gguf(n): t for n, t in checkpoint(model).items()} | ROPE_FREQS
    write_file(tmp_path / "given.gguf", "gemma4", GEMMA4_KEYS, tensors)
    again = load_model(tmp_path / "given.gguf")
    assert again.config == model.config
    assert_trees_equal(again.params, model.params)

    save_gguf(tmp_path / "ours.gguf", model.params, model, kind="F16")
    assert_same_tensors(tmp_path / "ours.gguf", tensors)
    assert_same_keys(tmp_path / "ours.gguf", "gemma4", GEMMA4_KEYS)


def assert_same_keys(file: Path, architecture: str, expected: Mapping[str, Any]) -> None:
    """The architecture's keys; the vocabulary's size is ours alone, which llama.cpp may read."""
    prefix = f"{architecture}."
    found = {}
    for key, field in gguf.GGUFReader(file).fields.items():
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = field.contents()
    del found["vocab_size"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key


def assert_same_tensors(file: Path, expected: Mapping[str, np.ndarray]) -> None:
    """The values, in float32 where llama.cpp reads no other."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
        if "ssm_conv1d" in name or "norm" in name:
            assert tensor.tensor_type.name == "F32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_length_per_layer_input": 8}, "embeddings for each layer, as in E2B and E4B"),
        ({"attention.shared_kv_layers": 2}, "layers that share keys and values"),
        ({"expert_count": 4}, "has the architecture 'gemma4 with experts'"),
        ({"feed_forward_length": [96] * 5 + [192]}, "has 2 values in feed_forward_length"),
        (
            {"attention.head_count_kv": [2, 2, 1, 2, 2, 2]},
            "has 2 values in attention.head_count_kv",
        ),
    ],
)
def test_gemma4_files_that_are_not_read(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "given.gguf"
    tensors = ROPE_FREQS | {"token_embd.weight": np.zeros((3, 64))}
    write_file(file, "gemma4", GEMMA4_KEYS | changes, tensors)
    with pytest.raises(ValueError, match=message):
        load_model(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            QWEN3_5 | {"linear_value_head_dim": 64},
            "(qwen3_5_text) has linear_key_head_dim 32 and linear_value_head_dim 64",
        ),
        (QWEN3_5 | {"rms_norm_eps": 1e-5}, "(qwen3_5_text) has rms_norm_eps 1e-05"),
        (QWEN3_5 | {"attention_bias": True}, "(qwen3_5_text) has biases = "),
        (GEMMA4 | {"attention_bias": True}, "(gemma4_text) has biases = "),
        (GEMMA4 | {"hidden_activation": "gelu"}, "(gemma4_text) has activation = gelu"),
        (
            GEMMA4
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "(gemma4_text) has rope_type 'linear' in full attention",
        ),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    model = random_model(fields)
    with pytest.raises(ValueError, match="write a folder instead") as error:
        save_gguf(tmp_path / "model.gguf", model.params, model, kind="F16")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())
