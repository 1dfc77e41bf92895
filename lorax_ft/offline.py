"""The hub, or what is cached of it where it does not answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Literal

LIMIT = 10.0
"""Seconds to wait for the hub's first answer."""
ADVICE = (
    "check the network, give a local path, or set HF_HUB_OFFLINE=1 to use what is cached at once"
)
# Each has a copy of HF_HUB_OFFLINE, which it reads at every request.
_READERS = ("huggingface_hub.constants", "datasets.config")


@contextlib.contextmanager
def hub_or_cache(
    repo: str, *, repo_type: Literal["model", "dataset"], revision: str | None = None
) -> Iterator[str]:
    """Within the block the clients of the hub use their caches if the hub does not answer.

    The clients themselves retry for minutes. This asks the hub once, as they would first.

    Args:
      repo: the id of the repository that the block reads.
      repo_type: what it holds.
      revision: its branch, tag or commit.

    Yields:
      Why the hub cannot be reached, and what to do; empty if it answers, or is not to be asked.
    """
    problem = _problem(repo, repo_type, revision)
    if not problem:
        yield ""
        return
    with _offline():
        yield problem


def _problem(repo: str, repo_type: str, revision: str | None) -> str:
    # huggingface_hub 2.4 does not import its module constants by itself.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode():
        return ""
    try:
        HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=LIMIT)
    except (HfHubHTTPError, HFValidationError):
        # It answers. The client that reads the repository says what is wrong.
        return ""
    except Exception as error:  # of the connection, whose library differs between versions
        # A timeout may have no message.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        endpoint = constants.ENDPOINT
        return f"the hub at {endpoint} cannot be reached ({reason}): {ADVICE}"
    return ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE=1 had been set, which the clients read when they are imported."""
    modules = [sys.modules[name] for name in _READERS if name in sys.modules]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
