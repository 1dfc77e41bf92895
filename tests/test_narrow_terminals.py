"""What a run prints in terminals of 40, 60 and 80 columns: no number is cut."""

from __future__ import annotations

import io
import re

import jax
import pytest
from rich.console import Console

import lorax_ft as lft
from lorax_ft.config import AdapterConfig, Config
from lorax_ft.run import report
from lorax_ft.run.module_table import ModuleRow
from lorax_ft.run.progress import Progress

WIDTHS = (40, 60, 80)


def console_of(width: int, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, highlight=False, force_terminal=terminal), file


def row(module: str, shape: str, rank: str, parameters: int) -> ModuleRow:
    return ModuleRow(
        module=module,
        matrices="32 of 80",
        shape=shape,
        rank=rank,
        scale="0.125–2.000",
        dtype="float32",
        sharding="lora_a (–, 'fsdp', –), lora_b (–, –, 'tensor')",
        parameters=parameters,
    )


LARGE = [
    row("layers/mlp/experts/down_proj", "14336 × 4096", "16–128 + m", 12_345_678_901),
    row("layers/post_attention_layernorm_of_another_name", "4096", "full", 131_072),
]


@pytest.mark.parametrize("width", [*WIDTHS, 100, 120])
def test_the_table_of_modules_fits_and_keeps_rank_and_parameters(width: int) -> None:
    columns = report.module_columns(LARGE, width=width)
    assert {"module", "rank", "parameters"} <= set(columns)
    assert columns["parameters"] == ["12,345,678,901", "131,072"]
    assert [cell.replace("\n", "") for cell in columns["module"]] == [r.module for r in LARGE]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(dora=True)])
def test_numbers_are_printed_whole(width: int, adapter: AdapterConfig) -> None:
    model = lft.load_model(Config().model.path)
    params = lft.add_adapters(model.params, adapter, layout=model.layout, key=jax.random.key(0))
    trained, _ = lft.partition(params)
    console, file = console_of(width)
    report.print_modules(console, params, trained, layout=model.layout)
    report.print_memory(console, {"trained leaves": trained}, temporaries=123_456_789_000)
    report.print_summary(console, [("throughput", "1,234,567 tokens/s")], title="Done")
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    cells = set(re.split(r"\s+", text))
    rows = report.module_rows(params, trained, layout=model.layout)
    assert {f"{r.parameters:,}" for r in rows} <= cells
    assert {"rank", "parameters", "123,456.8", "1,234,567"} <= cells
    if width >= 60:
        assert "384 × 128" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_config_is_broken_between_options(width: int) -> None:
    console, file = console_of(width)
    report.print_config(console, Config())
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for pair in ("learning_rate 0.0002", "max_length 256", "clip_norm 1.0", "limit None"):
        assert pair in text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bar_shows_whole_numbers(width: int) -> None:
    console, file = console_of(width, terminal=True)
    metrics = {"loss": 5.2041, "learning_rate": 2e-4}
    with Progress(console, first=0, steps=1000) as progress:
        progress.advance(1000, metrics, tokens=1)
    text = file.getvalue()
    assert "loss 5.2041" in text
    assert "1000/1000" in text
    assert "…" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_long_numbers_in_answers_are_folded(width: int) -> None:
    console, file = console_of(width)
    number = "123456789012345678901234567890"
    report.print_answers(console, "Answers", [number], {"reference": [number], "after": [number]})
    text = file.getvalue()
    assert "…" not in text
    assert sum(character.isdigit() for character in text) == 3 * len(number)
