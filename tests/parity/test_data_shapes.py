"""Rows become what TRL makes of them: texts, where the completion starts, and packed documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_cases import BYTES, assistant, user

pytest.importorskip("trl")

from lorax_ft.config import DataConfig
from lorax_ft.data.chat import Sample
from lorax_ft.data.dataset import load_data

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user("1 + 1?"),
    assistant("two"),
    user("And 1?"),
    assistant("the answer is twelve"),
]
ROWS: list[dict[str, Any]] = [
    {"messages": CONVERSATION},
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in CONVERSATION]},
    {"prompt": CONVERSATION[:-1], "completion": CONVERSATION[-1:]},
    {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:3]},
    {"prompt": "one and one is", "completion": " two"},
    {"text": "one and one is two"},
]


def samples_of(path: Path, rows: list[dict[str, Any]], **options: Any) -> list[list[Sample]]:
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=(str(path),), validation_rows=0, **options)
    return list(load_data(config, BYTES, seed=0).train.rows)


@pytest.mark.parametrize("row", ROWS)
def test_texts_and_where_the_completion_starts(row: dict[str, Any], tmp_path: Path) -> None:
    from trl.data_utils import apply_chat_template, is_conversational, maybe_convert_to_chatml

    ((sample,),) = samples_of(tmp_path / "a.jsonl", [row])
    # TRL's functions change the messages that they are given.
    theirs = maybe_convert_to_chatml(json.loads(json.dumps(row)))
    if is_conversational(theirs):
        theirs = apply_chat_template(theirs, BYTES)
        # Its trainer writes no end token after a template.
        end = ""
    else:
        end = BYTES.eos_token
    text = theirs["text"] if "text" in theirs else theirs["prompt"] + theirs["completion"]
    assert BYTES.decode(sample.tokens) == text + end
    if "prompt" in theirs:
        first = int(sample.mask.argmax())
        assert BYTES.decode(sample.tokens[:first]) == theirs["prompt"]
        completion = BYTES.decode(sample.tokens[sample.mask])
        # We train no white space after the end of the turn.
        assert completion == (theirs["completion"] + end).rstrip()


def test_documents_are_packed_as_by_trls_wrapped_strategy(tmp_path: Path) -> None:
    import datasets
    from trl.data_utils import pack_dataset

    texts = ["one and one " * n for n in (3, 1, 9, 2, 5)]
    ours = samples_of(tmp_path / "a.jsonl", [{"text": t} for t in texts], pack=True, max_length=32)
    ids = [[*BYTES(text)["input_ids"], BYTES.eos_token_id] for text in texts]
    packed = pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), 32, strategy="wrapped")
    found = [[token for sample in row for token in sample.tokens.tolist()] for row in ours]
    assert found == [list(row) for row in packed["input_ids"]]
