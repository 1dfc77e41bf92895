"""The scripts for a fine-tuned model: options, one-line errors, generate, chat, merge, export."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import randomized
from generation_cases import asked

from lorax_ft import cli
from lorax_ft.commands import export as export_command
from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig, Config, ModelConfig, PromptConfig
from lorax_ft.inference.texts import answer
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.interop.save_gguf import save_gguf
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.models.model import Model
from lorax_ft.models.soft_prompt import add_soft_prompt
from lorax_ft.run.memory import describe_memory
from lorax_ft.run.model_args import ModelArgs, locate
from lorax_ft.tree import Tree, flatten

ROOT = Path(__file__).parent.parent
CACHE = str(jax.config.jax_compilation_cache_dir)


def test_locate(tmp_path: Path) -> None:
    run = tmp_path / "pissa"
    run.mkdir()
    (run / "config.json").write_text(
        Config(model=ModelConfig(path="base", dtype="bfloat16")).to_json()
    )
    with pytest.raises(ValueError, match="has not finished"):
        locate(ModelArgs(run=str(run)))
    (run / "model").mkdir()
    config, adapter = locate(ModelArgs(run=str(run)))
    assert (config.model.path, config.model.dtype, adapter) == (
        str(run / "model"),
        "bfloat16",
        None,
    )
    (run / "adapter").mkdir()
    config, adapter = locate(ModelArgs(run=str(run), dtype="float32"))
    assert (config.model.path, config.model.dtype, adapter) == ("base", "float32", run / "adapter")
    (run / "nf4_base").mkdir()
    config, adapter = locate(ModelArgs(run=str(run)))
    assert (config.model.path, adapter) == (str(run / "nf4_base"), run / "adapter")
    with pytest.raises(ValueError, match=r"there is no run at .*; did you mean .*/pissa\?"):
        locate(ModelArgs(run=str(tmp_path / "pisa")))
    with pytest.raises(ValueError, match=r"contains no adapter: adapter_config\.json is missing"):
        locate(ModelArgs(model="base", adapter=str(tmp_path)))
    assert locate(ModelArgs(model="base", quant="nf4"))[0].quant.format == "nf4"
    with pytest.raises(ValueError, match="--quant goes with --model"):
        ModelArgs(run="out", quant="nf4")


@dataclasses.dataclass(frozen=True)
class Options:
    count: int = 1
    """How many."""
    mode: str = "a"
    """Which."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}; it must be 0 or more")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], "Unrecognized options: --cuont; did you mean --count?"),
        (["--count", "three"], "--count is 'three'; it takes a whole number"),
        (["--count", "-3"], "count is -3; it must be 0 or more"),
        (["--count"], "--count"),
    ],
)
def test_arguments_fail_in_one_line(argv: list[str], message: str) -> None:
    assert cli.parse(Options, argv=["--count", "2"], default=Options(mode="b")) == Options(2, "b")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        cli.parse(Options, argv=argv)
    assert "\n" not in str(error.value)
    assert not set("│╭─") & set(str(error.value))


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            2,
            "error: a.txt: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_one_line_errors(
    error: BaseException,
    status: int,
    printed: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        raise error
    assert end.value.code == status
    assert capsys.readouterr().err == printed


def test_scripts(speaker: Model, params: Callable[[str], Tree], tmp_path: Path) -> None:
    """An adapter on disk answers; merged, it gives the same answer; then bad input."""
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    save_model(base, speaker.params, speaker)
    save_peft(run / "adapter", params("lora"), dataclasses.replace(speaker, source=str(base)))
    (run / "config.json").write_text(Config(model=ModelConfig(path=str(base))).to_json())

    def call(script: str, *args: str, said: str = "") -> tuple[int, str, str]:
        command = [sys.executable, f"scripts/{script}.py", *args]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": CACHE}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, input=said
        )
        return done.returncode, done.stdout, done.stderr

    assert call("merge", "--run", str(run), "--output", str(merged))[::2] == (0, "")
    model = load_model(merged)
    expected, before = (
        answer(model, p, [asked("w7 w8")], max_new_tokens=8)[0]
        for p in (model.params, speaker.params)
    )
    assert expected != before
    asking = call("generate", "--run", str(run), "w7 w8", "--max-new-tokens", "8")
    assert asking == (0, f"{expected}\n", "")
    message = f"error: {merged} is not empty; give another folder, "
    message += "or --overwrite to replace the model in it\n"
    assert call("merge", "--run", str(run), "--output", str(merged)) == (2, "", message)
    message = f"error: there is no run at {tmp_path / 'rum'}; did you mean {run}?\n"
    assert call("generate", "--run", str(tmp_path / "rum"), "w7") == (2, "", message)
    _, _, errors = call("generate", "--run", str(run), "--template_args", "a=1", "w7 w8")
    assert "has 'w7 w8', which is no name=value; a question goes before the options" in errors
    (tmp_path / "questions.txt").write_text("w7 w8\n\nw9\n")
    status, printed, _ = call(
        "generate",
        "--run",
        str(run),
        "--file",
        f"{tmp_path}/questions.txt",
        *["--max-new-tokens", "8"],
    )
    assert status == 0
    assert json.loads(printed.splitlines()[0]) == {"question": "w7 w8", "answer": expected}
    assert len(printed.splitlines()) == 2
    (tmp_path / "questions.txt").write_text("w7 w8\n\n" + "w9 " * 2048)
    message = f"error: {tmp_path}/questions.txt, line 3: 2051 tokens plus max_new_tokens 8 exceed "
    refused = call(
        "generate",
        "--run",
        str(run),
        "--file",
        f"{tmp_path}/questions.txt",
        "--max-new-tokens",
        "8",
    )
    assert refused[:2] == (2, "")
    assert refused[2].startswith(message)
    said = "w7 w8\n/clear\n/adapter off\nw7 w8\n/clear\n/adapter on\nw7 w8\n"
    said += "/nonsense\n/adapter nowhere\n/adapter\n/exit\nw1\n"
    status, printed, errors = call("chat", "--run", str(run), "--max-new-tokens", "8", said=said)
    assert status == 0
    lines = [line.strip() for line in printed.splitlines()]
    assert lines[:7] == [
        expected,
        "cleared",
        "adapter: off",
        before,
        "cleared",
        "adapter: on",
        expected,
    ]
    assert lines[7:] == ["adapter: on; /adapter on, off or PATH changes this"]
    wrong = errors.splitlines()
    assert wrong[0] == "error: unknown command /nonsense; /help lists the commands"
    assert wrong[1].startswith("error: there is no folder nowhere")
    assert len(wrong) == 2
    # The same adapter twice.
    for weights, text in (
        (("0.5", "0.5"), expected),
        (("0", "0"), before),
    ):
        folder = tmp_path / f"merged{weights[0]}"
        twice = ["--also", str(run / "adapter"), "--weights", *weights, "--output", str(folder)]
        assert call("merge", "--run", str(run), *twice)[::2] == (0, "")
        merged_model = load_model(folder)
        assert answer(merged_model, merged_model.params, [asked("w7 w8")], max_new_tokens=8) == [
            text
        ]
    _, _, errors = call("merge", "--model", str(base), "--output", "x")
    assert errors == "error: there is no adapter to merge; give its folder with --adapter\n"
    _, _, errors = call("merge", "--run", str(run), "--also", "none", "--output", "x")
    assert errors.startswith("error: there is no adapter at none")
    status, _, errors = call("merge", "--run", str(run), "--weights", "1", "2", "--output", "x")
    assert status == 2
    assert errors.startswith("error: --weights has 2 values for 1 adapters; give one for each")


def test_export(
    speaker: Model, params: Callable[[str], Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each export is loaded again, if its loader is installed; unsupported exports say why."""
    save_model(tmp_path / "base", speaker.params, speaker)
    speaker = load_model(tmp_path / "base")
    save_peft(tmp_path / "lora", params("lora"), speaker)
    dora = add_adapters(
        speaker.params,
        AdapterConfig(rank=4, dora=True),
        layout=speaker.layout,
        key=jax.random.key(1),
    )
    save_peft(tmp_path / "dora", dora, speaker)
    at_table = AdapterConfig(rank=4, targets=("embed_tokens", "q_proj"))
    table = randomized(
        add_adapters(speaker.params, at_table, layout=speaker.layout, key=jax.random.key(1))
    )
    save_peft(tmp_path / "table", table, speaker)

    def export(adapter: str, target: str, output: str, *rest: str) -> str:
        where = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / adapter)]
        given = [*where, "--target", target, "--output", str(tmp_path / output), *rest]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            export_command.export(cli.parse(export_command.Args, argv=given))
        return said.getvalue()

    assert "PeftModel" in export("lora", "peft", "peft")
    assert_close(
        logits(speaker, load_peft(tmp_path / "peft", speaker)), logits(speaker, params("lora"))
    )
    assert "--max-lora-rank 16" in export("lora", "vllm", "vllm")
    assert json.loads((tmp_path / "vllm/adapter_config.json").read_text())["use_dora"] is False
    assert "merged" in export("dora", "vllm", "vllm_dora")
    assert_close(logits(load_model(tmp_path / "vllm_dora")), logits(speaker, dora))
    assert "merged" in export("table", "vllm", "vllm_table")
    assert_close(logits(load_model(tmp_path / "vllm_table")), logits(speaker, table))
    assert "AutoModelForCausalLM" in export("lora", "hf", "hf")
    assert_close(logits(load_model(tmp_path / "hf")), logits(speaker, params("lora")))
    with pytest.raises(
        ValueError, match=r"rank 4, above max_lora_rank 1: export with --max-lora-rank 8"
    ):
        export("lora", "vllm", "other", "--max-lora-rank", "1")
    with monkeypatch.context() as only:
        only.setattr("lorax_ft.interop.vllm.RANKS", (1,))
        with pytest.raises(ValueError, match=r"rank 4, .* vLLM takes no higher one; merge it"):
            export("lora", "vllm", "other", "--max-lora-rank", "1")
    with pytest.raises(ValueError, match=r"max_lora_rank is 3; vLLM takes 1, 8"):
        export("lora", "vllm", "other", "--max-lora-rank", "3")
    with pytest.raises(ValueError, match=r"hf is not empty; give another folder, or --overwrite"):
        export("lora", "hf", "hf")
    with pytest.raises(
        ValueError, match=r"tokenizer of .* cannot be written as GGUF; supported: SentencePiece"
    ):
        export("lora", "gguf", "tuned.gguf", "--gguf-type", "F16")
    with pytest.raises(ValueError, match=r"is not a .gguf file"):
        export("lora", "gguf", "tuned.bin")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "tuned.gguf").exists()


def test_export_says_how_an_adapter_is_loaded(
    speaker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would load the LoRA without its soft prompt, and has no bottleneck adapters."""
    save_model(tmp_path / "base", speaker.params, speaker)
    model = load_model(tmp_path / "base")
    key = jax.random.key(0)

    def export(name: str, target: str, *, method: Any = "lora", prompt: bool = False) -> str:
        config = AdapterConfig(rank=2, method=method, targets=("q_proj",))
        tree = add_adapters(model.params, config, layout=model.layout, key=key)
        if prompt:
            tree = add_soft_prompt(tree, PromptConfig(kind="prompt", init="random"), model, key=key)
        save_peft(tmp_path / name, tree, model)
        given = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / name)]
        output = str(tmp_path / f"{name}_{target}")
        monkeypatch.setattr(sys, "argv", ["lorax-ft export"])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            argv = [*given, "--target", target, "--output", output]
            export_command.export(cli.parse(export_command.Args, argv=argv))
        assert "load_peft" in (Path(output) / "README.md").read_text() or method == "lora"
        return said.getvalue()

    assert export("lora", "peft").endswith("load it with PeftModel.from_pretrained\n")
    said = export("both", "peft", prompt=True)
    assert "its soft prompt lies in soft_prompt, and PeftModel.from_pretrained would" in said
    assert 'subfolder="soft_prompt"' in (tmp_path / "both_peft/README.md").read_text()
    assert "README.md shows how lorax_ft loads it" in export("net", "peft", method="bottleneck")
    with pytest.raises(ValueError, match=r"merged.*; lorax-ft export --target peft writes it"):
        export("both", "hf", prompt=True)
    with pytest.raises(ValueError, match=r"no soft prompt is written for vLLM.*--target peft"):
        export("both", "vllm", prompt=True)
    for target in ("hf", "vllm"):
        with pytest.raises(
            ValueError, match=r"lorax-ft generate .* run it as it is; train"
        ) as error:
            export("net", target, method="bottleneck")
        assert "peft" not in str(error.value)


def logits(model: Model, params: Tree | None = None) -> np.ndarray:
    return np.asarray(
        model.apply({"params": params or model.params}, jnp.arange(24).reshape(2, 12))
    )


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "step"), [("F16", 2**-11), ("Q8_0", 1 / 127)])
def test_the_embedded_model_as_gguf(tmp_path: Path, kind: Any, step: float) -> None:
    model = load_model(EMBEDDED_MODEL)
    config = AdapterConfig(rank=4, init="pissa")
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    (tmp_path / "link.gguf").symlink_to("tiny.gguf")
    save_gguf(tmp_path / "link.gguf", params, model, kind=kind)
    again = load_model(tmp_path / "tiny.gguf")
    for path, leaf in flatten(again.params).items():
        want = np.asarray(flatten(model.params)[path])
        assert np.abs(leaf - want).max() <= step * np.abs(want).max(), path
    text = "Tom has 14 apples.\n<|im_start|>user"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert answer(again, again.params, [chat], max_new_tokens=8) == answer(
        model, model.params, [chat], max_new_tokens=8
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "tiny.gguf"]
    assert (tmp_path / "link.gguf").is_symlink()


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """JAX's own error, of an array of 64 TiB."""
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        jax.block_until_ready(jnp.zeros(2**44, jnp.float32))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the memory is too small: Out of memory allocating")
    # 2^44 numbers of 4 bytes.
    assert "allocating 70,368.74 GB, but this machine has" in said
    assert "lorax-ft plan finds what fits" in said
    assert said.count("\n") == 1


def test_too_little_memory_of_the_host_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """NumPy's own error, of an array of 64 TiB."""
    with pytest.raises(SystemExit) as end, cli.one_line_errors():
        np.ones(2**44, np.float32)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the memory is too small: Unable to allocate 64.0 TiB")
    assert "lorax-ft plan finds what fits" in said
    assert said.count("\n") == 1


def test_the_memory_of_an_accelerator_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 80 * 10**9, "bytes_in_use": 65 * 10**9}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert describe_memory() == "a device has 80.00 GB, of which 15.00 GB are free"
