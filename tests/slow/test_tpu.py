"""Training steps compile ahead of time for TPUs, with the right shardings.

Needs libtpu (`.[tpu-compile]`), but no TPU. libtpu prints messages whenever JAX starts, so it is
best installed in a separate environment, with LORAX_FT_TPU_PYTHON naming the Python of that
environment. Takes some minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorax_ft.config import (
    AdapterConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    QuantConfig,
    TrainConfig,
    load_config,
)

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LORAX_FT_TPU_PYTHON")
CHIP = 16e9  # bytes of HBM of a v5e

pytestmark = pytest.mark.skipif(
    PYTHON is None and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install '.[tpu-compile]', "
    "or name its Python in LORAX_FT_TPU_PYTHON",
)

QWEN_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
QWEN_1_5B = QWEN_7B | {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:2x2", MeshConfig(data=1, fsdp=4)), ("v5e:4x4", MeshConfig(data=4, fsdp=2, tensor=2))],
)
def test_the_step_of_the_pissa_config_compiles(topology: str, mesh: MeshConfig) -> None:
    config = dataclasses.replace(load_config(ROOT / "configs/pissa.py"), mesh=mesh)
    fields = json.loads((Path(config.model.path) / "config.json").read_text())
    report = compile_for(topology, config, fields)
    check(report, config, split=mesh.fsdp * mesh.tensor, width=fields["hidden_size"])


@pytest.mark.parametrize("dora", [False, True])
def test_seven_billion_parameters_fit_sixteen_chips(dora: bool) -> None:
    config = Config(
        model=ModelConfig(dtype="bfloat16"),
        adapter=AdapterConfig(rank=16, dora=dora),
        data=DataConfig(max_length=2048),
        train=TrainConfig(batch_size=16),
        mesh=MeshConfig(data=1, fsdp=16),
    )
    report = compile_for("v5e:4x4", config, QWEN_7B)
    check(report, config, split=16, width=QWEN_7B["hidden_size"])
    assert report["frozen_bytes"] > 15e9
    assert report["argument_bytes"] < 1.5e9
    assert report["temporary_bytes"] < 4e9
    assert report["splash"]  # attention without a mask
    assert [1, 3584, 18944] in report["gathered"]  # one layer's weights at a time


LONG = 32768


def test_packed_rows_of_32768_tokens_need_no_mask() -> None:
    """One row a chip. Its mask would take 1.1 GB as booleans, its scores 52 GB in a layer."""
    config = Config(
        model=ModelConfig(dtype="bfloat16", remat="full"),
        adapter=AdapterConfig(rank=16),
        data=DataConfig(max_length=LONG, pack=True),
        train=TrainConfig(batch_size=4),
        mesh=MeshConfig(data=1, fsdp=4),
    )
    report = compile_for("v5e:2x2", config, QWEN_1_5B)
    check(report, config, split=4, width=QWEN_1_5B["hidden_size"])
    assert report["splash"]
    assert not report["token_pairs"]
    # 7.5e9 with libtpu 0.0.52, of which 2.8e9 are the inputs of the layers, which `full` saves.
    assert report["temporary_bytes"] < 8e9


def test_a_row_of_32768_tokens_is_split_over_sixteen_chips() -> None:
    config = Config(
        model=ModelConfig(dtype="bfloat16"),
        adapter=AdapterConfig(rank=16),
        data=DataConfig(max_length=LONG, pack=True),
        train=TrainConfig(batch_size=1),
        mesh=MeshConfig(data=1, context=16),
    )
    report = compile_for("v5e:4x4", config, QWEN_7B)
    check(report, config, split=16, width=QWEN_7B["hidden_size"])
    assert report["splash"]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantized_base_is_whole_in_one_layer_at_a_time(format: Any) -> None:
    """7B parameters: the memory of LoRA's step, minus the savings on the base's kernels."""
    config = Config(
        model=ModelConfig(dtype="bfloat16"),
        adapter=AdapterConfig(rank=16),
        quant=QuantConfig(format=format),
        data=DataConfig(max_length=2048),
        train=TrainConfig(batch_size=16),
        mesh=MeshConfig(data=1, fsdp=16),
    )
    report = compile_for("v5e:4x4", config, QWEN_7B)
    # 2.2e9 of these are the embedding and the head.
    assert report["kernel_bytes"] < {"nf4": 5.6e9, "int8": 8.9e9}[format]
    assert report["kernel_bytes_a_chip"] < 1.01 * report["kernel_bytes"] / 16
    # 0.3e9 of these are the logits of a chunk of 512 tokens. All kernels in bfloat16 would take
    # 13e9, or 0.8e9 more per chip.
    assert report["temporary_bytes"] < 2.6e9
    assert not [shape for shape in report["gathered"] if len(shape) == 3 and shape[0] == 28]
    # The codes are gathered, not the dequantized values.
    codes = {"nf4": [18944, 3584 // 2], "int8": [3584, 18944]}[format]
    assert codes in [shape[-2:] for shape in report["gathered"]]


def check(report: dict[str, Any], config: Config, *, split: int, width: Any) -> None:
    """The base is sharded, the step fits on the chip, and no large array is gathered."""
    assert report["chips"] == {"v5e:2x2": 4, "v5e:4x4": 16}[report["topology"]]
    assert report["temporary_bytes"] > 0
    assert (
        report["argument_bytes"] + report["temporary_bytes"] + report["output_bytes"]
        < CHIP + report["alias_bytes"]
    )
    assert report["kernel_bytes_a_chip"] == report["kernel_bytes"] / split
    a_chip = report["frozen_bytes_a_chip"] + report["state_bytes_a_chip"]
    # The rest is the batch, and the padding of factors to tiles of 128 columns.
    assert a_chip <= report["argument_bytes"] < 2 * a_chip
    assert report["alias_bytes"] > 0.9 * report["state_bytes_a_chip"]  # the state is donated
    whole_stacks = [
        shape for shape in report["gathered"] if shape in report["kernels"] and len(shape) == 3
    ]
    assert not whole_stacks, f"all-gathers of all layers at once: {whole_stacks}"
    rows = config.train.batch_size // config.train.microbatches
    batches = [
        shape for shape in report["gathered"] if shape == [rows, config.data.max_length, width]
    ]
    assert not batches, f"all-gathers of the whole batch's activations: {batches}"


def compile_for(topology: str, config: Config, decoder: dict[str, Any]) -> dict[str, Any]:
    """The memory of a config's step on a topology, by `tests/programs/compile_for_tpu.py`."""
    options = {"topology": topology, "config": dataclasses.asdict(config), "decoder": decoder}
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    done = subprocess.run(
        [
            PYTHON or sys.executable,
            str(ROOT / "tests/programs/compile_for_tpu.py"),
            json.dumps(options),
        ],
        env=environment
        | {"TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.strip().splitlines()[-1]) | {"topology": topology}
    print(json.dumps({name: value for name, value in report.items() if name != "kernels"}))
    return report
