"""Rows from files and the Hub record where they come from, for error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_cases import assistant, user, write

from lorax_ft.data.sources import Row, read_rows


def test_jsonl_rows_carry_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl", '\ufeff{"question": "a\u2028b"}\n\n{"question": "c"}\r\n'
    )
    rows = read_rows((path,))
    assert [row.fields["question"] for row in rows] == ["a\u2028b", "c"]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


def test_csv_is_text_and_carries_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", ',question,answer\n0,"two\nlines",007\n1,b,None\n')
    assert read_rows((path,)) == [
        Row(fields={"": "0", "question": "two\nlines", "answer": "007"}, where=f"{path}, line 2"),
        Row(fields={"": "1", "question": "b", "answer": "None"}, where=f"{path}, line 4"),
    ]


def test_json_parquet_and_limit(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    content = [{"messages": [user("a"), assistant("b")]}, {"messages": [assistant("c")]}]
    json_path = write(tmp_path / "train.json", json.dumps(content))
    parquet_path = str(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), parquet_path)
    rows = read_rows((json_path, parquet_path), limit=3)
    assert [row.fields for row in rows] == [*content, content[0]]
    assert [row.where.rpartition(", ")[2] for row in rows] == ["item 1", "item 2", "row 1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"q": 1}\n{"q": }\n',
            r"a.jsonl, line 2: not JSON: expecting value \(column 7\)",
        ),
        ("a.jsonl", '{"q": 1}\n[1]\n', "a.jsonl, line 2: a row must be an object, not list"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON: nested too deeply"),
        ("a.jsonl", "\n\n", "a.jsonl contains no rows"),
        ("a.json", '[{"q": 1},\n {"q" 2}]', "a.json, line 2: not JSON: expecting ':'"),
        ("a.json", '[{"q": 1}, 2]', "a.json, item 2: a row must be an object, not int"),
        ("a.json", '{"q": 1}', "a.json: contains one dict, not a list of objects"),
        (
            "a.json",
            '{"q": 1}\n{"q": 2}',
            "a.json, line 2: .*one object per line needs the suffix .jsonl",
        ),
        ("a.json", "[]", "a.json contains no rows"),
        (
            "a.csv",
            "q,a\n1,2\n3\n",
            "a.csv, line 3: the row's number of fields is 1, but the header's is 2",
        ),
        ("a.csv", "q,q\n1,2\n", "a.csv, line 1: the header repeats q"),
        ("a.csv", 'q,a\n1,"2\n', "a.csv, line 2: not CSV"),
        ("a.csv", "q,a\n", "a.csv contains no rows"),
        ("a.parquet", "no", "a.parquet cannot be read as Parquet"),
        (
            "a.txt",
            "no",
            "a.txt has an unsupported file type; supported: .jsonl, .json, .csv, .parquet",
        ),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_rows((write(tmp_path / name, text),))
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text_name_the_line(tmp_path: Path) -> None:
    for suffix in ("jsonl", "json"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(
            b'[{"q": 1},\n{"q": "\xff"}]' if suffix == "json" else b'{"q": 1}\n{"q": "\xff"}\n'
        )
        with pytest.raises(ValueError, match=r"line 2: not UTF-8 text"):
            read_rows((str(path),))


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    write(tmp_path / "train.jsonl", "{}")
    (tmp_path / "bare").mkdir()
    cases = {
        f"{tmp_path}/trian.jsonl": "no file .*; the closest name in its folder is train.jsonl",
        f"{tmp_path}/none/a.jsonl": "there is no folder",
        f"{tmp_path}/bare": r"contains none of train\.jsonl, train\.json,",
        "owner/name": "no such file, and loading split 'train' .*: Couldn't reach the Hub$",
        "trian.jsonll": "no file trian.jsonll",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_rows((path,))


def test_hub_ids_name_a_subset_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"q": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(("openai/gsm8k:main",), split="test", revision="abc")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc"})]
    assert rows == [Row(fields={"q": "a"}, where="openai/gsm8k:main, row 1")]


def test_importing_the_data_room_is_cheap() -> None:
    code = (
        "import sys, lorax_ft.data.batches as _; "
        "print([m for m in ('jax', 'transformers', 'datasets', 'torch') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
