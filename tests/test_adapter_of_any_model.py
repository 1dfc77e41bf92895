"""Adapters of a Flax model that is not ours, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import assert_trees_equal
from safetensors.numpy import load_file, save_file
from zoo import VisionTransformer

import lorax_ft as lft
from lorax_ft.interop.adapter_folder import WEIGHTS
from lorax_ft.tree import Tree

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
VIT = VisionTransformer("scanned")


@pytest.fixture(scope="module")
def base() -> Tree:
    params: Tree = VIT.init(jax.random.key(1), IMAGES)["params"]
    return params


def adapted(base: Tree, **options: Any) -> tuple[Tree, lft.AdapterConfig, Any]:
    """The parameters with trained adapters, their config, and the layout."""
    layout = lft.layout(VIT.apply, base, IMAGES)
    options = {"rank": 2, "targets": ("query", "up"), **options}
    config = lft.AdapterConfig(**options)
    params = lft.add_adapters(base, config, layout=layout, key=jax.random.key(2))
    trained, frozen = lft.partition(params, whole=config.train_whole)
    trained = jax.tree.map(lambda leaf: leaf + 0.125, trained)
    return lft.combine(trained, frozen), config, layout


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "pissa", "dora": True},
        {"train_whole": ("classes",)},
        {"method": "vera"},
        {"method": "shira"},
        {"method": "bottleneck", "targets": ("up",)},
        {"method": "bottleneck", "targets": ("attention",)},
    ],
)
def test_adapters_of_a_vision_transformer_come_back_bitwise(
    base: Tree, tmp_path: Path, options: dict[str, Any]
) -> None:
    params, config, layout = adapted(base, **options)
    lft.save_adapter(tmp_path / "vit", params, config=config)
    again = lft.load_adapter(tmp_path / "vit", base, layout=layout)
    assert_trees_equal(again, params)
    tensors = load_file(tmp_path / "vit" / WEIGHTS)
    assert not any(path.startswith("patches") for path in tensors)
    size = sum(leaf.size for leaf in jax.tree.leaves(base))
    assert sum(tensor.size for tensor in tensors.values()) < size


def test_save_peft_says_what_to_use(base: Tree, tmp_path: Path) -> None:
    params, _, _ = adapted(base)
    with pytest.raises(ValueError, match="VisionTransformer; save_adapter writes those of any"):
        lft.save_peft(tmp_path / "vit", params, VIT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold no adapter"):
        lft.save_adapter(tmp_path / "vit", base)


def test_a_folder_that_does_not_fit_is_refused(base: Tree, tmp_path: Path) -> None:
    params, config, layout = adapted(base, train_whole=("classes",))
    lft.save_adapter(tmp_path, params, config=config)
    saved = load_file(tmp_path / WEIGHTS)

    def load(**changed: np.ndarray) -> Tree:
        tensors = {path: changed.get(path, value) for path, value in saved.items()}
        save_file({**tensors, **changed}, tmp_path / WEIGHTS)
        return lft.load_adapter(tmp_path, base, layout=layout)

    assert_trees_equal(load(), params)
    for changed, problem in (
        ({"layers/upp/lora_a": np.zeros(2)}, "no module layers/upp; the nearest is layers/up"),
        (
            {"classes/kernel": np.zeros((3, 3), np.float32)},
            r"classes/kernel has the shape \(3, 3\)",
        ),
        ({"layers/up/lora_a": np.zeros((3, 9, 2), np.float32)}, "do not fit the model: .*lora_a"),
        ({"classes/gamma": np.zeros(2, np.float32)}, r"classes/gamma .* is not there"),
    ):
        with pytest.raises(ValueError, match=problem):
            load(**changed)
    with pytest.raises(ValueError, match="cannot be read"):
        lft.load_adapter(tmp_path / "nowhere", base, layout=layout)
    assert jnp.isfinite(lft.adapt(VIT.apply)({"params": params}, IMAGES)).all()


@pytest.mark.parametrize("target", ["up", "attention"])
def test_a_bottleneck_that_does_not_fit_is_refused(base: Tree, tmp_path: Path, target: str) -> None:
    params, _, layout = adapted(base, method="bottleneck", targets=(target,))
    lft.save_adapter(tmp_path / "vit", params)
    file = tmp_path / "vit" / WEIGHTS
    tensors = load_file(file)
    path = f"layers/{target}/bottleneck_bias_b"
    save_file({**tensors, path: tensors[path][:, :3]}, file)
    with pytest.raises(ValueError, match=rf"{path} has the shape \(3, 3\); the model needs \(3, "):
        lft.load_adapter(tmp_path / "vit", base, layout=layout)


def test_a_folder_with_values_that_are_not_finite_is_refused(base: Tree, tmp_path: Path) -> None:
    params, _, layout = adapted(base)
    lft.save_adapter(tmp_path / "vit", params)
    file = tmp_path / "vit" / WEIGHTS
    tensors = load_file(file)
    path = next(path for path in tensors if path.endswith("lora_a"))
    tensors[path][0] = np.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{path} has values that are not finite"):
        lft.load_adapter(tmp_path / "vit", base, layout=layout)
