"""The notebooks that take a minute or more, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
from notebook_cases import executed


def test_a_slice_of_simulated_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The notebook asks for its devices itself.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    printed = executed("tpu_slice", tmp_path, {"steps=12": "steps=4"})
    assert "8 × cpu, simulated" in printed
    assert "up_proj of all layers: (6, 128, 384) P(" in printed
    assert (tmp_path / "out/slice/adapter/adapter_model.safetensors").is_file()


def test_qlora(tmp_path: Path) -> None:
    printed = executed("qlora", tmp_path, {"steps=40": "steps=4"})
    assert "{'bfloat16': 16.0, 'int8': 8.25, 'nf4': 4.13}" in printed
    for name in ("LoRA", "QLoRA"):
        assert (tmp_path / "out" / name / "adapter/adapter_model.safetensors").is_file()


def test_a_comparison(tmp_path: Path) -> None:
    executed("compare_methods", tmp_path, {"steps=20": "steps=4"})
    report = (tmp_path / "out/methods-comparison/comparison.md").read_text()
    assert "| PiSSA | 0.003 |" in report
