"""Keeps tokens and passwords out of messages and saved configs."""

from __future__ import annotations

import os
import re

VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
)
"""Variables of the environment whose values are secret."""
HIDDEN = "***"
# The user and password in https://user:password@host/path.
_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# Tokens of Hugging Face.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_NAMES = "token|key|api_key|password|signature"
_IN_QUERY = re.compile(rf"(?<=[?&])((?:{_NAMES})=)[^&\s,;]+", re.IGNORECASE)
_SHORTEST = 6
"""Characters of a secret; a shorter value would hide parts of words."""


def redacted(text: str) -> str:
    """A text without the secrets of the environment, tokens, and passwords in URLs.

    >>> redacted("https://me:pass@host/a.jsonl cannot be read")
    'https://***@host/a.jsonl cannot be read'
    >>> redacted("401 for https://host/a?token=abc&part=1")
    '401 for https://host/a?token=***&part=1'
    """
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(HIDDEN, text)
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)
