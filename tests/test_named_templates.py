"""Chat templates by name: what they write, and when they replace the tokenizer's own."""

from __future__ import annotations

import ast
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from data_cases import CHATML, assistant, make_tokenizer, user

from lorax_ft.config import EMBEDDED_MODEL
from lorax_ft.config.foreign.llama_factory_templates import FORMATS, Format, jinja
from lorax_ft.data.chat import describe_row, encode
from lorax_ft.data.formats import Message
from lorax_ft.interop.chat_template import read_template, use_template
from lorax_ft.interop.load import load_model
from lorax_ft.interop.tokenizer import load_tokenizer, save_tokenizer

MIRROR = os.environ.get("LORAX_FT_LLAMA_FACTORY", "")
SYSTEM: Message = {"role": "system", "content": "S"}
TWO = [user("a"), assistant("b"), user("c"), assistant("d")]
END = "<|im_end|>"  # the end-of-sequence token of the tokenizer here


def written(name: str, messages: list[Message]) -> str:
    tokenizer = make_tokenizer(jinja(FORMATS[name]))
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("qwen3_nothink", TWO[:2], "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb" + END),
        ("default", [SYSTEM, *TWO[:2]], f"System: S{END}\nHuman: a{END}\nAssistant:b{END}"),
        ("llama2", [SYSTEM, *TWO], "[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]b<|im_end|>[INST] c"),
        ("gemma2", TWO[:2], f"a<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n{END}"),
        ("qwen3", TWO, "assistant\n<think>\n\n</think>\n\nb<|im_end|>\n<|im_start|>user\nc"),
        ("qwen3", [user("a"), assistant("<think>\n1\n</think>\n\nb")], "assistant\n<think>\n1\n"),
        ("vicuna", TWO, "user's questions.USER: a ASSISTANT:b<|im_end|>USER: c ASSISTANT:d" + END),
        ("solar", TWO[:2], f"### User:\na\n\n### Assistant:\nb{END}"),
    ],
)
def test_what_a_format_writes(name: str, messages: list[Message], text: str) -> None:
    assert text in written(name, messages)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", FORMATS)
def test_the_answers_of_every_format_are_found(name: str) -> None:
    tokenizer = make_tokenizer(jinja(FORMATS[name]))
    sample = encode(TWO, tokenizer, max_length=2000)
    learnt = [text for text, counts in describe_row(tokenizer, sample) if counts]
    assert [text.split("<")[0].strip() for text in learnt] == ["b", "d"], learnt
    with pytest.raises(ValueError, match=r"model\.chat_template"):
        encode([user("a"), {"role": "tool", "content": "1"}], tokenizer, max_length=2000)


def test_the_own_template_is_kept_where_it_writes_the_same() -> None:
    tokenizer = make_tokenizer(CHATML)
    use_template(tokenizer, "chatml")
    assert tokenizer.chat_template == CHATML
    with pytest.warns(UserWarning, match="in place of the tokenizer's own: it writes 'Below is"):
        use_template(make_tokenizer("{{ messages[-1]['content'] }}"), "alpaca")
    with pytest.warns(UserWarning, match="in place of"):
        use_template(tokenizer, "qwen")
    assert "created by Alibaba Cloud" in tokenizer.chat_template


def test_a_base_model_gets_the_template() -> None:
    base = make_tokenizer(None)
    use_template(base, "chatml")
    assert base.chat_template == jinja(FORMATS["chatml"])
    with pytest.warns(UserWarning, match=r"does not have <\|end_header_id\|>, <\|eot_id\|>"):
        use_template(make_tokenizer(None), "llama3")


def test_a_file_is_a_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    assert read_template(str(file)) == "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"model\.chat_template 'chatmi' .*; did you mean chatml"):
        read_template("chatmi")


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the templates differ
        model = load_model(EMBEDDED_MODEL, chat_template="alpaca")
    save_tokenizer(model.tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).chat_template == jinja(FORMATS["alpaca"])


def their_formats() -> dict[str, dict[str, Any]]:
    """The arguments of LLaMA-Factory's register_template, as values, by name."""
    file = "HEAD:src/llamafactory/data/template.py"
    git = ["git", f"--git-dir={MIRROR}", "show", file]
    shown = subprocess.run(git, capture_output=True, text=True, check=True)
    formats = {}
    for node in ast.parse(shown.stdout).body:
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "register_template":
            arguments = {str(keyword.arg): keyword.value for keyword in call.keywords}
            formats[ast.literal_eval(arguments.pop("name"))] = arguments
    return formats


def text_of(formatter: ast.expr) -> str:
    """The slots of a formatter as the text of a format."""
    assert isinstance(formatter, ast.Call)
    text = ""
    for slot in ast.literal_eval(formatter.keywords[0].value):
        if isinstance(slot, set):
            slot = {"bos_token": "{bos}", "eos_token": "{eos}"}[slot.pop()]
        text += slot.replace("{{content}}", "{content}")
    return text


@pytest.mark.skipif(not MIRROR, reason="LORAX_FT_LLAMA_FACTORY is not set")
def test_the_formats_are_those_of_llama_factory() -> None:
    theirs = their_formats()
    for name, form in FORMATS.items():
        given = theirs[name]
        texts = {
            field: text_of(given[f"format_{field}"])
            for field in ("user", "assistant", "system", "prefix")
            if f"format_{field}" in given
        }
        at_the_end = "efficient_eos" in given
        if at_the_end:
            texts.setdefault("assistant", "{content}")
        kind = ast.unparse(given["template_class"]) if "template_class" in given else ""
        texts.setdefault("user", "{content}")
        system = ast.literal_eval(given["default_system"]) if "default_system" in given else ""
        expected = Format(
            **texts,
            default_system=system,
            system_in_question=kind == "Llama2Template",
            ends="{eos}" if at_the_end else "",
            thinks=kind == "ReasoningTemplate",
        )
        assert form == expected, name
