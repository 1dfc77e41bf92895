"""The public API: what the README and `import lorax_ft` promise."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lorax_ft
from lorax_ft import cli, config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def test_every_public_name_can_be_imported() -> None:
    assert [name for name in lorax_ft.__all__ if getattr(lorax_ft, name).__doc__ is None] == []
    with pytest.raises(AttributeError, match="no attribute 'lorra'"):
        lorax_ft.lorra  # noqa: B018


def test_importing_everything_pulls_in_no_other_framework_and_is_quick() -> None:
    code = """
import sys, time, jax
began = time.process_time()
import lorax_ft
from lorax_ft import config
for name in lorax_ft.__all__: getattr(lorax_ft, name)
heavy = ("torch", "tensorflow", "tensorboardX", "matplotlib")
print(time.process_time() - began, *[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *frameworks = done.stdout.split()
    assert frameworks == []
    assert float(seconds) < 6  # of CPU time; it takes about two


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_survives_its_json(path: Path) -> None:
    config = lorax_ft.load_config(path)
    assert lorax_ft.Config.from_json(config.to_json()) == config
    text = path.read_text()
    assert f"python scripts/train.py --config configs/{path.name}" in text


def test_help_is_quick_and_has_a_sentence_for_each_option() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - began < 5  # half a second on an idle machine
    assert "jax" not in done.stderr
    for option in ("--adapter.rank", "--train.resume", "--data.fields", "--dry-run"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("section", "fields", "said"),
    [
        (
            "AdapterConfig",
            {"init": "pisa"},
            "adapter.init is 'pisa'; it must be one of kaiming, .*mean 'pissa'",
        ),
        ("AdapterConfig", {"rank": "8"}, "adapter.rank is '8'; it must be an integer"),
        ("AdapterConfig", {"rank": 8.0}, "adapter.rank is 8.0; it must be an integer"),
        (
            "AdapterConfig",
            {"layers": (2**70,)},
            r"adapter.layers is 1180.*; it must be below 2\^63",
        ),
        (
            "OptimConfig",
            {"weight_decay": 10**400},
            r"optim.weight_decay is 1000.*must be below 2\^63",
        ),
        ("AdapterConfig", {"dora": 1}, "adapter.dora is 1; it must be True or False"),
        (
            "AdapterConfig",
            {"targets": ["q_proj"]},
            "adapter.targets is .*; it must be a tuple, each entry a string",
        ),
        (
            "AdapterConfig",
            {"freeze": ("lora_c",)},
            "adapter.freeze is .*each entry one of lora_a, lora_b",
        ),
        ("AdapterConfig", {"svd_iterations": True}, "it must be an integer or None"),
        ("ModelConfig", {"dtype": "bfloat"}, "model.dtype is 'bfloat'; .*mean 'bfloat16'"),
        (
            "OptimConfig",
            {"learning_rate": "1e-4"},
            "optim.learning_rate is '1e-4'; it must be a number",
        ),
        (
            "DataConfig",
            {"train": "questions.jsonl"},
            "data.train is 'questions.jsonl'; it must be a tuple",
        ),
        ("Config", {"quant": "nf4"}, "^quant is 'nf4'; it must be QuantConfig"),
    ],
)
def test_values_written_in_a_file_are_checked(section: str, fields: dict, said: str) -> None:
    """An int is accepted for a float field."""
    with pytest.raises(ValueError, match=said):
        getattr(config, section)(**fields)
    assert config.AdapterConfig(alpha=8).alpha == 8


def test_start_from_is_a_deprecated_name_of_continue_from(capsys: pytest.CaptureFixture) -> None:
    """From Python, from a saved config.json and from the command line."""
    new = config.AdapterConfig(continue_from="folder")
    with pytest.warns(DeprecationWarning, match=r"use adapter\.continue_from") as caught:
        old = config.AdapterConfig(start_from="folder")
    assert caught[0].filename == __file__
    assert old == new
    assert dataclasses.replace(old, continue_from="other").continue_from == "other"

    run = config.Config(adapter=old)
    assert config.Config.from_json(run.to_json()) == run
    saved = json.loads(run.to_json())
    saved["adapter"]["start_from"] = saved["adapter"].pop("continue_from")
    with pytest.warns(DeprecationWarning, match=r"use adapter\.continue_from"):
        assert config.Config.from_json(json.dumps(saved)) == run

    assert cli.parse(config.Config, argv=["--adapter.start_from", "folder"]) == run
    printed = "warning: adapter.start_from is deprecated; use adapter.continue_from\n"
    assert capsys.readouterr().err == printed

    with pytest.raises(ValueError, match="continue_from only"):
        config.AdapterConfig(start_from="folder", continue_from="other")
    with pytest.raises(ValueError, match="continue_from only"):
        cli.parse(config.Config, default=run, argv=["--adapter.start_from", "other"])
