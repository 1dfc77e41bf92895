"""What saved folders and GGUF files say about texts: tokenizer files, stops, templates and BOS."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoint_cases import random_model
from data_cases import CHATML, assistant, make_tokenizer, user
from gguf_cases import tokenizer_keys

from lorax_ft.data.chat import encode, encode_prompt
from lorax_ft.inference.generate import default_stop_ids
from lorax_ft.interop.gguf_tokenizer import read_tokenizer
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save import save_model
from lorax_ft.interop.save_gguf_tokenizer import tokenizer_metadata
from lorax_ft.interop.tokenizer import load_tokenizer, save_tokenizer
from lorax_ft.models.model import Model

OTHER_END = CHATML.replace("<|im_end|>", "<|end|>")
TEMPLATES = {"default": CHATML, "tool_use": "T" + CHATML, "rag-2": "R" + CHATML}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tokenizer's folder, written by hand in places."""
    folder = tmp_path / "base"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "note": "keep me"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    (folder / "special_tokens_map.json").write_text('{ "eos_token":"<|im_end|>" }')
    return folder


def test_an_untouched_tokenizer_keeps_its_files(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = None
    tokenizer("use it", truncation=True, max_length=3)
    (tmp_path / "new").mkdir()
    save_tokenizer(tokenizer, tmp_path / "new")
    assert _bytes(tmp_path / "new") == _bytes(base)
    assert len(_bytes(base)) == 6


@pytest.mark.parametrize("change", ["template", "token", "eos"])
def test_a_changed_tokenizer_is_written(base: Path, tmp_path: Path, change: str) -> None:
    tokenizer = load_tokenizer(base)
    if change == "template":
        tokenizer.chat_template = OTHER_END
    elif change == "token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    else:
        tokenizer.eos_token = "<|im_start|>"
    (tmp_path / "new").mkdir()
    save_tokenizer(tokenizer, tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.eos_token == tokenizer.eos_token
    assert again.chat_template == tokenizer.chat_template
    assert again("a<|new|>").input_ids == tokenizer("a<|new|>").input_ids
    config = json.loads((tmp_path / "new/tokenizer_config.json").read_text())
    # transformers 4 knows neither this class nor a list under the other name.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend", "extra_special_tokens"} & config.keys()


def test_no_file_of_an_old_tokenizer_stays(base: Path, tmp_path: Path) -> None:
    for tokenizer in (load_tokenizer(base), make_tokenizer()):
        model = dataclasses.replace(random_model(), tokenizer=tokenizer)
        save_model(tmp_path / "model", model.params, model)
    assert load_tokenizer(tmp_path / "model").chat_template == CHATML
    assert not (tmp_path / "model/special_tokens_map.json").exists()
    assert not (tmp_path / "model/additional_chat_templates").exists()


STOPS = {
    # template, config.json, generation_config.json -> generation_config.json that is saved
    "nothing to add": (
        CHATML,
        {},
        {"eos_token_id": 1, "top_k": 5},
        {"eos_token_id": 1, "top_k": 5},
    ),
    "the end of a turn": (OTHER_END, {}, {"eos_token_id": 1}, {"eos_token_id": [1, 258]}),
    "the base's order": (OTHER_END, {}, {"eos_token_id": [9, 1]}, {"eos_token_id": [9, 1, 258]}),
    "no file": (
        OTHER_END,
        {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": None},
        {},
        {"bos_token_id": 0, "eos_token_id": [1, 258]},
    ),
    "config.json": (
        CHATML,
        {"eos_token_id": [1, 7]},
        {"eos_token_id": 1},
        {"eos_token_id": [1, 7]},
    ),
    "no template": (None, {}, {}, {"eos_token_id": 1}),
}


@pytest.mark.parametrize("name", STOPS)
def test_saved_folders_stop_where_we_do(tmp_path: Path, name: str) -> None:
    template, config, generation_config, saved = STOPS[name]
    base = random_model()
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<|end|>"])
    model = dataclasses.replace(
        base,
        tokenizer=tokenizer,
        hf_config={**base.hf_config, **config},
        generation_config=generation_config,
    )
    save_model(tmp_path / "model", model.params, model)
    written = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert written == saved
    ids = written["eos_token_id"]
    assert set(ids if isinstance(ids, list) else [ids]) == set(default_stop_ids(model))
    assert default_stop_ids(load_model(tmp_path / "model")) == default_stop_ids(model)


def test_a_model_without_stops_has_no_generation_config(tmp_path: Path) -> None:
    model = random_model()
    save_model(tmp_path / "model", model.params, model)
    assert not (tmp_path / "model/generation_config.json").exists()


def test_named_chat_templates_in_gguf(tmp_path: Path) -> None:
    """The keys are those of llama.cpp's own writer, and lead back to the same templates."""
    model = gguf_model("smollm", template=TEMPLATES)
    keys = tokenizer_metadata(model, OTHER_KEYS)
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    writer.add_chat_template([{"name": n, "template": t} for n, t in TEMPLATES.items()])
    theirs = {key: value.value for key, value in writer.kv_data[0].items()}
    del theirs["general.architecture"]
    ours = {key: value for key, value in keys.items() if "chat_template" in key}
    theirs["tokenizer.chat_templates"] = sorted(theirs["tokenizer.chat_templates"])
    ours["tokenizer.chat_templates"] = sorted(ours["tokenizer.chat_templates"])
    assert ours == theirs
    again = read_tokenizer({**OTHER_KEYS, **keys}).chat_template
    assert again == {"default": CHATML, "tool_use": "T" + CHATML, "rag_2": "R" + CHATML}


def test_only_named_templates_in_gguf() -> None:
    model = gguf_model("smollm", template={"tool_use": CHATML})
    keys = tokenizer_metadata(model, OTHER_KEYS)
    assert gguf.Keys.Tokenizer.CHAT_TEMPLATE not in keys
    assert read_tokenizer({**OTHER_KEYS, **keys}).chat_template == {"tool_use": CHATML}


def test_the_end_of_a_turn_in_gguf() -> None:
    # The tokenizer's eos token is </s>.
    ends = CHATML.replace("<|im_end|>", "<s>").replace("<|im_start|>", "")
    model = gguf_model("smollm", template=ends)
    assert tokenizer_metadata(model, OTHER_KEYS)[gguf.Keys.Tokenizer.EOT_ID] == 1
    model = gguf_model("smollm", template=ends.replace("<s>", "</s>"))
    assert gguf.Keys.Tokenizer.EOT_ID not in tokenizer_metadata(model, OTHER_KEYS)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("kind", ["smollm", "llama"])
def test_one_bos_or_none(kind: str, writes_bos: bool, adds_bos: bool) -> None:
    """A conversation has the BOS that its template writes, whatever the tokenizer adds to texts.

    transformers and vLLM do the same. In GGUF, `add_bos_token` is about texts; llama.cpp adds no
    second one to a template's.
    """
    turns = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    template = "{{ bos_token }}" * writes_bos + turns
    model = gguf_model(kind, template=template, add_bos_token=adds_bos)
    tokenizer = model.tokenizer
    prompt = encode_prompt([user("hi")], tokenizer).tolist()
    sample = encode([user("hi"), assistant("ho")], tokenizer, max_length=64).tokens.tolist()
    for ids in (prompt, sample):
        assert ids.count(1) == writes_bos
        assert (ids[0] == 1) == writes_bos
    theirs = tokenizer.apply_chat_template([user("hi")], tokenize=True, return_dict=False)
    assert prompt == theirs
    keys = tokenizer_metadata(model, OTHER_KEYS)
    assert keys[gguf.Keys.Tokenizer.ADD_BOS] is adds_bos
    again = read_tokenizer({**OTHER_KEYS, **keys})
    assert again("hi").input_ids == tokenizer("hi").input_ids
    assert encode_prompt([user("hi")], again).tolist() == prompt


OTHER_KEYS = {"general.architecture": "llama", "llama.context_length": 128}


def gguf_model(
    kind: str, *, template: str | Mapping[str, str], add_bos_token: bool = False
) -> Model:
    """A model with a tokenizer that GGUF files can hold."""
    keys = tokenizer_keys(kind) | {"tokenizer.ggml.add_bos_token": add_bos_token}
    tokenizer = read_tokenizer(keys)
    tokenizer.chat_template = template
    base = random_model()
    config = dataclasses.replace(base.config, vocab_size=len(tokenizer))
    return dataclasses.replace(base, tokenizer=tokenizer, config=config)


def _bytes(folder: Path) -> dict[str, bytes]:
    files: dict[str, Any] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            files[str(file.relative_to(folder))] = file.read_bytes()
    return files
