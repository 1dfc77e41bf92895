"""Bad input ends a run with a one-line error and changes no file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_cases import ROOT, SHORT, Main, config
from safetensors.numpy import save_file

import lorax_ft as lft

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--adapter.rnk", "4"], "did you mean --adapter.rank"),
        (["--adapter.rank", "0"], "adapter.rank is 0"),
        (["--adapter.rank", "1000"], "rank 1000 is above the larger side"),
        (["--adapter.targets", "q_porj"], "did you mean 'q_proj'"),
        (["--adapter.layers", "99"], "there is no layer 99"),
        (["--model.path", "/no/such/model"], "/no/such/model"),
        (["--data.train", "no_such.jsonl"], "no_such.jsonl"),
        (["--data.train", "bad.jsonl"], "bad.jsonl, line 2"),
        (["--data.train", "empty.jsonl"], "no rows"),
        (["--data.train", "mute.jsonl"], "mute.jsonl, line 1"),
        (["--model.path", "bert"], "llama"),
        (["--optim.learning_rate", "-1"], "optim.learning_rate is -1"),
        (["--optim.schedule", "cosin"], "cosin"),
        (["--train.microbatches", "3"], "microbatches 3; 2 or 4 microbatches would"),
        (["--train.microbatches", "9"], "microbatches 9; 8 microbatches would"),
        (["--train.router_aux_loss_coef", "0.01"], "has no experts to balance"),
        (["--train.router_aux_loss_coef", "-1"], "train.router_aux_loss_coef is -1"),
        (["--mesh.fsdp", "3"], "mesh.context × mesh.tensor must be 1, 2, 4 or 8, not 3"),
        (["--mesh.data", "3"], "fit 8 devices; with these others, mesh.data must be 4, or -1"),
        (["--mesh.fsdp", "0"], "mesh.fsdp is 0; it must be above 0"),
        (
            ["--mesh.tensor", "-1"],
            "mesh.tensor is -1; it must be above 0; only mesh.data may be -1",
        ),
        (["--mesh.fsdp", "1", "--mesh.expert", "2"], "has no experts; mesh.fsdp splits"),
        (
            ["--model.path", "sparse", "--mesh.fsdp", "1", "--mesh.expert", "2"],
            "mesh.expert is 2, which does not divide the 3 experts of sparse; 1 or 3 would",
        ),
        (["--train.batch_size", "12"], "a batch_size of 8 or 16 would"),
        (["--train.batch_size", "4"], "a batch_size of 8 would"),
        (
            ["--mesh.context", "8", "--data.max_length", "100"],
            "data.max_length is 100, which does not divide over mesh.context 8 devices; 96 or 104",
        ),
        (["--train.batch_size", "2"], "or split each row, with mesh.context 4"),
        (
            [
                "--train.output",
                "old",
                "--train.overwrite",
                "--adapter.continue_from",
                "old/adapter",
            ],
            "adapter.continue_from old/adapter lies in old, which train.overwrite deletes",
        ),
        (["--adapter.continue_from", "notes"], "notes holds no adapter_config.json"),
        (["--train.output", "notes"], "holds no run"),
        (["--train.output", "old", "--train.resume", "never"], "already holds a run"),
        (["--train.output", "old"], "but the run to resume in old had"),
        (["--train.output", "fresh", "--train.resume", "always"], "no run to resume"),
        (["--config", "configs/lroa.py"], "did you mean configs/lora.py?"),
        (["--config", "bad.jsonl"], "bad.jsonl is neither a .py file with get_config() nor"),
        (["--quant.rounds", "3"], "quant.rounds is 3, which has no effect here"),
        (
            ["--quant.format", "int8", "--adapter.init", "pissa"],
            "a changed int8 base cannot be saved",
        ),
        (
            [
                "--quant.format",
                "nf4",
                "--adapter.train_whole",
                "o_proj",
                "--adapter.exclude",
                "o_proj",
            ],
            "is quantized, so",
        ),
        (["--adapter.init", "loftq"], "a target's kernel is not quantized"),
        (["--model.attention", "cudnn"], "which needs a GPU"),
        (["--train.steps", "99999999999999"], "below 2^31"),
        (["--train.output", "model", "--train.overwrite"], "model is not empty and holds no run"),
        (["--train.output", "/proc/nowhere"], "cannot write to /proc"),
        (["--data.train", "silent.jsonl"], "the assistant's text (turn 2) is empty"),
        (["--data.fields", "question=foo"], "no field 'foo'; it has question, answer"),
        (["--data.fields", "foo=question"], "wrong way round"),
        (["--data.train", "pairs.jsonl"], "pairs.jsonl, line 1: a preference pair"),
        (["--data.train", "judged.jsonl"], "judged.jsonl, line 1: a completion with a label"),
        (["--data.train", "unnamed.jsonl"], "--data.fields question=Q answer=A"),
        (["--data.train", "image.jsonl"], "image.jsonl, line 1, turn 1, part 2 of the content"),
        (["--data.train", "cut.jsonl.gz"], "cut.jsonl.gz cannot be read after line 0"),
        (["--data.train", "none/*.jsonl"], "no file matches none/*.jsonl"),
        (["--data.train", "silent.jsonl=0"], "the weight of silent.jsonl is 0"),
        (["--data.template_args", "think"], 'is not of the form "name=value"'),
        (["--data.tools", "bad.jsonl"], "data.tools: bad.jsonl cannot be read as JSON"),
        (
            ["--train.output", "old", "--train.overwrite", "--eval.answer_pattern", "= (x)"],
            "does not match reference 1",
        ),
        (
            ["--train.output", "old", "--train.overwrite", "--train.report_to", "wandb"],
            "wandb, which is not installed",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_loses_nothing(
    argv: list[str],
    said: str,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", \n')
    Path("empty.jsonl").write_text("")
    Path("silent.jsonl").write_text('{"question": "a", "answer": " "}\n')
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": "llama"}))
    Path("mute.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    rows = {
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "judged": {"prompt": "a", "completion": "b", "label": False},
        "unnamed": {"Q": "a", "A": "b"},
        "image": {"messages": [{"role": "user", "content": ["a", {"type": "image"}]}]},
    }
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row))
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a", "answer": "b"}')[:-9])
    Path("bert").mkdir()
    Path("bert/config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    )
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    experts = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    Path("sparse").mkdir()
    Path("sparse/config.json").write_text(json.dumps(sizes | experts))
    save_file({"norm.weight": np.ones(32, np.float32)}, "sparse/model.safetensors")
    for name, file in (("notes", "my.txt"), ("old", "config.json")):
        Path(name).mkdir()
        (Path(name) / file).write_text(lft.Config().to_json())
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    rest = [] if "--config" in argv else config("lora")
    assert main(*rest, *SHORT, "--train.steps", "1", "--train.output", "fresh", *argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_resuming_another_run_is_refused(main: Main, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(lft.load_config(ROOT / "configs/lora.py").to_json())
    assert main(*config("dora"), "--train.output", out) == 2
    assert (
        f"adapter.dora is True, but the run to resume in {out} had False; use the same value, "
        "--train.overwrite to begin anew, or another --train.output"
    ) in capsys.readouterr().err


@pytest.mark.slow
def test_too_little_data_to_calibrate_on_costs_one_line(
    main: Main, tmp_path: Path, capsys: Any
) -> None:
    small = ["--data.limit", 40, "--train.steps", 1, "--train.output", tmp_path / "run"]
    assert main(*config("eva"), *SHORT, *small) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "adapter.calibration_batches 8 of train.batch_size 8 take more rows than the" in line
    assert main(*config("eva"), *SHORT, *small, "--adapter.calibration_batches", 4) == 0
