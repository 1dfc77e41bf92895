"""Rows from files and the Hub record where they come from, for error messages."""

from __future__ import annotations

import doctest
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_cases import assistant, user, write

from lorax_ft.data import readers, sources
from lorax_ft.data.rows import Row
from lorax_ft.data.sources import Source, has_split, parse_sources, read_rows
from lorax_ft.interop.bucket import output_path

QUESTIONS = [{"question": "a\u2028b"}, {"question": "c"}]


def test_jsonl_rows_carry_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl", '\ufeff{"question": "a\u2028b"}\n\n{"question": "c"}\r\n'
    )
    rows = list(read_rows((path,)))
    assert [row.fields for row in rows] == QUESTIONS
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


def test_csv_is_text_and_carries_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", ',question,answer\n0,"two\nlines",007\n1,b,None\n')
    assert list(read_rows((path,))) == [
        Row(fields={"": "0", "question": "two\nlines", "answer": "007"}, where=f"{path}, line 2"),
        Row(fields={"": "1", "question": "b", "answer": "None"}, where=f"{path}, line 4"),
    ]


def test_json_files_may_have_one_object_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", '{"q": 1}\n{"q": 2}\n')
    assert [(row.fields["q"], row.where) for row in read_rows((path,))] == [
        (1, f"{path}, line 1"),
        (2, f"{path}, line 2"),
    ]


def test_json_parquet_and_limit(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    content = [{"messages": [user("a"), assistant("b")]}, {"messages": [assistant("c")]}]
    json_path = write(tmp_path / "train.json", json.dumps(content))
    parquet_path = str(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), parquet_path)
    rows = list(read_rows((json_path, parquet_path), limit=3))
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
        ("a.json", '{"q": 1}\n{"q": }', "a.json, line 2: not JSON: expecting value"),
        ("a.jsonl", '[\n{"q": 1}]', "line 1: not JSON: .*one JSON list needs the suffix .json$"),
        ("a.json", "[]", "a.json contains no rows"),
        (
            "a.csv",
            "q,a\n1,2\n3\n",
            "a.csv, line 3: the row's number of fields is 1, but the header's is 2",
        ),
        ("a.csv", "q,q\n1,2\n", "a.csv, line 1: the header repeats q"),
        ("a.csv", 'q,a\n1,"2\n', "a.csv, line 2: not CSV"),
        ("a.csv", "q;a\n1;2\n", "a.csv, line 1: the columns are separated by semicolons"),
        ("a.csv", "q\ta\n1\t2\n", "a.csv, line 1: the columns are separated by tabs"),
        ("a.csv", "q,a\n", "a.csv contains no rows"),
        ("a.parquet", "no", "a.parquet cannot be read as Parquet"),
        (
            "a.txt",
            "no",
            "a.txt has an unsupported file type; supported: .jsonl, .json, .csv, .parquet.*"
            r'write each text as a line {"text": "..."} of a .jsonl file$',
        ),
    ],
)
def test_malformed_files_name_the_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows((write(tmp_path / name, text),)))
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text_name_the_line(tmp_path: Path) -> None:
    for suffix in ("jsonl", "json"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(
            b'[{"q": 1},\n{"q": "\xff"}]' if suffix == "json" else b'{"q": 1}\n{"q": "\xff"}\n'
        )
        with pytest.raises(ValueError, match=r"line 2: not UTF-8 text"):
            list(read_rows((str(path),)))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_encoding_is_named(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text('{"q": 1}\n{"q": 2}\n', encoding=encoding)
    expected = f"not UTF-8 text .*; it is {encoding.upper()}; save the file as UTF-8"
    with pytest.raises(ValueError, match=expected):
        list(read_rows((str(path),)))


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", '{"q": 1}')
    assert output_path("~/out") == tmp_path / "out"
    for path in ("~/data", "~/data/train.jsonl", "~/data/*.jsonl"):
        assert [row.fields for row in read_rows((path,))] == [{"q": 1}]
    assert has_split("~/data", "train")


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(tmp_path / "train.jsonl", "{}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.jsonl.gz").touch()
    cases = {
        f"{tmp_path}/trian.jsonl": "no file .*; the closest name in its folder is train.jsonl",
        f"{tmp_path}/none/a.jsonl": "there is no folder",
        f"{tmp_path}/train.jsonl=two": "'two' is no weight of .*: give a number, as in .*=0.5",
        f"{tmp_path}/*.csv": r"no file matches .*/\*\.csv",
        f"{tmp_path}/other": r'to read all of its files, give ".*/other/\*\.jsonl\.gz"',
        f"{tmp_path}/bare": r"contains none of train\.jsonl, train\.json,",
        "s3://bucket/a.jsonl": r"^s3://bucket/a\.jsonl: data is read from local files",
        "owner/name": "no such file, and loading split 'train' .*: Couldn't reach the Hub$",
        "trian.jsonll": "no file trian.jsonll",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            list(read_rows((path,)))


def test_hub_ids_name_a_subset_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list([{"q": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = list(read_rows(("openai/gsm8k:main",), split="test", revision="abc"))
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "revision": "abc"})]
    assert rows == [Row(fields={"q": "a"}, where="openai/gsm8k:main, row 1")]


def compress(path: Path, data: bytes) -> str:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        import pyarrow

        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(data)
    return str(path)


@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv"])
def test_compressed_files(tmp_path: Path, kind: str, end: str) -> None:
    texts = {"json": json.dumps(QUESTIONS), "csv": "question\r\na\u2028b\r\nc\r\n"}
    lines = "\ufeff" + "\r\n".join(map(json.dumps, QUESTIONS))
    data = texts.get(kind, lines).encode()
    path = compress(tmp_path / f"train.{kind}{end}", data)
    assert [row.fields for row in read_rows((path,))] == QUESTIONS
    if kind != "ndjson":
        assert [row.fields for row in read_rows((str(tmp_path),))] == QUESTIONS
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=rf"train.{kind}{end} cannot be read after line \d+: "):
        list(read_rows((path,)))
    Path(path).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"after line 0: .*the file is damaged or incomplete"):
        list(read_rows((path,)))


def test_fields_of_any_length_in_a_csv_file(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f'q,a\n"{"x" * 200_000}",b\n')
    (row,) = read_rows((path,))
    assert len(row.fields["q"]) == 200_000
    assert csv.field_size_limit() == before


def test_patterns_and_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        write(tmp_path / f"data/train-0000{number}-of-00003.jsonl", f'{{"q": {number}}}')
    for path in (f"{tmp_path}/data/*.jsonl", f"{tmp_path}/**/*.jsonl", str(tmp_path)):
        assert [row.fields["q"] for row in read_rows((path,))] == [0, 1, 2]
    assert has_split(str(tmp_path), "train")
    assert not has_split(str(tmp_path), "test")
    # A file whose name looks like a pattern is a file.
    path = write(tmp_path / "a[1].jsonl", '{"q": 7}')
    assert [row.fields["q"] for row in read_rows((path,))] == [7]


def test_saved_datasets(tmp_path: Path) -> None:
    """Folders of save_to_disk; null fields that Arrow adds inside of a value are absent."""
    import datasets

    calls = [{"messages": [{"role": "user", "content": "a"}, {"role": "user", "calls": {"x": 1}}]}]
    calls.append({"messages": [{"role": "user", "content": "b", "calls": {"y": None, "z": 2}}]})
    table = datasets.Dataset.from_list(calls)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "two")
    del calls[1]["messages"][0]["calls"]["y"]  # type: ignore[index]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert [row.fields for row in read_rows((one,))] == calls
    assert [row.where for row in read_rows((one,))] == [f"{one}, row 1", f"{one}, row 2"]
    assert [row.fields for row in read_rows((two,))] == calls
    assert [row.fields for row in read_rows((two,), split="test")] == calls[1:]
    assert has_split(two, "test")
    assert not has_split(two, "dev")
    with pytest.raises(ValueError, match="two has no split 'dev'; it has test, train: give --data"):
        list(read_rows((two,), split="dev"))
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(ValueError, match="one cannot be read as a saved dataset: ") as error:
        list(read_rows((one,)))
    assert "\n" not in str(error.value)


def test_weights_follow_the_path(tmp_path: Path) -> None:
    odd = write(tmp_path / "a=2", "")
    assert parse_sources(("a.jsonl", "b.jsonl=0.5", "s=train/c.jsonl", odd, "o/n:s=3")) == [
        Source("a.jsonl"),
        Source("b.jsonl", 0.5),
        Source("s=train/c.jsonl"),
        Source(odd),
        Source("o/n:s", 3.0),
    ]
    for wrong in ("0", "-1", "inf"):
        with pytest.raises(ValueError, match=f"weight of a.jsonl is {wrong}; it must be above 0"):
            parse_sources((f"a.jsonl={wrong}",))


def test_doctests() -> None:
    for module in (readers, sources):
        assert doctest.testmod(module).failed == 0


def test_importing_the_data_room_is_cheap() -> None:
    code = (
        "import sys, lorax_ft.data.dataset as _; "
        "print([m for m in ('jax', 'transformers', 'datasets', 'pyarrow', 'torch') "
        "if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
