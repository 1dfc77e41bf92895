"""The output of a run on a quantized base: the adapter, and the base if the init changed it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nf4_cases import assert_same, logits

from lorax_ft.config import AdapterConfig, QuantConfig
from lorax_ft.interop.load import load_model
from lorax_ft.interop.peft import load_peft, save_peft
from lorax_ft.interop.save import save_model, save_quantized
from lorax_ft.interop.vllm import save_for_vllm
from lorax_ft.lowrank.adapters import add_adapters, attach_adapters, disable_adapters
from lorax_ft.lowrank.groups import partition
from lorax_ft.lowrank.merge import merge_adapters, merge_weighted
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import dense
from lorax_ft.tree import from_modules, modules

CHANGING = {
    "pissa": AdapterConfig(rank=3, alpha=6, init="pissa"),
    "loftq": AdapterConfig(rank=3, alpha=6, init="loftq"),
    "olora": AdapterConfig(rank=3, alpha=6, init="olora"),
    "pissa_dora": AdapterConfig(rank=3, alpha=6, init="pissa", dora=True),
}


def randomized(params: dict, seed: int = 1) -> dict:
    """The tree with random factors, so that a wrong adapter differs from none."""
    rng = np.random.default_rng(seed)
    layers = modules(params)
    for layer in layers.values():
        for name in ("lora_a", "lora_b"):
            if name in layer:
                layer[name] = jnp.asarray(rng.normal(0, 0.2, layer[name].shape), jnp.float32)
        if "magnitude" in layer:
            layer["magnitude"] *= jnp.float32(1.3)
    return from_modules(layers)


def adapted(model: Model, config: AdapterConfig, *, rounds: int = 1) -> dict:
    return randomized(
        add_adapters(
            model.params,
            config,
            layout=model.layout,
            key=jax.random.key(0),
            originals=model.originals,
            rounds=rounds,
        )
    )


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", CHANGING)
def test_a_base_without_its_start_goes_with_its_adapter(
    source: Path, tmp_path: Path, name: str
) -> None:
    model = load_model(source, quant=QuantConfig(format="nf4"))
    params = adapted(model, CHANGING[name], rounds=2)
    run = tmp_path / "run"
    with pytest.raises(
        ValueError, match="was quantized without its start, so its adapter works on that base alone"
    ):
        save_peft(run / "adapter", params, model)
    with pytest.raises(ValueError, match="was quantized without its start"):
        save_for_vllm(run / "adapter", params, model)
    assert not run.exists()
    save_quantized(run / "nf4_base", params, model)
    save_peft(run / "adapter", params, model, base=run / "nf4_base")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(run / "nf4_base"))
    base = load_model(run / "nf4_base")
    again = load_peft(run / "adapter", base)
    assert not any("lora_a0" in layer for layer in modules(again).values())
    np.testing.assert_allclose(logits(base, again), logits(model, params), atol=1e-5)
    assert np.abs(logits(base) - logits(model)).max() > 0.1
    with pytest.raises(
        ValueError,
        match=rf"was trained on {run / 'nf4_base'}, not on {source}; load {run / 'nf4_base'}",
    ):
        load_peft(run / "adapter", model)
    merged = merge_adapters(again, layout=base.layout)
    np.testing.assert_allclose(logits(base, merged), logits(model, params), atol=1e-4)
    # Moved away from its base; its config still names the base.
    shutil.copytree(run / "adapter", tmp_path / "moved")
    with pytest.raises(ValueError, match="was trained on"):
        load_peft(tmp_path / "moved", model)
    save_peft(tmp_path / "other", adapted(model, AdapterConfig(rank=3)), model)
    assert (base.without_start, model.without_start) == (True, False)
    with pytest.raises(ValueError, match="is the base of another adapter, without its start"):
        load_peft(tmp_path / "other", base)
    save_model(tmp_path / "merged", again, base)
    assert not load_model(tmp_path / "merged").without_start


@pytest.mark.parametrize("name", CHANGING)
def test_a_base_without_its_start_is_computed_again_bitwise(source: Path, name: str) -> None:
    quant = QuantConfig(format="nf4")
    model = load_model(source, quant=quant)
    params = adapted(model, CHANGING[name], rounds=2)
    adapters, _ = partition(params, by="ownership")
    anew = load_model(source, quant=quant)
    again = attach_adapters(anew.params, adapters, layout=anew.layout, originals=anew.originals)
    assert_same(again, params)
    kernel = ("layers", "mlp", "up_proj", "kernel")
    assert not np.array_equal(leaf_at(again, kernel).codes, leaf_at(anew.params, kernel).codes)


def leaf_at(tree: dict, path: tuple[str, ...]) -> Any:
    return tree if not path else leaf_at(tree[path[0]], path[1:])


def test_a_start_can_be_taken_out_of_a_packed_checkpoint(packed: Path, tmp_path: Path) -> None:
    """W is the dequantized checkpoint."""
    model = load_model(packed)
    config = AdapterConfig(rank=3, alpha=3, init="pissa")
    params = add_adapters(
        model.params,
        config,
        layout=model.layout,
        key=jax.random.key(0),
        originals=model.originals,
        rounds=3,
    )
    whole = merge_adapters(params, layout=model.layout)
    for path in ("mlp/up_proj", "self_attn/v_proj"):
        path = ("layers", *path.split("/"), "kernel")
        w = dense(leaf_at(model.params, path))
        assert 0 < jnp.abs(leaf_at(whole, path) - w).max() < 0.3 * jnp.abs(w).max()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=3),
        AdapterConfig(rank=3, dora=True),
        AdapterConfig(rank=3, init="pissa", keep_base=True),
    ],
    ids=["lora", "dora", "pissa_keep_base"],
)
def test_adapters_on_quantized_bases(
    source: Path, tmp_path: Path, format: Any, config: AdapterConfig
) -> None:
    """Saved to PEFT and loaded, switched off, merged, and merged with weights."""
    model = load_model(source, quant=QuantConfig(format=format))
    params = adapted(model, config)
    save_peft(tmp_path / "adapter", params, model)
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    assert rank == (6 if config.keep_base else 3)
    again = load_peft(tmp_path / "adapter", model)
    np.testing.assert_allclose(logits(model, again), logits(model, params), atol=1e-4)
    off = disable_adapters(again, model.params, layout=model.layout)
    assert jax.tree.structure(off) == jax.tree.structure(again)
    np.testing.assert_allclose(logits(model, off), logits(model), atol=1e-5)
    assert np.abs(logits(model, again) - logits(model)).max() > 0.1

    save_model(tmp_path / "merged", params, model)
    merged = load_model(tmp_path / "merged")
    assert model.base == f"{source} in {format}"
    assert merged.base == str(tmp_path / "merged")
    np.testing.assert_allclose(logits(merged), logits(model, params), atol=1e-4)
    if not config.dora:
        halves = merge_weighted(model.params, [params, params], [0.5, 0.5], layout=model.layout)
        np.testing.assert_allclose(logits(model, halves), logits(merged), atol=1e-4)


def test_a_module_trained_whole_needs_a_base_that_is_not_quantized(
    source: Path, tmp_path: Path
) -> None:
    model = load_model(source)
    layers = modules(adapted(model, AdapterConfig(rank=3, exclude=("up_proj",))))
    layers["layers/mlp/up_proj"]["kernel"] += jnp.float32(0.1)
    save_peft(tmp_path / "adapter", from_modules(layers), model)
    quantized = load_model(source, quant=QuantConfig(format="nf4"))
    with pytest.raises(
        ValueError, match=r"up_proj\.weight was trained in full, but the model is quantized"
    ):
        load_peft(tmp_path / "adapter", quantized)
