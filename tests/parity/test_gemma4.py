"""Gemma 4 beside transformers and PEFT: adapters, and what is refused. Needs torch and peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_logits import (  # noqa: E402
    check_gradients,
    check_peft_loads_ours,
    check_we_load_theirs,
)
from test_transformers import TOKENS, checkpoint  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402

ADAPTERS = {
    "all-linear": AdapterConfig(rank=3, targets=("all-linear",)),
    "patterns": AdapterConfig(
        rank=3,
        targets=("all-linear",),
        alpha_pattern=("layers/5/.*=7",),
        rank_pattern=("v_proj=2", "layers/2/self_attn/.*=4"),
    ),
    "dora": AdapterConfig(rank=3, targets=("k_proj", "down_proj"), dora=True),
    "some_layers": AdapterConfig(rank=3, targets=("v_proj", "q_proj"), layers=(1, 2)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_ours(tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "model", "gemma4")
    check_peft_loads_ours(tmp_path, base, ADAPTERS[name], tokens=TOKENS)


@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_writes(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "model", "gemma4")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear")
    check_we_load_theirs(tmp_path, base, config, tokens=TOKENS)


def test_gradients_are_those_of_merged_kernels(tmp_path: Path) -> None:
    """∂L/∂A and ∂L/∂B by the chain rule from ∂L/∂W of the merged model."""
    checkpoint(tmp_path / "model", "gemma4")
    adapted = check_gradients(tmp_path / "model")
    # Three places of a period, with 7 projections each but for the values that are keys.
    assert len(adapted) == 20


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size_per_layer_input", 8, "embeddings for each layer, as in E2B and E4B"),
        ("num_kv_shared_layers", 2, "layers that share keys and values, as in E2B and E4B"),
        ("enable_moe_block", True, "experts beside a dense MLP, as in 26B-A4B"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention all"),
    ],
)
def test_refused(tmp_path: Path, key: str, value: object, said: str) -> None:
    checkpoint(tmp_path / "model", "gemma4")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "model")
