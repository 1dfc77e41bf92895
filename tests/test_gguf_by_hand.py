"""GGUF files with permuted q and k, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_cases import assert_trees_equal, random_model

from lorax_ft.interop.load import load_model
from lorax_ft.interop.save import save_model
from lorax_ft.models.model import Model
from lorax_ft.tree import flatten


def write_gguf(
    file: Path, model: Model, *, architecture: str = "llama", pre: str = "smollm"
) -> None:
    """A GGUF file as llama.cpp's converter writes it: q and k permuted, matrices in Q8_0."""
    c = model.config
    letters = ["<|end|>", "<|user|>", *(chr(0x21 + i) for i in range(35)), "Ġ", "Ġ1", "ab"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.layer_types[0].rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(letters)
    writer.add_token_types([3, 3] + [1] * (len(letters) - 2))
    writer.add_token_merges(["Ġ 1"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    flat = flatten(model.params)
    names = {
        "o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"{n}_proj": f"attn_{n}" for n in "qkv"} | {
        f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")
    }
    for path, leaf in flat.items():
        if not path.startswith("layers/"):
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[
                path.split("/")[0]
            ]
            writer.add_tensor(f"{name}.weight", np.array(leaf.T if name == "output" else leaf))
            continue
        module = path.split("/")[-2]
        for i, matrix in enumerate(np.array(leaf)):
            matrix = np.ascontiguousarray(matrix.T)
            heads = {"q_proj": c.heads, "k_proj": c.kv_heads}.get(module)
            if heads:
                matrix = matrix.reshape(heads, 2, -1, c.width).swapaxes(1, 2).reshape(matrix.shape)
            writer.add_tensor(f"blk.{i}.{names[module]}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files(tmp_path: Path, tied: bool) -> None:
    model = random_model(tied=tied)
    write_gguf(tmp_path / "model.gguf", model)
    again = load_model(tmp_path / "model.gguf")
    assert again.config == model.config
    assert_trees_equal(again.params, model.params)
    tokenizer = again.tokenizer
    ids = tokenizer("<|user|>A 11").input_ids
    # Digits stand alone: no "Ġ1".
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|user|>",
        "A",
        "Ġ",
        "1",
        "1",
    ]
    assert tokenizer.decode(ids) == "<|user|>A 11"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False) == "A"
    save_model(tmp_path / "folder", again.params, again)
    folder = load_model(tmp_path / "folder")
    assert folder.tokenizer("<|user|>A 11").input_ids == ids
    assert folder.tokenizer.chat_template == tokenizer.chat_template
    assert_trees_equal(folder.params, model.params)


def test_gguf_files_that_are_not_supported(tmp_path: Path) -> None:
    model = random_model()
    write_gguf(tmp_path / "other.gguf", model, architecture="falcon")
    with pytest.raises(
        ValueError,
        match=r"architecture 'falcon'; supported in GGUF: llama, llama with experts, qwen2",
    ):
        load_model(tmp_path / "other.gguf")
    write_gguf(tmp_path / "tokens.gguf", model, pre="falcon")
    with pytest.raises(
        ValueError, match=r"tokenizer gpt2/falcon; supported: gpt2/smollm, gpt2/llama-bpe"
    ):
        load_model(tmp_path / "tokens.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is not a readable GGUF file"):
        load_model(tmp_path / "damaged.gguf")
    with pytest.raises(ValueError, match=r"in .* there is damaged.gguf|there is .*other.gguf"):
        load_model(tmp_path / "othr.gguf")
