"""Adapters of a Flax model that is not ours, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import assert_trees_equal
from jax import Array
from safetensors.numpy import load_file, save_file
from zoo import VisionTransformer, built_decoder

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
    with pytest.raises(ValueError, match="VisionTransformer; save_adapter writes adapters of any"):
        lft.save_peft(tmp_path / "vit", params, VIT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"load_peft is for the decoders .* VisionTransformer"):
        lft.load_peft(tmp_path / "vit", VIT)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"is no module of the model, so PEFT has no name.*save_adapter"
    ):
        lft.save_peft(tmp_path / "vit", params, built_decoder())
    with pytest.raises(ValueError, match=r"save_model writes the .* a VisionTransformer; save"):
        lft.save_model(tmp_path / "vit", base, VIT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold no adapter"):
        lft.save_adapter(tmp_path / "vit", base)


def test_a_soft_prompt_is_no_adapter_of_any_model(tmp_path: Path) -> None:
    """Neither written nor, from a file of someone's, read."""
    model = built_decoder()
    config = lft.PromptConfig(kind="prompt", virtual_tokens=3, init="random")
    params = lft.add_soft_prompt(model.params, config, model, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"a soft prompt is a decoder's; save it by .*save_peft"):
        lft.save_adapter(tmp_path / "prompt", params)
    assert not (tmp_path / "prompt").exists()
    (tmp_path / "prompt").mkdir()
    leaf = {"soft_prompt/prompt_embedding": np.zeros((3, 32), np.float32)}
    save_file(leaf, tmp_path / "prompt" / WEIGHTS)
    with pytest.raises(ValueError, match="prompt_embedding is of a soft prompt, which load_peft"):
        lft.load_adapter(tmp_path / "prompt", model.params, layout=model.layout)


def test_adapters_of_a_decoder_come_back_too(tmp_path: Path) -> None:
    """A tied head has no leaf of its own, but an adapter; and tokens have rows of their own."""
    model = built_decoder()
    config = lft.AdapterConfig(rank=2, targets=("q_proj", "lm_head"))
    params = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
    for name, tree in (
        ("head", params),
        ("tokens", lft.add_trainable_tokens(model.params, [5, 3], model)),
        ("invoked", lft.with_invocation(lora_on_q(model), [7, 7])),
    ):
        lft.save_adapter(tmp_path / name, tree)
        again = lft.load_adapter(tmp_path / name, model.params, layout=model.layout)
        assert_trees_equal(again, tree)


def lora_on_q(model: Any) -> Tree:
    config = lft.AdapterConfig(rank=2, targets=("q_proj",))
    return lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))


def test_a_folder_that_does_not_fit_is_refused(base: Tree, tmp_path: Path) -> None:
    params, config, layout = adapted(base, train_whole=("classes",))
    lft.save_adapter(tmp_path, params, config=config)
    saved = load_file(tmp_path / WEIGHTS)

    def load(**changed: np.ndarray) -> Tree:
        tensors = {path: changed.get(path, value) for path, value in saved.items()}
        save_file({**tensors, **changed}, tmp_path / WEIGHTS)
        return lft.load_adapter(tmp_path, base, layout=layout)

    assert_trees_equal(load(), params)
    number = np.zeros(3, np.float32)
    for changed, problem in (
        ({"layers/upp/lora_scale": number}, "no layer .layers/upp. .*; the nearest is layers/up"),
        ({"layers/LayerNorm_0/lora_scale": number}, "no layer .layers/LayerNorm_0. that takes"),
        (
            {"classes/kernel": np.zeros((3, 3), np.float32)},
            r"classes/kernel has the shape \(3, 3\), and the model's has \(16, 5\): .*other model",
        ),
        ({"classes/kernel": np.full((16, 5), np.nan, np.float32)}, "classes/kernel .* not finite"),
        ({"classes/kernel": np.zeros((16, 5), np.int32)}, "kernel is int32; it must be float32"),
        (
            {"layers/up/lora_a": np.zeros((3, 9, 2), np.float32)},
            r"layers/up/lora_a has the shape \(3, 9, 2\); beside the model's layers/up/kernel "
            r"\(3, 16, 24\) it must be \(3, 16, 2\): was the adapter trained on another model\?",
        ),
        ({"layers/up/lora_a": np.zeros((3, 16, 2), np.int32)}, "up/lora_a is int32; it must be fl"),
        ({"layers/up/lora_b": np.zeros((3, 0, 24), np.float32)}, "lora_b .* so it is empty"),
        ({"layers/up/magnitude": np.ones((3, 9), np.float32)}, r"magnitude .* must be \(3, 24\)"),
        ({"layers/up/vera_a": np.ones((16, 2), np.float32)}, "vera_a lies beside a layer"),
        ({"layers/up/hira_a": np.ones((3, 16, 2), np.float32)}, "'hira_a' but no 'hira_b'"),
        ({"classes/gamma": np.zeros(2, np.float32)}, r"classes/gamma is not there in the model"),
        # Infinite as a float32.
        ({"layers/up/lora_scale": np.full(3, 1e300)}, "lora_scale has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            load(**changed)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(str(tmp_path / WEIGHTS))
    with pytest.raises(ValueError, match=r"the base has layers/.* already; give the parameters as"):
        lft.load_adapter(tmp_path, load(), layout=layout)
    below = {**saved, "layers/up/lora_a/lora_b": number}
    save_file(below, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="'layers/up/lora_a' is a leaf in one tree and holds"):
        lft.load_adapter(tmp_path, base, layout=layout)
    save_file(saved, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"^layout is a method; give layout=lft.layout\("):
        lft.load_adapter(tmp_path, base, layout=VIT.apply)  # type: ignore[arg-type]
    assert jnp.isfinite(lft.adapt(VIT.apply)({"params": params}, IMAGES)).all()


@pytest.mark.parametrize("method", ["lora", "vera", "lokr", "oft", "shira", "hira", "bottleneck"])
def test_an_adapter_of_another_width_is_refused(tmp_path: Path, method: str) -> None:
    """Also where only a leaf that all layers share, or blocks of rows, say the width."""
    options: dict[str, Any] = {"oft_block_size": 4} if method == "oft" else {"rank": 1}
    if method == "bottleneck":
        options["bottleneck_input"] = "input"
    config = lft.AdapterConfig(method=method, **options)  # type: ignore[arg-type]
    key, x = jax.random.key(0), jnp.ones((1, 12))
    dense = nn.Dense(6)
    own = dense.init(key, x)["params"]
    layout = lft.layout(dense.apply, own, x)
    lft.save_adapter(tmp_path, lft.add_adapters(own, config, layout=layout, key=key))
    # Narrower and wider inputs, as many outputs.
    for width in (8, 16):
        other = dense.init(key, jnp.ones((1, width)))["params"]
        found = lft.layout(dense.apply, other, jnp.ones((1, width)))
        with pytest.raises(ValueError, match=rf"(kernel \({width}, 6\)|needs {width}|value)"):
            lft.load_adapter(tmp_path, other, layout=found)


INTEGERS: dict[str, tuple[dict[str, Any], str, Any, str]] = {
    "a row below 0": ({"method": "shira"}, "shira_row", -1, "-1; .* 0 to 15"),
    "a row too many": ({"method": "shira"}, "shira_row", 16, "16; .* 0 to 15"),
    "a column too many": ({"method": "shira"}, "shira_column", 24, "24; .* 0 to 23"),
    "rows that are floats": ({"method": "shira"}, "shira_row", 0.5, "float32; it must be int32"),
    "a place twice": ({"method": "shira"}, "shira_row", None, "name a place twice"),
    "a rank of SHiRA": ({"method": "shira"}, "shira_rank", 3, "3; .* 0 to 2"),
    "a rank too large": ({"method": "miss"}, "miss_rank", 3, "3; .* 0 to 2"),
    "a rank below 0": ({"method": "miss"}, "miss_rank", -1, "-1; .* 0 to 2"),
    "a rank and a half": ({"method": "miss"}, "miss_rank", 1.5, "1.5; .* a whole number"),
    "half a flag": ({"method": "hira"}, "hira_active", 0.5, "0.5; .* 0 to 1"),
    "two flags": ({"method": "bottleneck"}, "bottleneck_active", 2, "2; .* 0 to 1"),
    "a flag below 0": ({"method": "vera"}, "vera_active", -1, "-1; .* 0 to 1"),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_indices_counts_and_flags_out_of_range_are_refused(
    base: Tree, tmp_path: Path, case: str
) -> None:
    """JAX would read another row, and a rank or a flag would scale or drop what trained."""
    options, name, value, problem = INTEGERS[case]
    params, _, layout = adapted(base, targets=("up",), **options)
    lft.save_adapter(tmp_path, params)
    tensors = load_file(tmp_path / WEIGHTS)
    path = f"layers/up/{name}"
    leaf = tensors[path]
    if value is None:
        column = tensors["layers/up/shira_column"]
        for of_place in (leaf, column):
            of_place[..., 1] = of_place[..., 0]
    elif isinstance(value, float):
        leaf = leaf.astype(np.float32)
        leaf[1] = value
    else:
        leaf[1] = value
    save_file({**tensors, path: leaf}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"{path}.*{problem}") as error:
        lft.load_adapter(tmp_path, base, layout=layout)
    assert "\n" not in str(error.value)


def test_leaves_of_which_others_are_missing(base: Tree, tmp_path: Path) -> None:
    for method, missing, problem in (
        ("vera", "vera_a", "vera_lambda_d is there, but no 'vera_a', which all layers share"),
        ("lokr", "layers/up/lokr_right_b", r"'lokr_right_a' but no 'lokr_right_b'"),
    ):
        params, _, layout = adapted(base, method=method, rank=1, targets=("up",))
        lft.save_adapter(tmp_path / method, params)
        tensors = load_file(tmp_path / method / WEIGHTS)
        del tensors[missing]
        save_file(tensors, tmp_path / method / WEIGHTS)
        with pytest.raises(ValueError, match=problem):
            lft.load_adapter(tmp_path / method, base, layout=layout)


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("embed_tokens/token_ids", [3, 97], "has the value 97; .* 0 to 96"),
        ("embed_tokens/token_ids", [-1, 3], "has the value -1"),
        ("embed_tokens/token_ids", [5, 5], "in ascending order, each token once"),
        ("lm_head/token_ids", [5, 3], "in ascending order, each token once"),
        ("lm_head/token_ids", [3, 97], "has the value 97; .* 0 to 96"),
        ("lora_invocation", [7, 97], "has the value 97; .* 0 to 96"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(
    tmp_path: Path, name: str, values: list[int], problem: str
) -> None:
    model = built_decoder(tied=False)
    params = lft.add_trainable_tokens(lora_on_q(model), [3, 5], model)
    lft.save_adapter(tmp_path, lft.with_invocation(params, [7, 7]))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, name: np.asarray(values, np.int32)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name}.*{problem}"):
        lft.load_adapter(tmp_path, model.params, layout=model.layout)


def test_what_is_no_folder_of_an_adapter(base: Tree, tmp_path: Path) -> None:
    params, _, layout = adapted(base)
    lft.save_adapter(tmp_path / "out/vit", params)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text("{}")
    model = built_decoder()
    for name, problem in {
        "out/vti": r"there is no folder .*out/vti; did you mean .*out/vit\?",
        "none/vit": "there is no folder .*none/vit, nor .*none$",
        f"out/vit/{WEIGHTS}": "is a file; give the folder that holds .*, such as .*out/vit$",
        "empty": r"empty is empty; give a folder that holds adapter",
    }.items():
        for load in (
            lambda folder: lft.load_adapter(folder, base, layout=layout),
            lambda folder: lft.load_peft(folder, model),
        ):
            with pytest.raises(ValueError, match=problem) as error:
                load(tmp_path / name)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"base has no .*kernel; .* variables\['params'\]"):
        lft.load_adapter(tmp_path / "out/vit", {"params": base}, layout=layout)
    with pytest.raises(ValueError, match=r"holds no adapter.safetensors, but a.txt; give"):
        lft.load_adapter(tmp_path / "notes", base, layout=layout)
    with pytest.raises(ValueError, match=r"is a folder of PEFT's.*; load it by load_peft"):
        lft.load_adapter(tmp_path / "peft", base, layout=layout)
    with pytest.raises(ValueError, match=r"is what save_adapter wrote; load it by load_adapter"):
        lft.load_peft(tmp_path / "out/vit", model)
    with pytest.raises(ValueError, match=r"^gs://b/vit is not on this machine; copy it"):
        lft.load_adapter("gs://b/vit", base, layout=layout)


@pytest.mark.parametrize("target", ["up", "attention"])
def test_a_bottleneck_that_does_not_fit_is_refused(base: Tree, tmp_path: Path, target: str) -> None:
    params, _, layout = adapted(base, method="bottleneck", targets=(target,))
    lft.save_adapter(tmp_path / "vit", params)
    file = tmp_path / "vit" / WEIGHTS
    tensors = load_file(file)
    path = f"layers/{target}/bottleneck_bias_b"
    save_file({**tensors, path: tensors[path][:, :3]}, file)
    with pytest.raises(ValueError, match=rf"{path} has the shape \(3, 3\); .* it must be \(3, "):
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


def test_a_folder_in_the_home_folder(
    base: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    params, _, layout = adapted(base)
    lft.save_adapter("~/mine", params)
    assert (tmp_path / "mine" / WEIGHTS).is_file()
    assert_trees_equal(lft.load_adapter("~/mine", base, layout=layout), params)


def test_parameters_of_ones_own_that_train_in_full(tmp_path: Path) -> None:
    """A mask of infinities, and a parameter without elements."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            mask = self.param("mask", lambda key: jnp.full(3, -jnp.inf))
            self.param("none", lambda key: jnp.zeros((0, 3)))
            return jnp.maximum(x, mask)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return Own(name="own")(nn.Dense(3, name="dense")(x))

    x, key = jnp.ones((1, 4)), jax.random.key(0)
    base = Model().init(key, x)["params"]
    layout = lft.layout(Model().apply, base, x)
    config = lft.AdapterConfig(rank=1, train_whole=("own",))
    params = lft.add_adapters(base, config, layout=layout, key=key)
    lft.save_adapter(tmp_path / "own", params, config=config)
    assert_trees_equal(lft.load_adapter(tmp_path / "own", base, layout=layout), params)
