"""Any adapter as plain LoRA: the SVD of what it changes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import DENSE, KEY, distance

import lorax_ft as lft
from lorax_ft import cli
from lorax_ft.commands import export as export_command
from lorax_ft.config import AdapterConfig
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model
from lorax_ft.lowrank.approximate import as_lora
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree, flatten, unflatten

METHODS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 3, "dora": True},
    "pissa": {"rank": 3, "init": "pissa"},
    "ia3": {"method": "ia3"},
    "miss": {"method": "miss", "rank": 3},
    "loha": {"method": "loha", "rank": 3},
    "lokr": {"method": "lokr", "rank": 1, "targets": DENSE},
    "hira": {"method": "hira", "rank": 3},
    "oft": {"method": "oft", "oft_block_size": 8, "targets": DENSE},
    "shira": {"method": "shira", "rank": 3},
    "whole": {"targets": (), "train_whole": ("up_proj", "norm")},
}


def trained(model: Model, method: str, randomize: Any) -> Tree:
    """The model's parameters with random leaves of a method."""
    config = AdapterConfig(**METHODS[method])
    params = lft.add_adapters(model.params, config, layout=model.layout, key=KEY)
    if method != "whole":
        return randomize(params)
    flat = flatten(params)
    for path, leaf in flat.items():
        if "up_proj" in path or path.endswith("norm/scale"):
            flat[path] = leaf * 1.5
    return unflatten(flat)


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_it_is_the_adapter(method: str, model: Model, randomize: Any) -> None:
    params = trained(model, method, randomize)
    found = as_lora(params, model.params, layout=model.layout, rank=1000)
    assert max(found.errors.values()) < 1e-4
    flat = flatten(found.params)
    assert {name.rpartition("/")[2] for name in flat.keys() - flatten(model.params).keys()} == {
        "lora_a",
        "lora_b",
        "lora_scale",
    }
    want = flatten(lft.merge_adapters(params, layout=model.layout))
    got = flatten(lft.merge_adapters(found.params, layout=model.layout))
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert distance(got[path], leaf) < 1e-5, path


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_low_rank_matrix_is_nearer(rank: int, model: Model, randomize: Any) -> None:
    """The error is that of the singular values that are left out."""
    params = trained(model, "hira", randomize)
    found = as_lora(params, model.params, layout=model.layout, rank=rank)
    merged = flatten(lft.merge_adapters(params, layout=model.layout))
    for path, error in found.errors.items():
        kernel = f"{path}/kernel"
        change = np.float64(merged[kernel]) - np.float64(flatten(model.params)[kernel])
        values = np.linalg.svd(change, compute_uv=False)  # [L, n]
        left = np.sqrt((values[:, rank:] ** 2).sum() / (values**2).sum())
        assert error == pytest.approx(left, rel=1e-3)


def test_layers_without_an_adapter_stay_without(model: Model, randomize: Any) -> None:
    config = AdapterConfig(rank=2, dora=True, targets=("up_proj",), layers=(1,))
    params = randomize(lft.add_adapters(model.params, config, layout=model.layout, key=KEY))
    found = as_lora(params, model.params, layout=model.layout, rank=2)
    assert list(found.errors) == ["layers/mlp/up_proj"]
    scale = flatten(found.params)["layers/mlp/up_proj/lora_scale"]
    assert scale[1] == 1
    assert not np.delete(scale, 1).any()


@pytest.mark.parametrize("name", ["convolutions", "einsums"])
def test_other_models(name: str, zoo: Any, randomize: Any) -> None:
    case = zoo(name)
    config = AdapterConfig(rank=2, dora=True)
    params = randomize(lft.add_adapters(case.params, config, layout=case.layout, key=KEY))
    found = as_lora(params, case.params, layout=case.layout, rank=1000)
    want = flatten(lft.merge_adapters(params, layout=case.layout))
    for path, leaf in flatten(lft.merge_adapters(found.params, layout=case.layout)).items():
        assert distance(leaf, want[path]) < 1e-5, path


def test_on_a_quantized_base(model: Model, randomize: Any) -> None:
    base, _ = quantize_base(model.params, lft.QuantConfig(format="nf4"), layout=model.layout)
    config = AdapterConfig(rank=2, dora=True, targets=("up_proj",))
    params = randomize(lft.add_adapters(base, config, layout=model.layout, key=KEY))
    found = as_lora(params, base, layout=model.layout, rank=1000)
    assert list(found.errors) == ["layers/mlp/up_proj"]
    kernel = "layers/mlp/up_proj/kernel"
    assert flatten(found.params)[kernel] is flatten(base)[kernel]
    want = flatten(lft.merge_adapters(params, layout=model.layout))[kernel]
    got = flatten(lft.merge_adapters(found.params, layout=model.layout))[kernel]
    assert distance(got, want) < 1e-5


def test_nothing_to_approximate(model: Model) -> None:
    with pytest.raises(ValueError, match="no kernel differs"):
        as_lora(model.params, model.params, layout=model.layout, rank=4)
    with pytest.raises(ValueError, match="rank of the approximation is 0"):
        as_lora(model.params, model.params, layout=model.layout, rank=0)


def test_export_as_lora(speaker: Model, randomize: Any, tmp_path: Path) -> None:
    """A folder for vLLM from DoRA, and from a model that was trained in full."""
    save_model(tmp_path / "base", speaker.params, speaker)
    base = load_model(tmp_path / "base")
    dora = trained(base, "dora", randomize)
    save_peft(tmp_path / "dora", dora, base)
    whole = lft.merge_adapters(dora, layout=base.layout)
    save_model(tmp_path / "tuned", whole, base)

    def export(*argv: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            export_command.export(cli.parse(export_command.Args, argv=list(argv)))
        return said.getvalue()

    at_base = ("--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "dora"))
    in_full = ("--model", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"))
    want = logits(base, dora)
    for i, source in enumerate((at_base, in_full)):
        out = tmp_path / f"lora{i}"
        as_64 = ("--as_lora", "64", "--max-lora-rank", "64", "--output", str(out))
        said = export(*source, "--target", "vllm", *as_64)
        assert "Plain LoRA of rank 64" in said
        assert "layers/mlp/up_proj" in said
        got = load_peft(out, base)
        assert {name.rpartition("/")[2] for name in flatten(got) if "lora" in name} == {
            "lora_a",
            "lora_b",
            "lora_scale",
        }
        np.testing.assert_allclose(logits(base, got), want, atol=1e-4)
    output = ("--output", str(tmp_path / "x"))
    with pytest.raises(ValueError, match="--as_lora needs --base"):
        export("--model", str(tmp_path / "tuned"), "--target", "peft", "--as_lora", "4", *output)
    with pytest.raises(ValueError, match="--base is for --as_lora"):
        export(*at_base, "--target", "peft", "--base", "y", "--as_lora", "4", *output)
    with pytest.raises(ValueError, match="--target gguf a whole model"):
        export(*at_base, "--target", "gguf", "--as_lora", "4", *output)
    with pytest.raises(ValueError, match="--as_lora is 0"):
        export(*at_base, "--target", "peft", "--as_lora", "0", *output)


def logits(model: Model, params: Tree) -> jax.Array:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 8)), jnp.int32)
    positions = jnp.tile(jnp.arange(8), (2, 1))
    features, _ = model.features(params, tokens, positions, None)
    return model.score(model.head(params), features)
