"""Reads the items of a JSON list one after the other: the list may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")


class BadListError(ValueError):
    """The text is no JSON list: what is wrong, and on which line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def items(chunks: Iterable[bytes], *, longest: int) -> Iterator[Any]:
    """Yields the items of the list in a UTF-8 file that comes in chunks.

    Args:
      chunks: the file.
      longest: the most characters that one item may have.

    Raises:
      BadListError: the text is not a list, or not UTF-8, or an item is malformed or too long.

    >>> list(items([b'[{"a": 1}', b', {"a', b'": 2}]'], longest=100))
    [{'a': 1}, {'a': 2}]
    """
    window = _Window(chunks, longest)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        yield window.item()
        while window.peek() == ",":
            window.take(",")
            yield window.item()
        window.take("]")
    if window.peek():
        raise window.wrong("extra data")


class _Window:
    """The part of the text that was read and not yet used."""

    def __init__(self, chunks: Iterable[bytes], longest: int) -> None:
        self._chunks = iter(chunks)
        self._longest = longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._lines = 1  # the line on which the text starts
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Go past a character that must come next."""
        if self.peek() != character:
            raise self.wrong(f"expecting {character!r}")
        self._at += 1

    def item(self) -> Any:
        """The next value."""
        self.peek()
        wanted = 0
        while True:
            try:
                value, self._at = self._json.raw_decode(self._text, self._at)
                return value
            except RecursionError:
                raise self.wrong("nested too deeply") from None
            except ValueError as error:
                size = len(self._text) - self._at
                if size > self._longest:
                    raise self.wrong(f"the item has more than {self._longest:,} bytes") from None
                # It may only be incomplete. Twice as much, so that few attempts are needed.
                wanted = max(wanted, 2 * size)
                grows = False
                while len(self._text) - self._at <= wanted and self._more():
                    grows = True
                if not grows:
                    raise self._as_bad(error) from None

    def wrong(self, message: str) -> BadListError:
        """The error that something here is wrong."""
        return self._bad(message, self._at)

    def _as_bad(self, error: ValueError) -> BadListError:
        if not isinstance(error, json.JSONDecodeError):
            return self.wrong(str(error))
        message = error.msg[0].lower() + error.msg[1:]
        return self._bad(message, error.pos)

    def _bad(self, message: str, at: int) -> BadListError:
        line = self._lines + self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at)
        return BadListError(f"not JSON: {message} (column {column})", line)

    def _more(self) -> bool:
        """Read another chunk; whether there was one."""
        if self._ended:
            return False
        chunk = next(self._chunks, b"")
        self._ended = not chunk
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            before = self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise BadListError(
                f"not UTF-8 text ({error.reason}); save the file as UTF-8", self._lines + before
            ) from error
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + text
        self._at = 0
        return bool(text) or not self._ended
