"""llama.cpp reads our GGUF files and gives our logits; we read every block format.

Needs llama-cpp-python.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_cases import FAMILIES, GEMMA4, SENTENCEPIECE, SIZES, texts, tokenizer_keys

from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig
from lorax_ft.interop.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.new_tokens import add_tokens
from lorax_ft.interop.save_gguf import save_gguf
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.models.trainable_tokens import add_trainable_tokens
from lorax_ft.tree import flatten, unflatten

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
QUESTION = (
    "<|im_start|>user\nTom has {} apples. He buys 5 more. How many has he now?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("kind", "new"), [("F16", ()), ("Q8_0", ()), ("F16", ("apples", "How many"))]
)
def test_llama_cpp_answers_as_we_do(tmp_path: Path, kind: Any, new: tuple[str, ...]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = load_model(EMBEDDED_MODEL)
    params = model.params
    if new:
        model = add_tokens(model, new)
        ids = model.tokenizer.convert_tokens_to_ids(list(new))
        params = add_trainable_tokens(model.params, ids, model)
    config = AdapterConfig(rank=4, init="pissa")
    params = add_adapters(params, config, layout=model.layout, key=jax.random.key(0))
    save_gguf(tmp_path / "tiny.gguf", params, model, kind=kind)
    ours = load_model(tmp_path / "tiny.gguf")  # with the same rounding
    theirs = llama_cpp.Llama(str(tmp_path / "tiny.gguf"), n_ctx=256, verbose=False, logits_all=True)
    for number in range(10, 90, 20):
        text = QUESTION.format(number)
        ids = ours.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        theirs.reset()
        theirs.eval(ids)
        expected = np.array(theirs.scores[: len(ids)])
        logits = np.asarray(ours.apply({"params": ours.params}, jnp.asarray(ids)[None])[0])
        # llama.cpp rounds activations too.
        assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "file_type"), [("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 7), ("Q4_K", 15), ("Q6_K", 18)]
)
def test_blocks_that_llama_cpp_makes(tmp_path: Path, kind: str, file_type: int) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = load_model(EMBEDDED_MODEL).tokenizer
    config = decoder_config(HF_CONFIG, source="these tests")
    rng = np.random.default_rng(0)
    shapes = flatten(abstract_params(config))
    params = unflatten(
        {
            p: jnp.asarray(rng.normal(float(p.endswith("scale")), 0.1, s.shape), jnp.float32)
            for p, s in shapes.items()
        }
    )
    model = LoadedModel(config=config, params=params, hf_config=HF_CONFIG, tokenizer=tokenizer)
    plain, packed = tmp_path / "plain.gguf", tmp_path / "packed.gguf"
    save_gguf(plain, params, model, kind="F16")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = file_type
    assert (
        llama_cpp.llama_model_quantize(
            str(plain).encode(), str(packed).encode(), ctypes.byref(options)
        )
        == 0
    )
    assert kind in {tensor.tensor_type.name for tensor in gguf.GGUFReader(packed).tensors}
    ours = load_model(packed)
    ids = list(range(20, 60))
    theirs = llama_cpp.Llama(str(packed), n_ctx=64, verbose=False, logits_all=True)
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    logits = np.asarray(ours.apply({"params": ours.params}, jnp.asarray(ids)[None])[0])
    plain_logits = np.asarray(model.apply({"params": params}, jnp.asarray(ids)[None])[0])
    # llama.cpp rounds activations too.
    assert np.abs(logits - expected).mean() < 0.02 * np.abs(expected).max()
    if kind.startswith("Q4"):  # unless the rounding of the blocks is larger
        assert np.abs(plain_logits - expected).mean() > 3 * np.abs(logits - expected).mean()


@pytest.mark.parametrize("case", FAMILIES)
def test_families(tmp_path: Path, case: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    # For names with phi3, llama.cpp expects SentencePiece.
    tmp_path = tmp_path.parent / case.replace("phi", "fi")
    expected = transformers_logits(tmp_path / "model", FAMILIES[case])
    model = load_model(tmp_path / "model")
    save_gguf(tmp_path / "model.gguf", model.params, model, kind="F16")
    again = load_model(tmp_path / "model.gguf")
    logits = np.asarray(again.apply({"params": again.params}, jnp.asarray(IDS)[None])[0])
    theirs = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=128, verbose=False, logits_all=True, type_k=0, type_v=0
    )
    theirs.eval(IDS)
    scores = np.array(theirs.scores[: len(IDS)])
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    # llama.cpp rounds activations.
    assert np.abs(scores - expected).max() < 0.01 * np.abs(expected).max()


IDS = np.random.default_rng(0).integers(4, 700, 40).tolist()


def transformers_logits(folder: Path, fields: dict[str, Any]) -> np.ndarray:
    """The logits of a random model that is exact in float16; it is saved to the folder."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    tokenizer = load_model(EMBEDDED_MODEL).tokenizer
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = SIZES | {"vocab_size": len(tokenizer)} | ids | fields
    config = transformers.CONFIG_MAPPING[fields["model_type"]](
        **{k: v for k, v in fields.items() if k != "model_type"}
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    # These multiply by 1 + scale.
    has_offset = fields["model_type"] in ("gemma", "gemma2", "gemma3_text", "qwen3_5_text")
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith(("bias", "A_log")):
            weight.data.normal_(float("norm" in name and not has_offset), 0.3)
        weight.data = weight.data.half().float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return model(torch.as_tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("kind", [*PRE_TOKENIZERS, *SENTENCEPIECE])
def test_tokenizers(tmp_path: Path, kind: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = read_tokenizer(tokenizer_keys(kind))
    family = SIZES | GEMMA4 if kind == "gemma4" else HF_CONFIG
    fields = family | {"vocab_size": len(tokenizer)}
    config = decoder_config(fields, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config))
    model = LoadedModel(config=config, params=params, hf_config=fields, tokenizer=tokenizer)
    save_gguf(tmp_path / "model.gguf", params, model)
    again = load_model(tmp_path / "model.gguf").tokenizer
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    # llama.cpp simplifies the pre-tokenizer rules there.
    for text in texts(accented=kind not in ("tekken", "gpt-4o")):
        ids = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert again(text).input_ids == ids
        assert tokenizer(text).input_ids == ids
