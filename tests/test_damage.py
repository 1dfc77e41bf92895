"""Wrong adapters and damaged files: a one-line error from every script; the output is kept."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from run_cases import script_main
from safetensors.numpy import load_file, save_file

from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import save_peft
from lorax_ft.lowrank.adapters import add_adapters

ROOT = Path(__file__).parent.parent
Tensors = dict[str, np.ndarray]


def wider(tensors: Tensors) -> Tensors:
    return {
        name: np.repeat(value, 2, axis=int("lora_A" in name)) for name, value in tensors.items()
    }


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


DAMAGES: dict[str, tuple[str, Callable[[Tensors], Tensors] | int, str]] = {
    "wider": (
        "adapter/adapter_model",
        wider,
        "lora_a of layers/self_attn/q_proj has the shape (2, 256); the model needs (2, 128)",
    ),
    "deeper": (
        "adapter/adapter_model",
        renamed("layers.5", "layers.17"),
        "the model has no module model.layers.17.self",
    ),
    "shallower": (
        "adapter/adapter_model",
        lambda tensors: {name: value for name, value in tensors.items() if "layers.5" not in name},
        "targets model.layers.5.self_attn.q_proj, "
        "but adapter_model.safetensors holds no tensor for it; is it another",
    ),
    "mixtral": (
        "adapter/adapter_model",
        renamed("self_attn.q_proj", "mlp.experts.0.w1"),
        "no module model.layers.0.mlp",
    ),
    "gpt2": (
        "adapter/adapter_model",
        renamed("model.layers", "transformer.h"),
        "no module transformer.h.0.self_attn",
    ),
    "stacked": (
        "adapter/adapter_model",
        renamed("self_attn.q_proj", "mlp.experts"),
        "no module model.layers.0.mlp.exp",
    ),
    "cut adapter": (
        "adapter/adapter_model",
        -100,
        "adapter/adapter_model.safetensors cannot be read",
    ),
    "cut header": (
        "adapter/adapter_model",
        100,
        "adapter/adapter_model.safetensors cannot be read",
    ),
    "empty": ("adapter/adapter_model", 0, "adapter/adapter_model.safetensors cannot be read"),
    "cut model": ("base/model", -100, "base/model.safetensors cannot be read"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter for it."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(EMBEDDED_MODEL, folder / "base")
    model = load_model(folder / "base")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    save_peft(
        folder / "adapter",
        add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)),
        model,
    )
    return folder


def call(monkeypatch: pytest.MonkeyPatch, script: str, *argv: str) -> int:
    """Run a command and return its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    try:
        script_main(script)()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_scripts_refuse(
    good: Path,
    damage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    stem, change, message = DAMAGES[damage]
    file = Path(f"{stem}.safetensors")
    if isinstance(change, int):
        file.write_bytes(file.read_bytes()[:change])
    else:
        save_file(change(load_file(file)), file)
    Path("out").mkdir()
    Path("out/config.json").write_text("old")
    Path("out.gguf").write_text("old")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    tuned = ["--model", "base", "--adapter", "adapter"]
    exports = [
        ("export", *tuned, "--target", target, "--output", "out")
        for target in ("peft", "vllm", "hf")
    ]
    training = [
        "--config",
        str(ROOT / "configs/lora.py"),
        "--model.path",
        "base",
        "--adapter.continue_from",
        "adapter",
    ]
    for command in (
        ("generate", *tuned, "2 + 2"),
        ("chat", *tuned),
        ("merge", *tuned, "--output", "out", "--overwrite"),
        *((*command, "--overwrite") for command in exports),
        ("export", *tuned, "--target", "gguf", "--output", "out.gguf", "--overwrite"),
        ("train", *training, "--train.output", "run"),
    ):
        assert call(monkeypatch, *command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_chat_goes_on_with_the_adapter_it_has(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(good / "adapter", tmp_path / "cut")
    file = tmp_path / "cut/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    typed = iter([f"/adapter {tmp_path}/cut", "/adapter on", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert (
        call(monkeypatch, "chat", "--model", str(good / "base"), "--adapter", str(good / "adapter"))
        == 0
    )
    said = capsys.readouterr()
    assert "cut/adapter_model.safetensors cannot be read" in said.err
    assert said.out == "adapter: on\n"
