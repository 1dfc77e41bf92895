"""Checkpoints in transformers' format: bitwise round trips without torch or a second copy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import HF_CONFIG, assert_trees_equal, moved, random_model, saved_model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig, MeshConfig
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.lowrank.merge import merge_adapters
from lorax_ft.models.model import LoadedModel, abstract_params
from lorax_ft.sharding import make_mesh
from lorax_ft.tree import combine, flatten


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_come_back_bitwise(tmp_path: Path, tied: bool) -> None:
    model = random_model(tied=tied)
    save_model(tmp_path / "model", model.params, model)
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    assert again.source == str(tmp_path / "model")
    assert_trees_equal(again.params, model.params)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_checkpoint_names_and_orientation(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)
    tensors = load_file(tmp_path / "model/model.safetensors")
    assert len(tensors) == 2 + 3 * 9
    up = model.params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.up_proj.weight"], up[2].T)
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], model.params["embed_tokens"]["embedding"]
    )


def test_bfloat16_is_saved_and_loaded(tmp_path: Path) -> None:
    model = random_model()
    save_model(tmp_path / "model", model.params, model, dtype="bfloat16")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(tmp_path / "model", dtype="bfloat16")
    assert_trees_equal(
        again.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    )


LOADING = """
import ctypes, gc, re, sys, threading
import jax, jax.numpy as jnp
from lorax_ft import QuantConfig, load_model

quant = QuantConfig(format=sys.argv[2])

def held():  # bytes of anonymous memory, without mapped files
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

# The first call imports and compiles, which the measurement must not count.
jax.block_until_ready(load_model(sys.argv[1], quant=quant).params)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before, peak, done = held(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, held())

watcher = threading.Thread(target=watch)
watcher.start()
leaves = jax.tree.leaves(load_model(sys.argv[1], quant=quant).params)
jax.block_until_ready(leaves)
done.set()
watcher.join()
print(peak - before, sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves))
"""


@pytest.mark.sampled(3)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", ["none", "nf4", "int8"])
def test_loading_holds_the_model_and_a_tensor(tmp_path: Path, format: str) -> None:
    """Peak host memory is the placed model and its largest leaf.

    While quantizing, the unquantized model is never in memory as a whole.
    """
    table = (
        {"vocab_size": 40_000, "hidden_size": 256, "intermediate_size": 1024}
        if format == "none"
        else {}
    )
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "tie_word_embeddings": True} | table
    hf_config = HF_CONFIG | sizes | {"num_hidden_layers": 16}
    config = decoder_config(hf_config, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
    save_model(
        tmp_path / "model",
        params,
        LoadedModel(config=config, params=params, hf_config=hf_config),
        shard_bytes=10**7,
    )
    command = [sys.executable, "-c", LOADING, str(tmp_path / "model"), format]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, model, largest = map(int, done.stdout.split())
    whole = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert whole > 90e6
    assert (
        model == whole if format == "none" else model < {"nf4": 0.15, "int8": 0.28}[format] * whole
    )
    # A stack is assembled from its matrices; several of them are in memory at a time.
    assert held < model + largest + (0 if format == "none" else largest + 4 * 512 * 2048 * 4)


def test_every_leaf_goes_where_it_is_told(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices=jax.devices()[:4])
    seen = {}

    def shardings(path: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        seen[path] = NamedSharding(
            mesh, P(*[None] * (len(leaf.shape) - 1), "fsdp" if leaf.shape[-1] % 2 == 0 else None)
        )
        return seen[path]

    placed = load_model(tmp_path / "model", dtype="bfloat16", shardings=shardings)
    assert {path: leaf.sharding for path, leaf in flatten(placed.params).items()} == seen
    assert_trees_equal(placed.params, load_model(tmp_path / "model", dtype="bfloat16").params)


def test_an_untied_head_unties_the_checkpoint(tmp_path: Path) -> None:
    model = random_model(tied=True)
    head = {"lm_head": {"kernel": jnp.ones((16, 40))}}
    save_model(tmp_path / "model", combine(model.params, head), model)
    assert json.loads((tmp_path / "model/config.json").read_text())["tie_word_embeddings"] is False
    assert_trees_equal(load_model(tmp_path / "model").params["lm_head"], head["lm_head"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float16"},
            "model.dtype is 'float16'; it must be one of float32, bfloat16; did you mean",
        ),
        ({"remat": "some"}, "model.remat is 'some'"),
        ({"quant": "nf4"}, "quant is 'nf4'; give a QuantConfig"),
    ],
)
def test_options_that_there_are_not(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(EMBEDDED_MODEL, **options)


def test_redundant_tensors_are_ignored(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors, file)
    assert_trees_equal(load_model(tmp_path / "model").params, model.params)


@pytest.mark.parametrize(
    "spelling",
    [{"rope_theta": 7.0, "rope_parameters": None}, {"rope_parameters": {"rope_theta": 7.0}}],
)
def test_rope_theta_stands_in_two_places(tmp_path: Path, spelling: dict) -> None:
    saved_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("rope")}
    file.write_text(json.dumps(config | spelling))
    assert load_model(tmp_path / "model").config.layer_types[0].rope.theta == 7.0


def test_a_head_of_its_own_beside_a_tied_config_is_kept(tmp_path: Path) -> None:
    """transformers does the same."""
    model = saved_model(tmp_path / "model", tied=True)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table}, file)
    assert load_model(tmp_path / "model").config.tied
    save_file(tensors | {"lm_head.weight": table + 1}, file)
    untied = load_model(tmp_path / "model")
    assert not untied.config.tied
    np.testing.assert_array_equal(untied.params["lm_head"]["kernel"], table.T + 1)
    save_model(tmp_path / "again", untied.params, untied)
    assert_trees_equal(load_model(tmp_path / "again").params, untied.params)
    assert model.config.tied


def test_adapters_are_merged_as_they_are_saved(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)
    config = AdapterConfig(rank=2, dora=True, targets=("all-linear", "embed_tokens", "lm_head"))
    params = moved(add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)))
    save_model(tmp_path / "merged", params, model)
    merged = load_model(tmp_path / "merged")
    assert not merged.config.tied
    assert_trees_equal(merged.params, merge_adapters(params, layout=model.layout))
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
