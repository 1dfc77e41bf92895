"""Files of strangers: what is absurd, endless or elsewhere is refused in one line, at once."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import pickle
import random
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import fuzz_inputs
import numpy as np
import pytest
from checkpoint_cases import HF_CONFIG, saved_model
from safetensors.numpy import save_file

import lorax_ft as lft
from lorax_ft import regexes, template_limits
from lorax_ft.cli import one_line_errors
from lorax_ft.config import EMBEDDED_MODEL, Config, DataConfig, ModelConfig
from lorax_ft.data import json_list, rows, sources
from lorax_ft.data.bad_rows import BadRows
from lorax_ft.data.chat import encode_prompt
from lorax_ft.data.sources import read_rows
from lorax_ft.evaluation.benchmark import read_benchmark
from lorax_ft.evaluation.exact_match import extract
from lorax_ft.files import read_json, within
from lorax_ft.interop import encoding
from lorax_ft.interop.encoding import run_tokenizer
from lorax_ft.interop.gguf import read_gguf
from lorax_ft.interop.huggingface import INDEX, decoder_config, read_folder
from lorax_ft.interop.lazy_tensor import lazy_tensors
from lorax_ft.interop.load import load_model
from lorax_ft.interop.locate import read_model_config
from lorax_ft.interop.peft_checks import read_config
from lorax_ft.interop.tokenizer import load_tokenizer
from lorax_ft.interop.tokenizer_check import repeats_repeats
from lorax_ft.lowrank.patterns import matches

QUESTION = [{"role": "user", "content": "2 + 2"}]


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Each of these takes a second or two, not minutes."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 30


# Sizes and counts of config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; at most 4,096"),
        ({"num_hidden_layers": 0}, "layers 0; it must be a whole number"),
        ({"num_hidden_layers": -3}, "num_hidden_layers -3"),
        ({"num_labels": 10**9}, "num_labels 1000000000"),
        ({"hidden_size": 10**9, "vocab_size": 10**9}, "would take [0-9,]+ TB"),
        ({"hidden_size": 10**11}, "width 100000000000; it must be a whole number"),
        ({"vocab_size": 2**31}, "vocab_size 2147483648; it must be a whole number"),
        ({"hidden_size": 10**40}, "of more than 30 digits"),
        ({"vocab_size": 10**12}, "vocab_size 1000000000000; it must be a whole number"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"intermediate_size": -1}, "mlp_width -1"),
        ({"head_dim": -8}, "head_dim -8"),
        ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "theta inf"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta 0.0"),
        (
            {"model_type": "mixtral", "num_local_experts": 10**6, "num_experts_per_tok": 2},
            "3 layers with 1,000,000 experts each",
        ),
    ],
)
def test_absurd_sizes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        decoder_config(HF_CONFIG | change, source="x")
    assert "\n" not in str(error.value)


# Files that are none


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nested(path: Path) -> None:
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


@pytest.mark.parametrize(
    ("make", "message"),
    [(pipe, "named pipe"), (endless, "outside of its folder"), (nested, "nested too deeply")],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_model_config),
        ("adapter_config.json", read_config),
        (INDEX, read_folder),
        ("tokenizer_config.json", load_tokenizer),
    ],
)
def test_what_is_no_file(
    tmp_path: Path, make: Callable, message: str, name: str, read: Callable
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    if name == INDEX and make is pipe:
        message = "holds neither"
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_devices_by_their_own_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a device, not a file"):
        read_json(Path("/dev/zero"))
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_json(tmp_path)
    pipe(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a named pipe"):
        lazy_tensors(tmp_path / "model.safetensors")
    for name in ("a.jsonl", "a.parquet"):
        pipe(tmp_path / name)
        with pytest.raises(ValueError, match="no file"):
            list(read_rows([str(tmp_path / name)]))
    (tmp_path / "test").mkdir()
    pipe(tmp_path / "test/law.csv")
    with pytest.raises(ValueError, match="is a named pipe"):
        read_benchmark(tmp_path, shots=0)


# Names and links that lead elsewhere


def test_an_index_names_files_of_its_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside.safetensors"
    saved_model(folder)
    (folder / "model.safetensors").rename(outside)
    (folder / "link.safetensors").symlink_to(outside)
    for name in ("../outside.safetensors", str(outside), "a/../../outside.safetensors"):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        with pytest.raises(ValueError, match="which is outside of it"):
            read_folder(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "a" * 6000}}))
    with pytest.raises(ValueError, match=r"a file of 6,000 characters: 'a{80}'…$"):
        read_folder(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "link.safetensors"}}))
    with pytest.raises(ValueError, match=r"is a link to .* outside of its folder; put a copy"):
        read_folder(folder)


def test_links_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "hub/models--owner--name"
    snapshot = repository / "snapshots/12ab"
    saved_model(snapshot)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / f"blobs/{number}")
        file.symlink_to(f"../../blobs/{number}")
    load_model(snapshot)
    other = tmp_path / "hub/models--owner--other/blobs/0"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other)
    with pytest.raises(ValueError, match="outside of its folder"):
        load_model(snapshot)


def test_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((ValueError, OSError)):
        read_json(within(tmp_path, "a"))


def test_a_tokenizer_does_not_bring_other_files_along(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="outside of its folder"):
        load_tokenizer(folder)


def test_a_saved_dataset_names_files_of_its_folder_only(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    state = json.loads((tmp_path / "saved/state.json").read_text())
    [entry] = state["_data_files"]
    (tmp_path / "saved" / entry["filename"]).rename(tmp_path / "outside.arrow")
    entry["filename"] = "../outside.arrow"
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="which is outside of it"):
        list(read_rows([str(tmp_path / "saved")]))


# Tokenizers


def tokenizer_folder(tmp_path: Path, **parts: Any) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in Path(EMBEDDED_MODEL).glob("*.j*"):
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "tokenizer.json").read_text()) | parts
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLE = replace({"String": "a"}, "aa")
CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"x" * 5000 + b"\0").decode()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}}, "by a factor of"),
        ({"normalizer": replace({"Regex": ""}, "x" * 1000)}, "normalizer .* factor of 1,001"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 9999}}, "9,999 characters"),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
            "factor of 5,000",
        ),
        ({"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}}, "decoder may lengthen"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}] * 40,
                }
            },
            "pre_tokenizer may lengthen",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+b"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            },
            "may take forever",
        ),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "a", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {"a": {"id": "a", "ids": [0] * 9999, "tokens": ["a"] * 9999}},
                }
            },
            "adds 9,999 tokens",
        ),
        ({"model": {"type": "BPE", "vocab": 3, "merges": []}}, "cannot be read"),
    ],
)
def test_tokenizers_that_blow_up(tmp_path: Path, parts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tokenizer_folder(tmp_path, **parts))
    assert "\n" not in str(error.value)


def test_expressions_of_real_tokenizers_are_no_catastrophe() -> None:
    from lorax_ft.interop.gguf_tokenizer import PRE_TOKENIZERS

    patterns = [known.pattern for known in PRE_TOKENIZERS.values() if known.pattern]
    # DeepSeek's, and digits in threes from the right as in Command R.
    patterns += [r"[!-~][A-Za-z]+|[^\r\n\p{L}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+(?!\S)|\s+"]
    patterns += [r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)", r"\((a+)\)+[(+]+", " ?[^(\\s|[.,!?…])]+"]
    assert not any(map(repeats_repeats, patterns))
    for bad in ("(a+)+", "(?:a*)*b", "((a{30})+)", "([a-z]+ ?){2,}", "(x(y+))*", "(a{1,99})+"):
        assert repeats_repeats(bad), bad


class Panic(BaseException):
    """As pyo3 raises it."""


Panic.__name__ = encoding.PANIC


@pytest.mark.parametrize("length", [10, 10 * encoding.SHORT])
def test_a_tokenizer_that_panics_or_hangs(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(text: str, **options: Any) -> Any:
        raise Panic("retry-limit-in-match over")

    with pytest.raises(ValueError, match="the tokenizer failed on a text: retry-limit"):
        run_tokenizer(panics, "a" * length)

    def compares(text: str, **options: Any) -> Any:
        return [] < 3  # type: ignore[operator]

    with pytest.raises(ValueError, match="failed on a text: '<' not supported"):
        run_tokenizer(compares, "a" * length)
    if length > encoding.SHORT:
        monkeypatch.setattr(encoding, "SECONDS", -0.9)
        with pytest.raises(ValueError, match="did not finish 20,000 characters"):
            run_tokenizer(lambda text, **options: time.sleep(3), "a" * length)


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tokenizer_folder(tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asks"))
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


# Chat templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 9 ** 9 ** 9 ** 9 }}", "computes a power"),
        ("{{ 'a' * 10000000000 }}", "of memory"),
        ("{{ [0] * 10000000000 }}", "of memory"),
        ("{{ '%9999999999d' % 1 }}", "of memory"),
        ("{{ 'a'.center(9999999999) }}", "of memory"),
        ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}", "("),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99) %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            "did not finish|chat template",
        ),
        ("{{ range(10 ** 9) }}", "power"),
        ("{% for i in range(1000000000) %}{% endfor %}", "rejects"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", "rejects"),
        ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "rejects"),
    ],
)
def test_templates_that_take_too_much(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 1.0)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    tokenizer.chat_template = template
    if message == "(":
        tokenizer.chat_template += "{% endfor %}{{ n.s }}"
        message = "of memory|did not finish"
    with pytest.raises(ValueError, match=message) as error:
        encode_prompt(QUESTION, tokenizer)
    assert "\n" not in str(error.value)


def test_unpacked_arguments_are_no_power() -> None:
    template_limits.check_template("{{ dict(a=1, **b) }}{{ f(**c) }}")
    with pytest.raises(ValueError, match="power"):
        template_limits.check_template("{{ (2) ** 3 }}")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux heeds the limit")
def test_the_limit_of_memory_ends() -> None:
    from lorax_ft.memory_limit import memory_limit

    def fills() -> int:
        return len(bytearray(900_000_000))

    with memory_limit(2_000_000_000), memory_limit(100):
        pass
    with memory_limit(300_000_000), pytest.raises(MemoryError):
        fills()
    assert fills()


# Regular expressions


def test_expressions_that_take_forever(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(regexes, "SECONDS", 0.3)
    slow = "((x|xx)+(?:y|z))"
    with pytest.raises(ValueError, match=r"did not finish within 0.3 seconds on 'xxx"):
        matches(slow, "x" * 60)
    with pytest.raises(ValueError, match="did not finish"):
        extract("x" * 5000, pattern=slow)
    with pytest.raises(ValueError, match="is not a regular expression"):
        matches("(" * 5000, "x")
    with pytest.raises(ValueError, match="has 20,000 characters"):
        matches("x" * 20_000, "x")
    with pytest.raises(ValueError, match=r"adapter.targets.* is not a regular expression"):
        lft.AdapterConfig(targets=("(",))


# Adapter folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
        ({"target_modules": {"a": 1}}, "target_modules is {'a': 1}"),
        ({"target_modules": ["q_proj", 5]}, "target_modules is ['q_proj', 5]"),
        ({"modules_to_save": [3]}, "modules_to_save is [3]"),
        ({"r": 10**400}, "r is "),
        ({"lora_alpha": 10**400}, "lora_alpha is "),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"rank_pattern": {"(" * 999: 1}}, "rank_pattern is "),
        ({"peft_type": ["LORA"]}, "peft_type is ['LORA']"),
    ],
)
def test_adapter_configs(tmp_path: Path, change: dict, message: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    monkey = json.dumps(config | change)
    (tmp_path / "adapter_config.json").write_text(monkey)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_config(tmp_path)
    assert len(str(error.value)) < 500


# GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(*, tensors: int = 0, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


NAME = text("general.architecture")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head(keys=2**60) + NAME, "is to hold 1,152,921,504,606,846,976 more entries"),
        (head() + NAME + struct.pack("<IIQ", 9, 0, 2**60), "more than 20,000,000 values"),
        (head() + NAME + struct.pack("<IIQ", 9, 4, 10**6), "ends within its head"),
        (head() + NAME + struct.pack("<IIQ", 9, 8, 10**6), "is to hold 1,000,000 more"),
        (head() + NAME + struct.pack("<IIQ", 9, 9, 2), "an array of arrays"),
        (head() + struct.pack("<Q", 2**62) + b"a" * 40, "a text of 4,611,686,018,427,387,904"),
        (head() + NAME + struct.pack("<IQ", 77, 0), "unknown type 77"),
        (head(tensors=2**40, keys=0) + b"a" * 99, "is to hold 1,099,511,627,776 more"),
        (
            head(tensors=1, keys=0) + text("a") + struct.pack("<I2Q", 999_999_999, 1, 1),
            "999,999,999 axes",
        ),
        (
            head(tensors=1, keys=0) + text("a") + struct.pack("<IQ2Q", 1, 2**63, 0, 0),
            "an axis of size 9,223,372,036,854,775,808",
        ),
        (
            head(tensors=1, keys=0) + text("a") + struct.pack("<IQIQ", 1, 8, 0, 2**60),
            "behind the file",
        ),
        (b"GGUF", "fewer than 24 bytes"),
        (b"\0" * 64, "does not start with GGUF"),
    ],
)
def test_gguf_files_that_lie(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(tmp_path / "a.gguf")
    assert "\n" not in str(error.value)


# safetensors


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        },
    ],
)
def test_safetensors_that_lie(tmp_path: Path, entries: dict) -> None:
    written = json.dumps(entries).encode()
    for length in (len(written), 2**60):
        (tmp_path / "a").write_bytes(struct.pack("<Q", length) + written + b"\0" * 16)
        with pytest.raises(ValueError, match="cannot be read"):
            lazy_tensors(tmp_path / "a")


# Pickles


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple:
        return open, (str(self._file), "w")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    evil = pickle.dumps(Runs(tmp_path / "ran"))
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    saved_model(model)
    adapter.mkdir()
    save_file({"x": np.zeros(1)}, adapter / "other.safetensors")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "a.pkl", "a.npy"):
        (model / name).write_bytes(evil)
    load_model(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors are read"):
        load_model(model)
    (adapter / "adapter_model.bin").write_bytes(evil)
    with pytest.raises(ValueError, match="a pickle that could run code"):
        read_config(adapter)
    for name in ("a.pkl", "a.pt", "a.npy", "a.py"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(ValueError, match="unsupported file type"):
            list(read_rows([str(tmp_path / name)]))
    assert not (tmp_path / "ran").exists()


def test_a_dataset_with_a_script_is_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in ("data", "data/data.py"):
        with pytest.raises(ValueError, match=r"contains none of|unsupported file type"):
            list(read_rows([path]))
    assert not (tmp_path / "ran").exists()


# Bombs


def test_a_list_is_read_item_by_item() -> None:
    taken = itertools.count()
    chunks = (b"[" if next(taken) == 0 else b'{"a": 1},' for _ in itertools.count())
    rows = json_list.items(chunks, longest=1000)
    assert list(itertools.islice(rows, 5)) == [{"a": 1}] * 5
    assert next(taken) < 20
    with pytest.raises(json_list.BadListError, match="the item has more than 1,000"):
        list(json_list.items(itertools.chain([b'["'], itertools.repeat(b"a" * 99)), longest=1000))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json.gz", "a.jsonl.gz"])
def test_compressed_bombs(tmp_path: Path, name: str) -> None:
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(b'["' if "json." in name else b"a,b\n")
        for _ in range(70):
            file.write(b"a" * 1_000_000)
    with pytest.raises(ValueError, match=r"more than 32,000,000|not JSON") as error:
        list(read_rows([str(tmp_path / name)]))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_enormous_cells_of_tables(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long lines of JSON: refused with the row, or left out."""
    import datasets

    monkeypatch.setattr(rows, "LONGEST_ROW", 1000)
    monkeypatch.setattr(sources, "LONGEST_ROW", 1000)
    table = datasets.Dataset.from_dict({"text": ["a" * 9, "a" * 5000, "a" * 99]})
    path = str(tmp_path / "a.parquet")
    if kind == "saved":
        path = str(tmp_path / "saved")
        table.save_to_disk(path)
    else:
        table.to_parquet(path)
    with pytest.raises(ValueError, match="row 2: the row has more than 1,000 bytes; split it"):
        list(read_rows([path]))
    bad = BadRows(skip=True)
    read = list(read_rows([path], bad=bad))
    assert [(len(row.fields["text"]), row.where) for row in read] == [
        (9, f"{path}, row 1"),
        (99, f"{path}, row 3"),
    ]
    assert bad.count == 1


def test_a_compressed_arrow_file_is_refused(tmp_path: Path) -> None:
    """It would be decompressed as a whole; a file of kilobytes may be gigabytes."""
    import datasets
    import pyarrow
    import pyarrow.ipc

    folder = tmp_path / "saved"
    texts = pyarrow.array(["a" * 100_000] * 3)
    datasets.Dataset.from_dict({"text": texts.to_pylist()}).save_to_disk(str(folder))
    [file] = folder.glob("*.arrow")
    assert len(list(read_rows([str(folder)]))) == 3
    codes = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 0, 0], "int8"), texts)
    for column in (texts, codes):
        table = pyarrow.table({"text": column})
        for compression in ("zstd", "lz4"):
            options = pyarrow.ipc.IpcWriteOptions(compression=compression)
            with pyarrow.ipc.new_stream(str(file), table.schema, options=options) as stream:
                stream.write_table(table)
            with pytest.raises(ValueError, match=r"arrow is compressed, .* save it with"):
                list(read_rows([str(folder)]))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as a saved dataset"):
        list(read_rows([str(folder)]))


# A histogram of a column is one number too long; pyarrow 26 ends the process where it is asked for.
DAMAGED_COLUMN = (
    "eNqNVd2O2kYUHhsvIelKZSONZVeoQihBVUM2xgubJdqL2mxYe0t3N64wYEVCxh6ME9tQbEJgtVKvcpmrKE/Q3uUJ"
    "+hx9hCoP0avODD/LtpVaX5w553znfN/MGWMuFaMMOfgt3G/iBdwHAF5yAIBpjCZ38WrHsR8ndpRAAL+GhRLMwCxM"
    "wzQAXx6xGE/dIzbDMal7uF+ClSauIDTCyx0MyPlHeZnBToUYm5g+ZsrDB1tM2eNtJjb1BxD3WFG4u9EWBY7sB7Ii"
    "D8Qix4kmIKXLsh2qIQpM/594jjfgCQ+AyFdI8JmBDRplAeTEoAqEdOwMUWhDFlRZIROiOLY9FEMWppvHmKLKCVyA"
    "90DwRLiDAhQiPAoOwN2HrMBNRgF6CJo5XEkTd5xRlOCCVY7nxJxYKoIc3BWrIJ0VtY0CZV3zUR7I8hn+HcO/Z4pG"
    "MZM7BN/QM29NYW8PiCVySXg32GTxcsxXts8L+N9S8Cv+EwvPwX/LrndLld8z/Eem+JkpfmSINtNfzfVfRbO3RX9P"
    "wRz/Jwu/A/wHlueKGf4XFojHgrAS6Llo4EfI7TnDafTajzyhcVUI/WgZ92J/gQrP8vKhXK5USvlCaL+9jZSlylH1"
    "6SGGotEk7AXoDQpwWroGwhfDqedhxoHtIOFX5qrgR4MRxq4KA2Qn0wmKabA+/zZCfTJ56rjJfEy8QpxMMF8Bi/XW"
    "KdMOpqhwjVOrA/3fjuvtXBOPHqeu8a53FcO4aD9bvnvCzztPyFPzVEVRXijL53tFqSiqpzQUxVPqHs2p6i18Rtbn"
    "G/xCWcVrForrZFXpSorqEiWiDC3iPdXDYGqFR/6FT3wr6HaMshOaC/3VyEPzs8TqnC+6bTdw5vqhrsW+FZpDVzPn"
    "1o/L2Alr8dq3NKPqnLYwl+I7B8bcblcj3Z95elCTUEcNCKceWMO+ZgZ6JMV6/exVX65KVrsqrfReu1owo3z1s4Wr"
    "nY37oeM364rfObjhNsNG7LZb/qBDOQZbPT/YnXNJj8o1jJFTNomxNTOyZHxO2Rp25dZqPsSoFTJ64pyoNOlt5rMc"
    "ZZeYOjGn5cA5OB9asrmgsHaCOx+NNv2G97d+nXiUtLG5FHXsnprJ8gZJ/5Puul81lI2eqmwejSbl2hT3TV3lRCf1"
    "eGctIoXfD211zy9ump436M7V2c37cKM/78tvg3WsrnAg5Mf25KcpSh474/FjezIZzfJv0CT2RxH+Xe5L+2WxhL9o"
    "5KNWw5/1S/yn8RdZoowX"
)


def test_a_damaged_column_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(zlib.decompress(base64.b64decode(DAMAGED_COLUMN)))
    with pytest.raises(ValueError, match=r"cannot be read as Parquet: .*histogram size mismatch"):
        list(read_rows([str(tmp_path / "a.parquet")]))


def test_a_bomb_of_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a" * 80_000_000]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"row group 0 has 80,0.* bytes, in a file of"):
        list(read_rows([str(tmp_path / "a.parquet")]))


# Secrets


def test_secrets_are_in_no_error_and_no_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    monkeypatch.setenv("WANDB_API_KEY", "key-of-this-test")
    said = "hf_of_this_test, key-of-this-test, https://me:word@host/a?token=abc, hf_" + "a1" * 17
    for error in (ValueError(said), OSError(said)):
        with pytest.raises(SystemExit), one_line_errors():
            raise error
        assert capsys.readouterr().err == ("error: ***, ***, https://***@host/a?token=***, ***\n")
    for section in (
        {"data": DataConfig(train=("https://me:word@host/a.jsonl",))},
        {"model": ModelConfig(path="hf_of_this_test")},
    ):
        with pytest.raises(ValueError, match="in the environment, such as HF_TOKEN") as error:
            Config(**section)
        assert "word@" not in str(error.value)
        assert "hf_of" not in str(error.value)
    assert "of_this_test" not in Config().to_json()


# Drawn damages; `fuzz.py` alone draws more of them.


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> fuzz_inputs.Readers:
    folder = tmp_path_factory.mktemp("fuzz")
    fuzz_inputs.make_seeds(folder / "seeds")
    return fuzz_inputs.Readers(folder / "seeds")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", fuzz_inputs.TARGETS)
def test_drawn_damage(
    readers: fuzz_inputs.Readers, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    monkeypatch.setattr(regexes, "SECONDS", 0.2)
    for number in range(3 * fuzz_inputs.TARGETS[target]):
        draws = random.Random(f"{target} {number}")
        end, why = fuzz.one(lambda: readers.read(target, draws, tmp_path))  # noqa: B023
        assert end != "failed", f"{target} {number}: {why}"
