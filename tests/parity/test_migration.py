"""What docs/migration.md calls PEFT's and TRL's, they have. Needs torch.

The right columns of its tables are checked without torch (tests/test_docs.py).
"""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
OLD = {"warmup_ratio"}
"""Names that the page calls those of older versions."""


def theirs(library: str) -> list[str]:
    """The code in the left column of a library's table."""
    section = PAGE.partition(f"\n## {library}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \| .* \|$", section, re.MULTILINE)
    found = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    assert len(found) > 10
    return found


def parameters(callable_: Any) -> set[str]:
    return set(inspect.signature(callable_).parameters)


def test_peft_has_the_names_of_its_table() -> None:
    places = (peft, transformers, peft.PeftModel, peft.LoraModel, torch.nn.Parameter)
    of_lora = parameters(peft.LoraConfig)
    for code in theirs("PEFT"):
        name, arguments = re.fullmatch(r"(?:with )?(?:model\.)?(\w+)(.*)", code).groups()
        place = next((place for place in places if hasattr(place, name)), None)
        assert place is not None or name in of_lora, code
        if place in (peft, transformers) and arguments.startswith("("):
            given = set(re.findall(r"(\w+)=", arguments))
            # transformers' config takes the rest as keywords.
            known = parameters(getattr(place, name))
            assert given <= known, code
        if name == "init_lora_weights":
            peft.LoraConfig(init_lora_weights=re.findall(r'"(.*)"', arguments)[0])


def test_trl_has_the_names_of_its_table() -> None:
    trl = pytest.importorskip("trl")
    places = (trl, transformers)
    options = parameters(trl.SFTConfig)
    for code in theirs("TRL"):
        for name in re.findall(r"(?<![\w.\"])([a-zA-Z]\w+)", code):
            known = name in options or any(hasattr(place, name) for place in places)
            assert known or name in {*OLD, "devices", "True"}, code
