"""The chat template of a run, where it is not the tokenizer's own: a file, or a name."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_ft.config.foreign.llama_factory_templates import FORMATS, jinja
from lorax_ft.files import read_text
from lorax_ft.template_limits import template_limits

CONTEXT = 24
"""Characters shown around the first difference of two texts."""
_TOKEN = re.compile(r"<[|｜][^<>\s]+[|｜]>|<(?:start|end)_of_turn>")
_SYSTEM = {"role": "system", "content": "Be brief."}
_TURNS = (
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "Three."},
)


def read_template(wanted: str) -> str:
    """The Jinja text of a template: of a file, or by its name in LLaMA-Factory.

    Raises:
      ValueError: it is neither.
    """
    if wanted in FORMATS:
        return jinja(FORMATS[wanted])
    if Path(wanted).is_file():
        return read_text(Path(wanted))
    near = difflib.get_close_matches(wanted, FORMATS, n=1)
    known = f"did you mean {near[0]}?" if near else f"names are {', '.join(FORMATS)}"
    raise ValueError(
        f"model.chat_template {wanted!r} is neither a Jinja file nor the name of a template; "
        f"{known}"
    )


def use_template(tokenizer: Any, wanted: str) -> None:
    """Gives a tokenizer a chat template, unless its own writes the same conversations.

    Its own is kept then, as it may also write tools and thoughts. Where they differ, a warning
    says where.

    Raises:
      ValueError: as `read_template`.
    """
    template = read_template(wanted)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template
        _warn_of_missing_tokens(tokenizer, template, wanted)
        return
    # A template that drops earlier thoughts writes an answer that is not the last one otherwise.
    thinks = wanted in FORMATS and FORMATS[wanted].thinks
    turns = _TURNS[:2] if thinks else _TURNS
    for messages in (turns, [_SYSTEM, *turns]):
        ours = _rendered(tokenizer, None, messages)
        theirs = _rendered(tokenizer, template, messages)
        if ours != theirs:
            tokenizer.chat_template = template
            _warn_of_missing_tokens(tokenizer, template, wanted)
            warnings.warn(
                f"model.chat_template {wanted} is used in place of the tokenizer's own: "
                f"{_difference(theirs, ours)}",
                stacklevel=3,
            )
            return


def _warn_of_missing_tokens(tokenizer: Any, template: str, wanted: str) -> None:
    """Warn of tokens in the template's text that the tokenizer does not have."""
    known = tokenizer.get_vocab()
    missing = sorted({token for token in _TOKEN.findall(template) if token not in known})
    if missing:
        warnings.warn(
            f"model.chat_template {wanted}: the tokenizer does not have "
            f"{', '.join(missing)} as a token, and writes several tokens in its place; another "
            "template may fit the model better",
            stacklevel=4,
        )


def _rendered(tokenizer: Any, template: str | None, messages: Sequence[dict[str, str]]) -> str:
    """A conversation as a template writes it (None: the tokenizer's own), or why it does not."""
    try:
        with template_limits(template or str(tokenizer.get_chat_template())):
            return str(
                tokenizer.apply_chat_template(
                    list(messages), chat_template=template, tokenize=False
                )
            )
    # Templates are programs of their own, and may raise anything.
    except Exception as error:
        return f"an error ({error})"


def _difference(theirs: str, ours: str) -> str:
    """Where two texts begin to differ."""
    place = 0
    while place < min(len(theirs), len(ours)) and theirs[place] == ours[place]:
        place += 1
    start = max(place - CONTEXT, 0)
    shown, own = (repr(text[start : place + CONTEXT]) for text in (theirs, ours))
    return f"it writes {shown} where that writes {own}"
