"""Refuses tokenizer files that would blow up a text or run a program, before they are loaded."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax_ft.files import parse_json, read_json, read_text, within
from lorax_ft.interop.config_sizes import check_counts

LONGEST = 512_000_000
"""Bytes of a tokenizer's file; Gemma's tokenizer.json has 33 MB."""
MOST_GROWTH = 40
"""By how much a normalizer, or what splits or decodes texts, may lengthen a text."""
MOST_CONSTANT = 1000
"""Characters, or tokens, that are added to every text."""
LONGEST_EXPRESSION = 10_000
# The most bytes that a byte can become: the ligature ﷺ has 3 bytes, and NFKC makes 33 of them.
_GROWTH = {
    "NFC": 3,
    "NFD": 3,
    "NFKC": 11,
    "NFKD": 11,
    "BertNormalizer": 3,
    "Lowercase": 2,
    "ByteLevel": 2,
    "Metaspace": 3,
}
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_UNBOUNDED = 20
"""A count from which a repeat is as bad as one without an end."""


def check_files(folder: Path, names: tuple[str, ...]) -> None:
    """Raise for a file of a tokenizer that transformers must not be given.

    Raises:
      ValueError: with the file and what is wrong with it.
    """
    for name in names:
        file = within(folder, name)
        if file.is_dir():
            for inner in sorted(file.iterdir()):
                _read(within(folder, f"{name}/{inner.name}"))
        elif file.exists():
            text = _read(file)
            if name == "tokenizer.json":
                _check_pipeline(parse_json(text, str(file)), str(file))
            elif name.endswith(".json"):
                _check_object(parse_json(text, str(file)), str(file))
    config = within(folder, "config.json")
    if config.exists():  # transformers looks there for the class
        check_counts(read_json(config), str(config))


def _read(file: Path) -> str:
    """The text of a file of a tokenizer; "" of a binary one."""
    if file.suffix == ".model":
        # SentencePiece's; transformers reads it if there is no tokenizer.json.
        read_size = file.stat().st_size
        if not file.is_file() or read_size > LONGEST:
            raise ValueError(f"{file} is no file, or has more than {LONGEST:,} bytes")
        return ""
    return read_text(file, longest=LONGEST)


def _check_object(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, not an object")
    return content


def _check_pipeline(content: Any, where: str) -> None:
    """Raise where a part of a tokenizer.json lengthens texts without a bound."""
    parts = _check_object(content, where)
    for name in _PARTS:
        growth = 1
        constant = 0
        for step in _steps(parts.get(name)):
            growth *= _growth(step, where)
            constant += len(str(step.get("prepend") or ""))
            _check_expression(step, where)
        if growth > MOST_GROWTH or constant > MOST_CONSTANT:
            raise ValueError(
                f"{where}: its {name} may lengthen a text by a factor of {growth:,} and "
                f"{constant:,} characters; supported are {MOST_GROWTH} and {MOST_CONSTANT}"
            )
    added = sum(_added(step) for step in _steps(parts.get("post_processor")))
    if added > MOST_CONSTANT:
        raise ValueError(f"{where}: its post_processor adds {added:,} tokens to every text")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of the pipeline, of sequences inside sequences too."""
    if not isinstance(part, dict):
        return
    yield part
    for value in part.values():
        for item in value if isinstance(value, list) else ():
            yield from _steps(item)


def _growth(step: dict[str, Any], where: str) -> int:
    """The most bytes that a step makes of one."""
    kind = str(step.get("type"))
    if kind == "Replace":
        content = len(str(step.get("content", "")).encode(errors="replace"))
        pattern = step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(text, str) and text:
            size = len(text.encode(errors="replace"))
            return max(1, -(-content // size))
        # An expression may match between all characters.
        return 1 + content
    if kind == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"), where)
    return _GROWTH.get(kind, 1)


def _longest_replacement(charsmap: Any, where: str) -> int:
    """The length of the longest text in a table of SentencePiece: a trie, then texts with zeros."""
    if not isinstance(charsmap, str):
        return 1
    try:
        table = base64.b64decode(charsmap)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: its precompiled_charsmap is not base64") from error
    start = 4 + int.from_bytes(table[:4], "little")
    return max([1, *map(len, table[start:].split(b"\0"))])


def _check_expression(step: dict[str, Any], where: str) -> None:
    """Raise for an expression whose time grows exponentially with the text."""
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(expression, str):
        return
    if len(expression) > LONGEST_EXPRESSION or repeats_repeats(expression):
        raise ValueError(
            f"{where}: the expression {expression[:60]!r} may take forever, as it repeats a group "
            "that repeats something"
        )


def repeats_repeats(expression: str) -> bool:
    r"""Whether an expression repeats, without an end, a group that does so inside.

    >>> repeats_repeats(r"(a+)+b"), repeats_repeats(r"(?:\s+x)*")
    (True, True)
    >>> repeats_repeats(r"[(+]+|\p{L}+(?:\d{3})*|\(a+\)+")
    False
    """
    # For each open group, whether something inside is repeated.
    groups = [False]
    closed = False  # whether the last item is a group that repeats something
    i = 0
    while i < len(expression):
        size, repeats = _quantifier(expression, i)
        if size:
            if repeats and closed:
                return True
            groups[-1] |= repeats
            i += size
            continue
        closed = False
        match expression[i]:
            case "\\":
                i += 1
            case "[":
                i = _end_of_class(expression, i)
            case "(":
                groups.append(False)
            case ")" if len(groups) > 1:
                closed = groups.pop()
                groups[-1] |= closed
        i += 1
    return False


def _quantifier(expression: str, i: int) -> tuple[int, bool]:
    """The length of the quantifier at a place, 0 for none, and whether it has no end."""
    character = expression[i]
    if character in "*+":
        return 1, True
    end = expression.find("}", i)
    if character != "{" or end < 0:
        return 0, False
    low, comma, high = expression[i + 1 : end].partition(",")
    if not (low + high).isdigit():
        return 0, False
    is_open = bool(comma) and not high
    return end + 1 - i, is_open or int(high or low) >= _UNBOUNDED


def _end_of_class(expression: str, start: int) -> int:
    """The place of the bracket that closes the class that starts here."""
    depth = 0
    i = start
    while i < len(expression):
        match expression[i]:
            case "\\":
                i += 1
            case "[":
                depth += 1
            case "]":
                depth -= 1
                if depth == 0:
                    return i
        i += 1
    return i


def _added(step: dict[str, Any]) -> int:
    """How many tokens a post-processor's template adds to every text."""
    special = step.get("special_tokens")
    sizes: list[int] = []
    if isinstance(special, dict):
        for token in special.values():
            ids = token.get("ids") if isinstance(token, dict) else None
            sizes.append(len(ids) if isinstance(ids, list) else 1)
    template = step.get("pair") or step.get("single")
    uses = len(template) if isinstance(template, list) else 0
    return uses * max(sizes, default=0)
