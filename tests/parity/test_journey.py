"""The README's workflow with the real libraries: train, PEFT and back, merge, transformers.

Needs torch and peft.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import transformers  # noqa: E402

from lorax_ft.config import EMBEDDED_MODEL  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.peft import load_peft  # noqa: E402
from lorax_ft.tree import Tree  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
TOKENS = np.random.default_rng(0).integers(3, 700, (2, 30))
SHORT = [
    "--train.steps",
    "3",
    "--eval.rows",
    "8",
    "--eval.exact_match_rows",
    "0",
    "--eval.samples",
    "0",
]

pytestmark = pytest.mark.filterwarnings("ignore")


def call(script: str, *args: object) -> str:
    command = [sys.executable, f"scripts/{script}.py", *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def their_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.float().numpy()


def our_logits(folder: str | Path, adapter: Path | None = None) -> np.ndarray:
    model = load_model(folder)
    params: Tree = model.params if adapter is None else load_peft(adapter, model)
    return np.asarray(model.apply({"params": params}, TOKENS))


@pytest.mark.parametrize("config", ["combined", "olora"])
def test_from_a_run_to_peft_and_back_and_to_transformers(tmp_path: Path, config: str) -> None:
    run, again, merged = tmp_path / "run", tmp_path / "again", tmp_path / "merged"
    call("train", "--config", f"configs/{config}.py", *SHORT, "--train.output", run)
    ours = our_logits(EMBEDDED_MODEL, run / "adapter")
    assert np.abs(ours - our_logits(EMBEDDED_MODEL)).max() > 0.1

    base = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    np.testing.assert_allclose(their_logits(theirs), ours, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(again)
    np.testing.assert_allclose(our_logits(EMBEDDED_MODEL, again), ours, atol=1e-4, rtol=1e-4)

    where = ["--model", EMBEDDED_MODEL, "--adapter", again]
    call("merge", *where, "--output", merged)
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    np.testing.assert_allclose(their_logits(whole), ours, atol=1e-4, rtol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template
    question = "What is 3 + 4?"
    said = call("generate", *where, question, "--max-new-tokens", "8")
    assert said == call("generate", "--model", merged, question, "--max-new-tokens", "8")

    more = ["--adapter.continue_from", again, "--train.output", tmp_path / "more"]
    call("train", "--config", "configs/lora.py", *SHORT, *more)
    further = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32),
        tmp_path / "more/adapter",
    )
    expected = our_logits(EMBEDDED_MODEL, tmp_path / "more/adapter")
    np.testing.assert_allclose(their_logits(further), expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected - ours).max() > 0.1
