"""Checkpoints, tokenizers and adapters there and back, without torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from lorax_ft.config import AdapterConfig, MeshConfig
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import abstract_params, decoder_config
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.lowrank.merge import merge_adapters
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import Model
from lorax_ft.training.sharding import make_mesh
from lorax_ft.tree import combine, flatten, from_modules, modules, unflatten

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
CONFIG = decoder_config(HF_CONFIG, source="these tests")
TOKENS = jnp.arange(24).reshape(2, 12) % 40


def random_model(*, tied: bool = False, seed: int = 0) -> Model:
    config = dataclasses.replace(CONFIG, tied=tied)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(leaf.shape in [(16,), (3, 16)], 0.3, leaf.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, abstract_params(config))
    return Model(config=config, params=params, hf_config=HF_CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: DecoderConfig, params: dict) -> jax.Array:
    return Model(config=config, params={}).apply({"params": params}, TOKENS)


def moved(params: dict, seed: int = 1) -> dict:
    """The parameters with other factors and magnitudes."""
    rng = np.random.default_rng(seed)
    trained = ("lora_a", "lora_b", "magnitude")
    flat = flatten(params)
    return unflatten(
        {
            path: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32) if path.endswith(trained) else leaf
            for path, leaf in flat.items()
        }
    )


def saved_model(folder: Path, *, tied: bool = False) -> Model:
    model = random_model(tied=tied)
    save_model(folder, model.params, model)
    return load_model(folder)


def randomised(params: dict, seed: int = 1) -> dict:
    """The tree with random factors and magnitudes in place of the starts, whose B is zero; padding stays zero."""
    rng = np.random.default_rng(seed)
    layers = modules(params)
    for layer in layers.values():
        if "lora_a" in layer:
            used = (layer["lora_a"] != 0).any(-2) | (layer["lora_b"] != 0).any(-1)
            a, b = (jnp.asarray(rng.normal(0, 0.3, layer[n].shape), jnp.float32) for n in ("lora_a", "lora_b"))
            layer |= {"lora_a": jnp.where(used[..., None, :], a, 0), "lora_b": jnp.where(used[..., None], b, 0)}
        if "magnitude" in layer:
            layer["magnitude"] *= jnp.where(layer["lora_scale"][..., None] > 0, 1.3, 1.0)
    return from_modules(layers)


def assert_trees_equal(got: dict, expected: dict) -> None:
    got, expected = flatten(got), flatten(expected)
    assert sorted(got) == sorted(expected)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


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
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], model.params["embed_tokens"]["embedding"])


def test_bfloat16_is_saved_and_loaded(tmp_path: Path) -> None:
    model = random_model()
    save_model(tmp_path / "model", model.params, model, dtype="bfloat16")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(tmp_path / "model", dtype="bfloat16")
    assert_trees_equal(again.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))


LOADING = """
import ctypes, gc, re, sys, threading
import jax, jax.numpy as jnp
from lorax_ft import QuantConfig, load_model

quant = QuantConfig(format=sys.argv[2])

def held():  # bytes of memory that are no file's
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

jax.block_until_ready(load_model(sys.argv[1], quant=quant).params)  # what the first call imports and compiles
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", ["none", "nf4", "int8"])
def test_loading_holds_the_model_and_a_tensor(tmp_path: Path, format: str) -> None:
    """On the host at most the placed model and its largest leaf; of a quantised one never the model that it was."""
    table = {"vocab_size": 40_000, "hidden_size": 256, "intermediate_size": 1024} if format == "none" else {}
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "tie_word_embeddings": True} | table
    hf_config = HF_CONFIG | sizes | {"num_hidden_layers": 16}
    config = decoder_config(hf_config, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_params(config))
    save_model(tmp_path / "model", params, Model(config=config, params=params, hf_config=hf_config), shard_bytes=10**7)
    command = [sys.executable, "-c", LOADING, str(tmp_path / "model"), format]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, model, largest = map(int, done.stdout.split())
    whole = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert whole > 90e6
    assert model == whole if format == "none" else model < {"nf4": 0.15, "int8": 0.28}[format] * whole
    # A stack is put together from its matrices, of which some are in work at a time.
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


def test_redundant_tensors_are_ignored(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors, file)
    assert_trees_equal(load_model(tmp_path / "model").params, model.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba'; supported: llama, mistral, "),
        ({"hidden_act": "relu"}, "hidden_act 'relu'; supported: silu"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.k_proj.bias and 11 more"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "rope_type 'dynamic'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": ["llama"]}, r"architecture \['llama'\]"),
        ({"num_key_value_heads": 3}, "4 heads and 3 key/value heads, which do not fit"),
        ({"num_hidden_layers": 4}, "lacks the tensor model.layers.3.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 2}, "holds the tensor model.layers.2.input_layernorm.weight and 8 more"),
        ({"intermediate_size": 32}, r"mlp.down_proj.weight has the shape \(24, 16\), not \(32, 16\)"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    saved_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spelling", [{"rope_theta": 7.0, "rope_parameters": None}, {"rope_parameters": {"rope_theta": 7.0}}]
)
def test_rope_theta_stands_in_two_places(tmp_path: Path, spelling: dict) -> None:
    saved_model(tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("rope")}
    file.write_text(json.dumps(config | spelling))
    assert load_model(tmp_path / "model").config.kinds[0].rope.theta == 7.0


def test_a_head_of_its_own_beside_a_tied_config_is_kept(tmp_path: Path) -> None:
    """As transformers does."""
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r is 0, which is no value"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
        ({"target_modules": ["q_proj", "v_proj"]}, "targets v_proj, but adapter_model.safetensors holds nothing of it"),
    ],
)
def test_adapter_configs_that_are_wrong(tmp_path: Path, change: dict, message: str) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_peft(tmp_path / "adapter", model)
    assert "\n" not in str(error.value)


def test_an_adapter_file_without_tensors_is_no_adapter(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "q_proj"}))
    save_file({}, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no adapter"):
        load_peft(tmp_path / "adapter", model)


def test_biased_modules_trained_whole_come_back(tmp_path: Path) -> None:
    hf_config = HF_CONFIG | {"model_type": "qwen2", "head_dim": None, "hidden_size": 32}
    config = decoder_config(hf_config, source="these tests")
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(1, 0.3, leaf.shape), jnp.float32)  # noqa: E731
    model = Model(config=config, params=jax.tree.map(draw, abstract_params(config)), hf_config=hf_config)
    adapters = AdapterConfig(rank=2, targets=("up_proj",), train_whole=("q_proj",))
    params = add_adapters(model.params, adapters, layout=model.layout, key=jax.random.key(0))
    q = params["layers"]["self_attn"]["q_proj"]
    whole = {"self_attn": params["layers"]["self_attn"] | {"q_proj": jax.tree.map(lambda leaf: leaf + 1, q)}}
    params = params | {"layers": params["layers"] | whole}
    save_peft(tmp_path / "adapter", params, model, config=adapters)
    assert_trees_equal(load_peft(tmp_path / "adapter", model), params)


def test_an_overwritten_model_may_have_fewer_shards(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    save_model(tmp_path / "copy", model.params, model, shard_bytes=3000)
    save_model(tmp_path / "copy", model.params, model)
    assert [path.name for path in (tmp_path / "copy").glob("*safetensors*")] == ["model.safetensors"]


def test_damaged_folders(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    for name, text, message in [
        ("model.safetensors", "no tensors", "cannot be read"),
        ("config.json", "{", "is not valid JSON"),
        ("config.json", "[]", "holds a list, not an object"),
    ]:
        kept = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(kept)
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only safetensors are read"):
        load_model(tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_model(tmp_path / "model")


def test_missing_paths_name_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path / "tiny_llama")
    with pytest.raises(ValueError, match=r"no model at .*tiny_lama; in .* there is tiny_llama"):
        load_model(tmp_path / "tiny_lama")
    with pytest.raises(ValueError, match=r"there is no folder"):
        load_model(f"{tmp_path}/nowhere/model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"in . there is tiny_llama"):
        load_model("tiny_lama")
    with pytest.raises(ValueError, match=r"is a file but not a .gguf"):
        load_model("tiny_llama/config.json")


def test_hub_ids_fail_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"the hub id nobody/nothing at revision main failed") as error:
        load_model("nobody/nothing", revision="main")
    assert "\n" not in str(error.value)


def test_save_model_refuses(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    adapted = add_adapters(model.params, AdapterConfig(), layout=model.layout, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"these are not the model's parameters"):
        save_model(tmp_path / "merged", {"norm": model.params["norm"]}, model)
    with pytest.raises(ValueError, match=r"where the model was loaded from"):
        save_model(tmp_path / "model", model.params, model)
    with pytest.raises(ValueError, match=r"no hf_config"):
        save_model(tmp_path / "merged", model.params, dataclasses.replace(model, hf_config={}))
    assert not (tmp_path / "merged").exists()
    save_model(tmp_path / "merged", adapted, model, shard_bytes=3000)  # B is 0: the base again
    assert_trees_equal(load_model(tmp_path / "merged").params, model.params)


def test_adapters_are_merged_as_they_are_saved(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)
    config = AdapterConfig(rank=2, dora=True, targets=("all-linear", "embed_tokens", "lm_head"))
    params = moved(add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)))
    save_model(tmp_path / "merged", params, model)
    merged = load_model(tmp_path / "merged")
    assert not merged.config.tied
    assert_trees_equal(merged.params, merge_adapters(params, layout=model.layout))
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False


SAVED = {"save_model": "merged/config.json", "save_peft": "adapter/adapter_config.json", "save_gguf": "model.gguf"}


@pytest.mark.parametrize("save", SAVED)
def test_a_disk_that_is_full_leaves_the_place_as_it_was(tmp_path: Path, save: str) -> None:
    """The limit on a file's size stands for the full disk: writes fail in the middle."""
    old = tmp_path / SAVED[save]
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    place = old if save == "save_gguf" else old.parent
    program = (
        "import resource, jax, lorax_ft as lft; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "from lorax_ft import cli, save_model, save_peft\n"
        "from lorax_ft.config import EMBEDDED_MODEL, AdapterConfig\n"
        "from lorax_ft.interop.save_gguf import save_gguf\n"
        "with cli.one_line_errors():\n"
        "    model = lft.load_model(EMBEDDED_MODEL)\n"
        "    params = lft.add_adapters(model.params, AdapterConfig(), layout=model.layout, key=jax.random.key(0))\n"
        f"    {save}({str(place)!r}, params, model)\n"
    )
    options = {"capture_output": True, "text": True, "env": {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}}
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {place} cannot be written: ")
    assert re.search("File too large|4000 written", done.stderr)
    assert done.stderr.count("\n") == 1
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"old"}
    assert len([*tmp_path.iterdir()]) == 1


def test_a_tokenizer_that_cannot_be_written(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    model = dataclasses.replace(random_model(), tokenizer=Full())
    with pytest.raises(OSError, match=r"model cannot be written: the tokenizer: No space left"):
        save_model(tmp_path / "model", model.params, model)
    assert not [*tmp_path.iterdir()]


def test_folders_are_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "deep/folder"
    for text in ("first", "second"):
        with new_folder(folder) as new:
            (new / "file").write_text(text)
        assert (folder / "file").read_text() == text
    with pytest.raises(RuntimeError), new_folder(folder) as new:
        raise RuntimeError(new)
    (folder / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes, which would be lost"), new_folder(folder) as new:
        (new / "file").write_text("fourth")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"file": "second", "notes": "mine"}
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    (folder / "more").mkdir()
    (folder / "more/notes").write_text("mine too")
    with new_folder(folder, others="keep") as new:
        (new / "file").write_text("fifth")
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert texts == {"file": "fifth", "notes": "mine", "more/notes": "mine too"}
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    with pytest.raises(ValueError, match=r"is a file"), new_folder(folder / "file"):
        pass


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_written_through(tmp_path: Path, exists: bool) -> None:
    """To a folder, or a file, whether it is there yet or not; and the link stays."""
    model = saved_model(tmp_path / "model")
    params = add_adapters(model.params, AdapterConfig(rank=2), layout=model.layout, key=jax.random.key(0))
    (tmp_path / "disk").mkdir()
    for name, save in (("merged", save_model), ("adapter", save_peft)):
        place = tmp_path / "disk" / name
        if exists:
            place.mkdir()
        (tmp_path / name).symlink_to(place)
        save(tmp_path / name, params, model)
        save(tmp_path / name, params, model)
        assert (tmp_path / name).readlink() == place
        assert any(place.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["adapter", "merged"]


ADAPTERS = {
    "lora": AdapterConfig(rank=3, alpha=7),
    "rslora": AdapterConfig(rank=3, scaling="rank_stabilized"),
    "dora": AdapterConfig(rank=2, dora=True),
    "layers": AdapterConfig(rank=2, layers=(0, 2), targets=("q_proj", "down_proj")),
    "dora_layers": AdapterConfig(rank=2, layers=(1,), targets=("q_proj",), dora=True),
    "patterns": AdapterConfig(rank=4, rank_pattern=("layers/1/.*up_proj=2", "q_proj=3"), alpha_pattern=("k_proj=5",)),
    "embeddings": AdapterConfig(rank=2, targets=("all-linear", "embed_tokens", "lm_head")),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_come_back_bitwise(tmp_path: Path, name: str, tied: bool) -> None:
    model = saved_model(tmp_path / "model", tied=tied)
    params = randomised(add_adapters(model.params, ADAPTERS[name], layout=model.layout, key=jax.random.key(0)))
    save_peft(tmp_path / "adapter", params, model)
    again = load_peft(tmp_path / "adapter", model)
    assert_trees_equal(again, params)
    assert again["norm"]["scale"] is model.params["norm"]["scale"]


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_a_start_becomes_twice_the_rank_on_the_original_base(tmp_path: Path, dora: bool, keep_base: bool) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=3, alpha=6, init="pissa", dora=dora, keep_base=keep_base, rank_pattern=("q_proj=2",))
    params = randomised(add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)))
    save_peft(tmp_path / "adapter", params, model)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (6, 12, {"q_proj": 4})
    again = load_peft(tmp_path / "adapter", model)
    for path, layer in modules(again).items():
        if "lora_a" in layer:
            np.testing.assert_array_equal(layer["kernel"], modules(model.params)[path]["kernel"])
    expected = logits(model.config, params)
    assert jnp.abs(expected - logits(model.config, model.params)).max() > 0.1
    np.testing.assert_allclose(logits(model.config, again), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_taken_apart(tmp_path: Path, kind: str) -> None:
    """As PEFT writes `target_parameters`: A `[E·R, in]`, B `[out, R·E]`; gate_up innermost, gate and up with one A."""
    sizes = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    hf_config = HF_CONFIG | sizes | {"model_type": kind}
    config = decoder_config(hf_config, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config))
    rng = np.random.default_rng(0)
    factors = {}
    for i in range(3):
        for name, inside, rank, (rows, columns) in (("gate_up", ".base_layer", 2, (16, 48)), ("down", "", 3, (24, 16))):
            a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, rank, rows), (4, columns, rank)))
            factors[name, i] = a, b
            key = f"base_model.model.model.layers.{i}.mlp.experts{inside}"
            factors[f"{key}.lora_A.weight"] = a.reshape(-1, rows)
            factors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.transpose(1, 2, 0).reshape(columns, -1))
    save_file(
        {key: value for key, value in factors.items() if isinstance(key, str)}, tmp_path / "adapter_model.safetensors"
    )
    said = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_parameters": [f"experts.{n}_proj" for n in ("gate_up", "down")],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"rank_pattern": {"experts.down_proj": 3}}))
    experts = load_peft(tmp_path, Model(config=config, params=params, hf_config=hf_config))["layers"]["mlp"]["experts"]
    for i in range(3):
        for name, part in (("gate", slice(24)), ("up", slice(24, None)), ("down", slice(None))):
            a, b = factors["down" if name == "down" else "gate_up", i]
            layer = experts[f"{name}_proj"]
            np.testing.assert_array_equal(layer["lora_a"][i], a.swapaxes(1, 2))
            np.testing.assert_array_equal(layer["lora_b"][i], b[:, part].swapaxes(1, 2))
            np.testing.assert_array_equal(layer["lora_scale"][i], 2 if name == "down" else 3)


def test_adapter_config(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = ADAPTERS["patterns"]
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model, config=dataclasses.replace(config, dropout=0.1))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text()) == {
        "alpha_pattern": {"k_proj": 5},
        "base_model_name_or_path": str(tmp_path / "model"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {"model.layers.1.mlp.up_proj": 2, "q_proj": 3},
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def test_adapter_names_of_some_layers(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("layers/1/self_attn/q_proj", "lm_head"))
    params = add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    save_peft(tmp_path / "adapter", params, model)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written["target_modules"] == ["lm_head", "model.layers.1.self_attn.q_proj"]
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.lm_head.lora_A.weight": (2, 16),
        "base_model.model.lm_head.lora_B.weight": (40, 2),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": (2, 16),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (32, 2),
    }


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changed", ["embed_tokens/embedding", "lm_head/kernel", "norm/scale", "layers/mlp/up_proj/kernel"]
)
def test_modules_trained_whole_come_back(tmp_path: Path, changed: str, tied: bool, told: bool) -> None:
    model = saved_model(tmp_path / "model", tied=tied)
    config = AdapterConfig(rank=2, targets=("q_proj",))
    params = randomised(add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)))
    flat = flatten(params)
    old = flat.get(changed, flat["embed_tokens/embedding"].T)
    params = unflatten(flat | {changed: old + 0.5 if old.ndim < 3 else old.at[1].add(0.5)})
    module = changed.rpartition("/")[0]
    told_config = dataclasses.replace(config, train_whole=(module,)) if told else None
    save_peft(tmp_path / "adapter", params, model, config=told_config)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_array_equal(flatten(again)[changed], flatten(params)[changed])
    np.testing.assert_array_equal(logits(model.config, again), logits(model.config, params))
    names = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"]
    expected = {
        "embed_tokens": ["lm_head", "model.embed_tokens"] if tied else ["model.embed_tokens"],
        "lm_head": ["lm_head"],
        "norm": ["model.norm"],
        "layers/mlp/up_proj": [f"model.layers.{i}.mlp.up_proj" for i in (range(3) if told else [1])],
    }
    assert names == expected[module]


def test_save_peft_refuses(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", tied=True)
    add = lambda config: add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))  # noqa: E731
    with pytest.raises(ValueError, match=r"hold no adapter"):
        save_peft(tmp_path / "adapter", model.params, model)
    shifted = jax.tree.map(lambda leaf: leaf + 1, model.params)
    moved = add_adapters(shifted, AdapterConfig(), layout=model.layout, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"is adapted and its own weights changed too"):
        save_peft(tmp_path / "adapter", moved, model)
    flat = flatten(add(AdapterConfig(targets=("lm_head",))))
    both = unflatten(flat | {"embed_tokens/embedding": flat["embed_tokens/embedding"] + 1})
    with pytest.raises(ValueError, match=r"lm_head/kernel is trained whole and its module is adapted"):
        save_peft(tmp_path / "adapter", both, model)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'; supported: 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changed its base"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"target_parameters": ["experts.down_proj"]}, "targets experts.down_proj, but .* holds nothing of it"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj', which is no value for it"),
        ({"r": 5}, "has rank 2 in adapter_model.safetensors, and 5 in adapter_config.json"),
        ({"use_dora": True}, "self_attn.q_proj has no magnitude"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    save_peft(
        tmp_path / "adapter", add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)), model
    )
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "adapter", model)


def test_adapter_of_another_model(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    save_peft(
        tmp_path / "adapter", add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0)), model
    )
    wider = decoder_config(HF_CONFIG | {"head_dim": 4}, source="these tests")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(wider))
    with pytest.raises(ValueError, match=r"A and B of layers/self_attn/q_proj are for 16 × 32; the model has 16 × 16"):
        load_peft(tmp_path / "adapter", Model(config=wider, params=params))
    file = tmp_path / "adapter/adapter_model.safetensors"
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(ValueError, match=r"no module model.layers.0.self_attn.query; the nearest is"):
        load_peft(tmp_path / "adapter", model)
    save_file({"base_model.model.odd": np.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"which is no LoRA's"):
        load_peft(tmp_path / "adapter", model)
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        load_peft(tmp_path / "model", model)
    with pytest.raises(ValueError, match=r"holds an adapter, not a model"):
        load_model(tmp_path / "adapter")


def write_gguf(file: Path, model: Model, *, architecture: str = "llama", pre: str = "smollm") -> None:
    """A GGUF file as llama.cpp's converter writes it: q and k permuted, matrices in Q8_0."""
    c = model.config
    letters = ["<|end|>", "<|user|>", *(chr(0x21 + i) for i in range(35)), "Ġ", "Ġ1", "ab"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.kinds[0].rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(letters)
    writer.add_token_types([3, 3] + [1] * (len(letters) - 2))
    writer.add_token_merges(["Ġ 1"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    flat = flatten(model.params)
    names = {"o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"{n}_proj": f"attn_{n}" for n in "qkv"} | {f"{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    for path, leaf in flat.items():
        if not path.startswith("layers/"):
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[path.split("/")[0]]
            writer.add_tensor(f"{name}.weight", np.array(leaf.T if name == "output" else leaf))
            continue
        module = path.split("/")[-2]
        for i, matrix in enumerate(np.array(leaf)):
            matrix = np.ascontiguousarray(matrix.T)
            heads = {"q_proj": c.heads, "k_proj": c.kv_heads}.get(module)
            if heads:
                matrix = matrix.reshape(heads, 2, -1, c.width).swapaxes(1, 2).reshape(matrix.shape)
            writer.add_tensor(f"blk.{i}.{names[module]}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files(tmp_path: Path, tied: bool) -> None:
    model = random_model(tied=tied)
    write_gguf(tmp_path / "model.gguf", model)
    again = load_model(tmp_path / "model.gguf")
    assert again.config == model.config
    assert_trees_equal(again.params, model.params)
    tokenizer = again.tokenizer
    ids = tokenizer("<|user|>A 11").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "A", "Ġ", "1", "1"]  # digits stand alone: no "Ġ1"
    assert tokenizer.decode(ids) == "<|user|>A 11"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False) == "A"
    save_model(tmp_path / "folder", again.params, again)
    folder = load_model(tmp_path / "folder")
    assert folder.tokenizer("<|user|>A 11").input_ids == ids
    assert folder.tokenizer.chat_template == tokenizer.chat_template
    assert_trees_equal(folder.params, model.params)


def test_gguf_files_that_are_not_supported(tmp_path: Path) -> None:
    model = random_model()
    write_gguf(tmp_path / "other.gguf", model, architecture="falcon")
    with pytest.raises(ValueError, match=r"architecture 'falcon'; supported in GGUF: llama, llama with experts, qwen2"):
        load_model(tmp_path / "other.gguf")
    write_gguf(tmp_path / "tokens.gguf", model, pre="falcon")
    with pytest.raises(ValueError, match=r"tokenizer gpt2/falcon; supported: gpt2/smollm, gpt2/llama-bpe"):
        load_model(tmp_path / "tokens.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is not a readable GGUF file"):
        load_model(tmp_path / "damaged.gguf")
    with pytest.raises(ValueError, match=r"in .* there is damaged.gguf|there is .*other.gguf"):
        load_model(tmp_path / "othr.gguf")


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read") as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)
