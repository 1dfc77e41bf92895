"""vLLM's own loader reads the adapters that are exported for it. Needs vllm's code.

No server runs here: the test adds the loaded factors, times their scales, to the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm.lora.lora_model", exc_type=ImportError)
import transformers  # noqa: E402
from checkpoint_cases import randomized  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402

from lorax_ft.config import AdapterConfig  # noqa: E402
from lorax_ft.interop.load import load_model  # noqa: E402
from lorax_ft.interop.vllm import save_for_vllm  # noqa: E402
from lorax_ft.lowrank.adapters import add_adapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 15))
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe")
METHODS = {
    "lora": AdapterConfig(rank=4, alpha=9),
    "rslora": AdapterConfig(rank=3, scaling="rank_stabilized"),
    "pissa": AdapterConfig(rank=4, alpha=4, init="pissa"),
    "patterns": AdapterConfig(
        rank=4, rank_pattern=("layers/1/.*=2", "o_proj=6"), alpha_pattern=("o_proj=5",)
    ),
}


def checkpoint(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
        pad_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loaded_by_vllm(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """s B A by module, as vLLM's worker loads the folder for a model with these module names."""
    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=64)
    helper.validate_legal(LoRAConfig(max_lora_rank=16))
    lora = LoRAModel.from_local_checkpoint(
        str(folder), names, peft_helper=helper, device="cpu", dtype=torch.float32
    )
    return {name: pair.scaling * pair.lora_b @ pair.lora_a for name, pair in lora.loras.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_vllm_finds_our_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, method: str
) -> None:
    monkeypatch.setattr("vllm.lora.lora_model.PIN_MEMORY", False)  # it needs a GPU
    source = checkpoint(tmp_path / "base", family)
    model = load_model(source)
    config = METHODS[method]
    params = randomized(
        add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    )
    assert save_for_vllm(tmp_path / "served", params, model, max_lora_rank=16) == "adapter"

    tensors = load_file(source / "model.safetensors")
    linear = [
        key.removesuffix(".weight") for key in tensors if "norm" not in key and "embed" not in key
    ]
    names = {module.rpartition(".")[2] for module in linear}
    names |= {module[module.index("experts") :] for module in linear if "experts" in module}
    for module, delta in loaded_by_vllm(tmp_path / "served", names - {"lm_head"}).items():
        tensors[f"{module}.weight"] += delta
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            source, attn_implementation="eager"
        )
        theirs = whole(torch.as_tensor(TOKENS)).logits.numpy()
    ours, plain = (
        np.asarray(model.apply({"params": tree}, TOKENS)) for tree in (params, model.params)
    )
    assert np.abs(theirs - plain).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
