"""Configs of LLaMA-Factory run: one for some steps, and its own examples as dry runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from run_cases import Main

from lorax_ft.config import EMBEDDED_DATA, EMBEDDED_MODEL
from lorax_ft.run.log import read_log

MIRROR = os.environ.get("LORAX_FT_LLAMA_FACTORY", "")
"""A git repository of LLaMA-Factory, where there is one: its git directory."""
EXAMPLES = [
    *(
        "train_lora/qwen3_lora_sft",
        "train_lora/qwen3_lora_sft_ds3",
        "train_lora/qwen3_lora_sft_ray",
    ),
    *("train_qlora/qwen3_lora_sft_otfq", "train_qlora/qwen3_lora_sft_bnb_npu"),
    *("train_full/qwen3_full_sft", "extras/pissa/llama3_lora_sft"),
    *("extras/loraplus/llama3_lora_sft", "extras/oft/llama3_oft_sft"),
    *("extras/fsdp_qlora/llama3_lora_sft", "extras/qoft/llama3_oft_sft_bnb_npu"),
]


def test_a_config_of_llama_factory_trains(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = {"prompt": "question", "response": "answer"}
    file = str(Path(EMBEDDED_DATA) / "train.jsonl")
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(
        json.dumps({"sums": {"file_name": file, "columns": columns}})
    )
    keys = {"model_name_or_path": EMBEDDED_MODEL, "stage": "sft", "dataset": "sums"}
    keys |= {"cutoff_len": 80, "max_samples": 300, "val_size": 0.1, "learning_rate": 3e-3}
    keys |= {"per_device_train_batch_size": 2, "warmup_steps": 2, "output_dir": "saves/it"}
    Path("run.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items()))
    assert main("--config", "run.yaml", "--train.steps", 12) == 0
    log = [line["loss"] for line in read_log(tmp_path / "saves/it") if "loss" in line]
    assert len(log) == 12
    assert log[-1] < log[0] - 1


@pytest.mark.skipif(not MIRROR, reason="LORAX_FT_LLAMA_FACTORY is not set")
# The examples name templates of other models than the embedded one.
@pytest.mark.filterwarnings("ignore:model.chat_template")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_llama_factory_is_a_dry_run(
    name: str,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    git = ["git", f"--git-dir={MIRROR}", "show", f"HEAD:examples/{name}.yaml"]
    shown = subprocess.run(git, capture_output=True, text=True, check=True)
    Path("run.yaml").write_text(shown.stdout)
    ours = ["--model.path", EMBEDDED_MODEL, "--data.train", EMBEDDED_DATA]
    ours += ["--data.max_length", "80", "--data.num_proc", "1"]
    assert main("--config", "run.yaml", *ours, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "run.yaml, read as LLaMA-Factory's:" in out
    assert "of accumulation" in out
    assert "trainable parameters" in out
