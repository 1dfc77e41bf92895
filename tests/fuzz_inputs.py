"""What `fuzz.py` reads: real files of tiny models, how they are changed, and who reads them."""

from __future__ import annotations

import copy
import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = {
    "config": 14,
    "index": 8,
    "safetensors": 14,
    "model": 1,
    "adapter_config": 8,
    "adapter_weights": 2,
    "gguf": 4,
    "tokenizer": 3,
    "tokenizer_config": 2,
    "template": 6,
    "pattern": 8,
    "run_config": 8,
    "foreign_config": 8,
    "checksums": 2,
    "saved_dataset": 1,
    "questions": 3,
    "tools": 3,
    "jsonl": 6,
    "json": 6,
    "csv": 5,
    "gz": 4,
    "parquet": 4,
}
"""What is read, with its share of the inputs."""
ROWS = [
    {"messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
NASTY: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 255, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "é" * 3000, "\ud800", "\x00", "nan"),
    *("../../../etc/passwd", "/etc/passwd", "/dev/zero", "(a+)+$", "(", "llama", "auto", "[PAD]"),
    *([], {}, [[]], [None], [1, 2, 3], ["q_proj", 5], {"a": 1}, {"": {}}, [{}] * 50),
]
FOREIGN: list[dict[str, Any]] = [
    {
        "model_name_or_path": "m",
        "stage": "sft",
        "lora_rank": 8,
        "lora_target": "q_proj,v_proj",
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "learning_rate": 1e-4,
        "val_size": 0.1,
        "report_to": ["wandb", "none"],
        "warmup_steps": 20,
    },
    {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "rank_pattern": {"v_proj": 4},
        "layers_to_transform": [0, 1],
        "init_lora_weights": "loftq",
        "loftq_config": {"loftq_bits": 4, "loftq_iter": 2},
    },
    {"model": {"path": "m"}, "adapter": {"rank": 8, "targets": ["q_proj"]}},
]
"""Configs of LLaMA-Factory, of PEFT and of our own sections."""
NUMBERS = [0, 1, 2**31, 2**60, 2**64 - 1]
PIECES = [
    *("{{ 'a' * 10**9 }}", "{{ 9**9**9 }}", "{% for i in range(99999) %}", "{% endfor %}", "{{"),
    *("{% set x = x ~ x %}", "{{ messages }}", "{{ ''.__class__ }}", "}}", "{% if %}", "{%"),
    *("{{ '%999999999d' % 1 }}", "{{ 'a'.center(999999999) }}", "{{ [0] * 999999999 }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% generation %}", "{% endgeneration %}"),
    *("{{ messages[9]['x'] }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{# ", " #}"),
    *("{{ 'a'|indent(999999999) }}", "{% break %}", "{{ messages|tojson(indent=99999999) }}"),
]
REGEX_PIECES = [
    *("(", ")", "[", "]", "{", "}", "*", "+", "?", "|", ".", "\\", "^", "$", "(?:", "(?P<a>"),
    *("a", "q_proj", "layers", "[0-9]+", ".*", "(.*)*", "(a+)+", "{9,}", "{1,1000}", "\\d"),
    *("(?i)", "(?=", ","),
]
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 11)] + ["lm_head", "a" * 40]


def target_of(draws: random.Random, target: str | None) -> str:
    """The target of an input."""
    [drawn] = draws.choices(list(TARGETS), TARGETS.values())
    return target or drawn


def make_seeds(folder: Path) -> None:
    """Write the real files."""
    import checkpoint_cases
    import datasets
    import jax

    import lorax_ft as lft
    from lorax_ft.config import EMBEDDED_MODEL
    from lorax_ft.interop.load import load_model
    from lorax_ft.interop.peft import save_peft
    from lorax_ft.interop.save import save_model
    from lorax_ft.interop.save_gguf import save_gguf
    from lorax_ft.run.checksums import write_checksums

    folder.mkdir()
    model = checkpoint_cases.saved_model(folder / "model")
    save_model(folder / "shards", model.params, model, shard_bytes=3000)
    config = lft.AdapterConfig(rank=2, targets=("q_proj", "down_proj"))
    params = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(folder / "adapter", params, model)
    shutil.copytree(EMBEDDED_MODEL, folder / "tokenizer")
    embedded = load_model(EMBEDDED_MODEL)
    save_gguf(folder / "model.gguf", embedded.params, embedded)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/array").write_bytes(b"weights")
    write_checksums(folder / "checkpoint")
    (folder / "run.json").write_text(lft.Config().to_json())
    data = folder / "data"
    data.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (data / "a.jsonl").write_text(text)
    (data / "a.json").write_text(json.dumps(ROWS, indent=1))
    (data / "a.csv").write_text('prompt,completion\n"2 + 2",4\n"a ""b""",c\n')
    (data / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(data / "a.parquet"))
    table.save_to_disk(str(data / "saved"))
    (folder / "questions.jsonl").write_text(text)
    (folder / "tools.json").write_text(json.dumps(TOOLS))


def damaged(data: bytes, draws: random.Random, *, head: int | None = None) -> bytes:
    """Bytes with a few changes, in the first `head` bytes if given."""
    changed = bytearray(data)
    for _ in range(draws.randint(1, 6)):
        at = draws.randrange(min(len(changed), head or len(changed)) or 1)
        match draws.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([draws.randrange(256)])
            case 1:
                changed[at : at + 8] = draws.choice(NUMBERS).to_bytes(8, "little")
            case 2:
                del changed[at : at + draws.randint(1, 40)]
            case 3:
                changed[at:at] = changed[at : at + draws.randint(1, 40)]
            case 4:
                changed[at:at] = draws.randbytes(draws.randint(1, 9))
            case 5 if draws.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def changed_json(data: bytes, draws: random.Random) -> bytes:
    """JSON with a few values exchanged, removed or repeated; sometimes nested, or damaged."""
    value = json.loads(data)
    for _ in range(draws.randint(1, 4)):
        value = _changed_value(value, draws)
    text = json.dumps(value)
    if draws.random() < 0.03:
        text = text.replace("null", "[" * 100_000 + "]" * 100_000, 1)
    written = text.encode()
    return damaged(written, draws) if draws.random() < 0.15 else written


def _changed_value(value: Any, draws: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or draws.random() < 0.1:
        return copy.deepcopy(draws.choice(NASTY))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draws.choice(keys)
    chance = draws.random()
    if chance < 0.1:
        del value[key]
    elif chance < 0.15:
        other = draws.choice(keys)
        value[key] = value[other] if not isinstance(value[other], dict | list) else None
    else:
        value[key] = _changed_value(value[key], draws)
    return value


class Readers:
    """Reads changed files as a run would."""

    def __init__(self, seeds: Path) -> None:
        from lorax_ft.interop.load import load_model
        from lorax_ft.interop.tokenizer import load_tokenizer

        self._seeds = seeds
        self._loaded = load_model(seeds / "model")
        self._tokenizer = load_tokenizer(seeds / "tokenizer")
        self._template = self._tokenizer.chat_template

    def read(self, target: str, draws: random.Random, area: Path) -> None:
        """Change a file of this kind, and read it."""
        read: Callable[[random.Random, Path], None] = getattr(self, f"read_{target}")
        read(draws, area / target)

    def _folder(self, area: Path, seed: str) -> Path:
        if not area.exists():
            shutil.copytree(self._seeds / seed, area)
        return area

    def _json(self, draws: random.Random, folder: Path, seed: str, name: str) -> Path:
        """A folder in which one JSON file is changed."""
        self._folder(folder, seed)
        (folder / name).write_bytes(changed_json((self._seeds / seed / name).read_bytes(), draws))
        return folder

    def read_config(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.interop.huggingface import decoder_config, family_names
        from lorax_ft.interop.locate import read_model_config
        from lorax_ft.interop.params import load_params

        config = read_model_config(self._json(draws, area, "model", "config.json"))
        decoder = decoder_config(config, source="fuzz")
        if draws.random() < 0.02:  # tracing is slow
            load_params(
                decoder,
                {},
                names=family_names(config),
                source="fuzz",
                place=lambda path, shape, read, parts: None,
            )

    def read_index(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.interop.huggingface import read_folder

        read_folder(self._json(draws, area, "shards", "model.safetensors.index.json"))

    def read_safetensors(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.interop.lazy_tensor import lazy_tensors

        data = (self._seeds / "model/model.safetensors").read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        area.mkdir(exist_ok=True)
        if draws.random() < 0.5:
            head = changed_json(data[8:size], draws)
            data = len(head).to_bytes(8, "little") + head + data[size:]
        else:
            data = damaged(data, draws, head=size)
        file = area / "model.safetensors"
        file.write_bytes(data)
        for tensor in lazy_tensors(file).values():
            tensor.read(())

    def read_model(self, draws: random.Random, area: Path) -> None:
        """Load a whole model."""
        from lorax_ft.interop.load import load_model

        load_model(self._json(draws, area, "model", "config.json"))

    def read_adapter_config(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.interop.peft_checks import read_config
        from lorax_ft.interop.peft_config import is_excluded, rank_and_scale, without_tensors

        config = read_config(self._json(draws, area, "adapter", "adapter_config.json"))
        if config["peft_type"] == "LORA":
            for name in NAMES:
                rank_and_scale(config, name)
                is_excluded(name, config.get("exclude_modules"))
        without_tensors(config, NAMES, NAMES)

    def read_adapter_weights(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.interop.peft import load_peft

        folder = self._folder(area, "adapter")
        data = (self._seeds / "adapter/adapter_model.safetensors").read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        head = changed_json(data[8:size], draws)
        (folder / "adapter_model.safetensors").write_bytes(
            len(head).to_bytes(8, "little") + head + data[size:]
        )
        load_peft(folder, self._loaded)

    def read_gguf(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.interop.gguf import read_gguf

        area.mkdir(exist_ok=True)
        data = (self._seeds / "model.gguf").read_bytes()
        head = draws.choice([400, 3000, 40_000])
        (area / "model.gguf").write_bytes(damaged(data, draws, head=head))
        read_gguf(area / "model.gguf")

    def _tokenizer_file(self, draws: random.Random, area: Path, name: str) -> None:
        from lorax_ft.interop.encoding import run_tokenizer
        from lorax_ft.interop.end_tokens import ids_that_stop
        from lorax_ft.interop.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self._json(draws, area, "tokenizer", name))
        if tokenizer is not None:
            run_tokenizer(tokenizer, "What is 2 + 2?\n\tÉﷺ " + "a" * 50)
            ids_that_stop(tokenizer, {"eos_token_id": draws.choice([0, None, [0, 1]])})

    def read_tokenizer(self, draws: random.Random, area: Path) -> None:
        """Load a tokenizer, and read a text with it."""
        self._tokenizer_file(draws, area, "tokenizer.json")

    def read_tokenizer_config(self, draws: random.Random, area: Path) -> None:
        """The same."""
        self._tokenizer_file(draws, area, "tokenizer_config.json")

    def read_template(self, draws: random.Random, area: Path) -> None:
        """Render a conversation."""
        from lorax_ft.data.conversation import as_conversation
        from lorax_ft.data.template import render

        text = self._template
        for _ in range(draws.randint(1, 3)):
            at = draws.randrange(len(text) + 1)
            text = text[:at] + draws.choice(PIECES) + text[at + draws.choice([0, 0, 5]) :]
        self._tokenizer.chat_template = text
        render(as_conversation(ROWS[0]["messages"]), self._tokenizer)

    def read_pattern(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.evaluation.exact_match import extract
        from lorax_ft.lowrank.patterns import matches

        pattern = "".join(draws.choices(REGEX_PIECES, k=draws.randint(1, 8)))
        for name in NAMES:
            matches(pattern, name.replace(".", "/"))
        extract("the answer is 42, a" + "a" * 30, pattern=pattern)

    def read_run_config(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.config import Config
        from lorax_ft.files import read_text

        area.mkdir(exist_ok=True)
        (area / "config.json").write_bytes(
            changed_json((self._seeds / "run.json").read_bytes(), draws)
        )
        Config.from_json(read_text(area / "config.json"))

    def read_foreign_config(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.config.load import read_config

        area.mkdir(exist_ok=True)
        text = json.dumps(draws.choice(FOREIGN), indent=draws.choice([None, 2])).encode()
        if draws.random() < 0.5:
            (area / "a.json").write_bytes(changed_json(text, draws))
            read_config(area / "a.json", {"data.train"})
        else:
            # JSON is YAML too.
            (area / "a.yaml").write_bytes(damaged(text, draws))
            read_config(area / "a.yaml", {"data.train"})

    def read_checksums(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.run.checksums import find_damage

        find_damage(self._json(draws, area, "checkpoint", "checksums.json"))

    def read_saved_dataset(self, draws: random.Random, area: Path) -> None:
        shutil.rmtree(area, ignore_errors=True)
        name = draws.choice(["state.json", "dataset_info.json"])
        self._rows(self._json(draws, area, "data/saved", name))

    def read_questions(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.data.conversation import Conversation
        from lorax_ft.inference.questions import read_questions

        area.mkdir(exist_ok=True)
        lines = (self._seeds / "questions.jsonl").read_bytes().splitlines()
        (area / "a.jsonl").write_bytes(b"\n".join(changed_json(line, draws) for line in lines))
        read_questions(area / "a.jsonl", Conversation(messages=[]))

    def read_tools(self, draws: random.Random, area: Path) -> None:
        from lorax_ft.data.tools import read_tools

        area.mkdir(exist_ok=True)
        (area / "tools.json").write_bytes(
            changed_json((self._seeds / "tools.json").read_bytes(), draws)
        )
        read_tools(str(area / "tools.json"), "--tools")

    def _data(self, draws: random.Random, area: Path, name: str, data: bytes) -> None:
        area.mkdir(exist_ok=True)
        (area / name).write_bytes(data)
        self._rows(area / name)

    def _rows(self, path: Path) -> None:
        from lorax_ft.config import DataConfig
        from lorax_ft.data.bad_rows import BadRows
        from lorax_ft.data.examples import Seen, examples_of, numbered_rows

        config = DataConfig()
        bad = BadRows(skip=True)
        rows = numbered_rows([str(path)], "train", config, bad=bad)
        for _ in examples_of(rows, config, Seen(bad=bad)):
            pass

    def _seed_data(self, name: str) -> bytes:
        return (self._seeds / "data" / name).read_bytes()

    def read_jsonl(self, draws: random.Random, area: Path) -> None:
        lines = self._seed_data("a.jsonl").splitlines()
        text = b"\n".join(changed_json(line, draws) for line in lines)
        self._data(draws, area, "a.jsonl", text)

    def read_json(self, draws: random.Random, area: Path) -> None:
        """Rows of a JSON list."""
        self._data(draws, area, "a.json", changed_json(self._seed_data("a.json"), draws))

    def read_csv(self, draws: random.Random, area: Path) -> None:
        self._data(draws, area, "a.csv", damaged(self._seed_data("a.csv"), draws))

    def read_gz(self, draws: random.Random, area: Path) -> None:
        self._data(draws, area, "a.jsonl.gz", damaged(self._seed_data("a.jsonl.gz"), draws))

    def read_parquet(self, draws: random.Random, area: Path) -> None:
        self._data(draws, area, "a.parquet", damaged(self._seed_data("a.parquet"), draws))
