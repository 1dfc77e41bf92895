"""IA3 and MiSS, beside what they inherit from the table of methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import KEY, Adapted, distance
from run_cases import SHORT, Main, config
from safetensors.numpy import load_file, save_file

import lorax_ft as lft
from lorax_ft.interop.peft import load_peft
from lorax_ft.interop.vllm import save_for_vllm
from lorax_ft.lowrank.merge import merge_adapters, merge_weighted, unmerge_adapters
from lorax_ft.lowrank.terms.miss import shards
from lorax_ft.tree import flatten


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("method", ["kaiming-standard", "miss-standard"])
def test_unmerging_subtracts_what_merging_added(
    zoo: Any, adapted: Adapted, randomize: Any, method: str
) -> None:
    case = zoo("vit_scanned")
    params = randomize(adapted("vit_scanned", method))
    merged = merge_adapters(params, layout=case.layout)
    back = unmerge_adapters(merged, params, layout=case.layout)
    chex.assert_trees_all_close(back, case.params, atol=1e-5)
    assert distance(case.plain(merged), case.plain(case.params)) > 1e-2
    other = adapted("vit_scanned", "ia3-standard")
    with pytest.raises(ValueError, match="cannot be recovered"):
        unmerge_adapters(merged, other, layout=case.layout)


class Reordered(nn.Module):
    """Einsums whose bias has its axes in the result's order, and not in the kernel's."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Einsum((6, 4, 4), "bd,dhk->bkh", name="heads")(x)
        return nn.Einsum((4, 4, 5), "bei,eio->boe", name="experts")(nn.tanh(x))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ia3", "miss"])
def test_a_bias_in_the_results_order_is_merged_rightly(randomize: Any, method: str) -> None:
    module, x = Reordered(), jax.random.normal(KEY, (3, 6))
    params = module.init(KEY, x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)
    layout = lft.layout(module.apply, params, x)
    options = {} if method == "ia3" else {"rank": 2}
    adapters = lft.AdapterConfig(method=method, **options)  # type: ignore[arg-type]
    tuned = randomize(lft.add_adapters(params, adapters, layout=layout, key=KEY))
    merged = merge_adapters(tuned, layout=layout)
    y = lft.adapt(module.apply)({"params": tuned}, x)
    assert distance(module.apply({"params": merged}, x), y) < 1e-5
    assert distance(module.apply({"params": params}, x), y) > 1e-2


def test_shards_are_identity_matrices_one_below_another() -> None:
    p = np.asarray(shards(jnp.array([3.0, 2.0, 0.0]), (7,), width=3))
    np.testing.assert_array_equal(p[0], np.tile(np.eye(3), (3, 1))[:7])
    np.testing.assert_array_equal(p[1, :, :2], np.tile(np.eye(2), (4, 1))[:7])
    assert not p[1, :, 2].any()
    assert not p[2].any()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ia3", "ia3_input", "miss"])
def test_layers_that_are_not_adapted_have_no_gradient(
    decoder: Any, adapted: Adapted, randomize: Any, method: str
) -> None:
    model = decoder()
    params = randomize(
        adapted("decoder", f"{method}-standard", targets=("down_proj",), layers=(1,))
    )
    trained, frozen = lft.partition(params)
    tokens = jnp.arange(16).reshape(2, 8)

    def loss(trained: Any) -> jax.Array:
        return jnp.sum(jnp.sin(model.apply({"params": lft.combine(trained, frozen)}, tokens)))

    for path, gradient in flatten(jax.grad(loss)(trained)).items():
        assert not gradient[0].any(), path
        assert not gradient[2].any(), path
        assert gradient[1].any(), path


def test_weights_of_a_sum_round_a_bias_once(zoo: Any, randomize: Any) -> None:
    layer = nn.Dense(2)
    x = jnp.ones((1, 3), jnp.bfloat16)
    params = {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.ones(2, jnp.bfloat16)}
    layout = lft.layout(layer.apply, params, x)
    tuned = lft.add_adapters(params, lft.AdapterConfig(method="ia3"), layout=layout, key=KEY)
    tuned["ia3_out"] = tuned["ia3_out"] * 1.0015
    summed = merge_weighted(params, [tuned] * 4, [1.0] * 4, layout=layout)
    np.testing.assert_array_equal(summed["bias"], jnp.full(2, 1.006).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ia3", "dora": True}, "adapter.dora is True, .*ia3 does not use it"),
        ({"method": "ia3", "alpha": 8.0}, "adapter.alpha is 8.0, .*applies to lora"),
        ({"method": "miss", "init": "pissa"}, "adapter.init is pissa, .*miss does not use it"),
        ({"feedforward": ("down_proj",)}, "adapter.feedforward is .*applies to ia3"),
    ],
)
def test_options_of_other_methods_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lft.AdapterConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"feedforward": ("layers/0/mlp/down_proj",)}, "matches some layers of the stack of"),
        ({"targets": ("q_proj",), "feedforward": ("down_proj",)}, "'down_proj' matches no module"),
        ({"targets": ("embed_tokens",)}, "embed_tokens: IA3 is not for embeddings"),
    ],
)
def test_targets_that_ia3_cannot_have(decoder: Any, options: dict[str, Any], said: str) -> None:
    model = decoder()
    adapters = lft.AdapterConfig(**{"method": "ia3", "targets": ("down_proj",)} | options)
    with pytest.raises(ValueError, match=said):
        lft.add_adapters(model.params, adapters, layout=model.layout, key=KEY)


def test_all_linear_layers_may_scale_their_input(decoder: Any) -> None:
    model = decoder()
    adapters = lft.AdapterConfig(method="ia3", feedforward=("all-linear",))
    found = flatten(lft.abstract_adapters(adapters, model.params, layout=model.layout))
    assert {path.rpartition("/")[2] for path in found} == {"ia3_in", "ia3_active"}


def test_an_init_is_for_lora(decoder: Any) -> None:
    model = decoder()
    with pytest.raises(ValueError, match=r"init= is for LoRA, and adapter\.method is miss"):
        lft.add_adapters(
            model.params,
            lft.AdapterConfig(method="miss"),
            layout=model.layout,
            key=KEY,
            init=lambda context: lft.InitResult((context.zeros_a(), context.zeros_b())),
        )


@pytest.mark.slow
def test_a_run_continues_from_its_folder_and_says_what_it_would_ignore(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    short = [*SHORT, "--train.steps", 1]
    first = tmp_path / "first"
    assert main(*config("ia3"), *short, "--train.output", first) == 0
    again = [*config("lora"), *short, "--adapter.continue_from", first / "adapter"]
    assert main(*again, "--train.output", tmp_path / "again") == 0
    saved = json.loads((tmp_path / "again/adapter/adapter_config.json").read_text())
    assert saved["peft_type"] == "IA3"
    capsys.readouterr()
    again = [*short, "--adapter.continue_from", first / "adapter"]
    for options, said in (
        (config("miss"), "adapter.method is miss, but"),
        ((*config("lora"), "--adapter.dropout", 0.3), "adapter.dropout is 0.3, but"),
    ):
        assert main(*options, *again, "--train.output", tmp_path / "other") == 2
        assert said in capsys.readouterr().err


def test_vllm_gets_the_merged_model(decoder: Any, speaker: Any, tmp_path: Path) -> None:
    for method in ("ia3", "miss"):
        adapters = lft.AdapterConfig(method=method)  # type: ignore[arg-type]
        params = lft.add_adapters(speaker.params, adapters, layout=speaker.layout, key=KEY)
        assert save_for_vllm(tmp_path / method, params, speaker) == "model"


def test_folders_of_peft_that_are_wrong(decoder: Any, speaker: Any, tmp_path: Path) -> None:
    adapters = lft.AdapterConfig(method="ia3", targets=("q_proj", "down_proj"))
    params = lft.add_adapters(speaker.params, adapters, layout=speaker.layout, key=KEY)
    lft.save_peft(tmp_path / "adapter", params, speaker)
    file = tmp_path / "adapter/adapter_config.json"
    whole = json.loads(file.read_text())
    for value, said in (("[", "is not a regular expression"), (3, "is not a valid value")):
        file.write_text(json.dumps(whole | {"feedforward_modules": value}))
        with pytest.raises(ValueError, match=said):
            load_peft(tmp_path / "adapter", speaker)


def test_elements_of_shira_that_are_wrong(speaker: Any, tmp_path: Path) -> None:
    adapters = lft.AdapterConfig(method="shira", rank=1, targets=("layers/0/self_attn/q_proj",))
    params = lft.add_adapters(speaker.params, adapters, layout=speaker.layout, key=KEY)
    lft.save_peft(tmp_path, params, speaker)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("shira_indices"))
    places = tensors[name]
    for value, said in ((-1, "are from -1"), (0.5, "are no whole numbers")):
        wrong = places.astype(np.float32)
        wrong[1, 0] = value
        save_file({**tensors, name: wrong}, file)
        with pytest.raises(ValueError, match=f"shira_indices {said}"):
            load_peft(tmp_path, speaker)
    save_file(tensors, file)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 2}))
    with pytest.raises(ValueError, match=r"elements; rank 2 of a module with 32 inputs"):
        load_peft(tmp_path, speaker)
