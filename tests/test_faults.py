"""Faults from outside: a hub that does not answer.

docs/RELIABILITY.md lists them. The faults are real ones; those of disks are in tests/slow.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorax_ft import offline
from lorax_ft.data.sources import read_rows
from lorax_ft.interop.locate import locate


@pytest.fixture(params=["silent", "refused", "no such host"])
def lost_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a hub that does not answer, for the real clients, without a cache."""
    with socket.socket() as server, pytest.MonkeyPatch.context() as patch:
        server.bind(("127.0.0.1", 0))
        # Without listen() the kernel refuses; with it the connection stands, and nobody answers.
        if request.param == "silent":
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if request.param == "no such host":
            address = "http://hub.invalid"
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        patch.setattr(offline, "LIMIT", 0.5)
        yield address


def test_a_hub_that_does_not_answer(lost_hub: str) -> None:
    """The clients retry for minutes."""
    began = time.monotonic()
    expected = rf"the hub at {lost_hub} cannot be reached \(.+\): .*HF_HUB_OFFLINE=1"
    with pytest.raises(ValueError, match=expected) as of_model:
        locate("nobody/nothing", None)
    with pytest.raises(ValueError, match=expected) as of_data:
        list(read_rows(("nobody/nothing",)))
    assert time.monotonic() - began < 60  # on a busy machine
    assert "\n" not in f"{of_model.value}{of_data.value}"
