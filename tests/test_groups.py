"""Which leaves train, which are frozen and which belong to an adapter."""

from __future__ import annotations

from typing import Any

import jax
import optax
import pytest
from method_cases import KEY, TABLE, Adapted

from lorax_ft import (
    AdapterConfig,
    MeshConfig,
    combine,
    label,
    merge_adapters,
    partition,
    with_dropout,
    with_norms,
)
from lorax_ft.sharding import make_mesh
from lorax_ft.training.state import abstract_state
from lorax_ft.tree import flatten

pytestmark = pytest.mark.usefixtures("strict")


def test_labels_name_the_optimizers_groups(zoo: Any, adapted: Adapted) -> None:
    params = adapted("convolutions", "pissa_kept-standard-dora", targets=("second",))
    assert label(params, whole=("first",)) == {
        "first": {"kernel": "weight", "bias": "vector"},
        "depthwise": {"kernel": "frozen", "bias": "frozen"},
        "second": {
            "kernel": "frozen",
            "lora_a": "lora_a",
            "lora_b": "lora_b",
            "lora_scale": "frozen",
            "lora_a0": "frozen",
            "lora_b0": "frozen",
            "start_scale": "frozen",
            "magnitude": "magnitude",
        },
        "line": {"kernel": "frozen", "bias": "frozen"},
        "classes": {"kernel": "frozen", "bias": "frozen"},
    }


def test_a_frozen_factor_is_labeled_so(adapted: Adapted) -> None:
    params = adapted("decoder", "kaiming-standard-dora", targets=("up_proj",))
    names = label(params, freeze=("lora_a",))["layers"]["mlp"]["up_proj"]
    frozen = dict.fromkeys(("kernel", "lora_a", "lora_scale"), "frozen")
    assert names == frozen | {"lora_b": "lora_b", "magnitude": "magnitude"}


def test_full_fine_tuning_trains_every_leaf_of_the_base(zoo: Any) -> None:
    params = zoo("vit_scanned").params
    assert set(flatten(label(params, whole=("all",))).values()) == {"weight", "vector"}
    trained, frozen = partition(params, whole=("all",))
    assert set(flatten(trained)) == set(flatten(params))
    assert frozen == {}


def test_a_module_trained_whole_takes_what_stands_in_it(zoo: Any) -> None:
    trained, _ = partition(zoo("vit_scanned").params, whole=("attention",))
    assert {path.split("/")[1] for path in flatten(trained)} == {"attention"}
    assert len(flatten(trained)) == 8


def test_unknown_whole_modules_raise_with_the_nearest_name(zoo: Any) -> None:
    with pytest.raises(ValueError, match=r"train_whole: 'clases' matches no module.*'classes'"):
        label(zoo("vit_scanned").params, whole=("clases",))


def test_a_tied_head_does_not_train_whole_by_its_name(decoder: Any) -> None:
    model, mesh = decoder(tied=True), make_mesh(MeshConfig())

    def trained(*whole: str) -> set[str]:
        config = AdapterConfig(targets=("q_proj",), train_whole=whole)
        state, _ = abstract_state(
            model.params, config, optax.sgd(1.0), layout=model.layout, mesh=mesh
        )
        return {path for path in flatten(state.trained) if "lora" not in path}

    with pytest.raises(ValueError, match=r"'lm_head' has no weight .* name embed_tokens alone"):
        trained("embed_tokens", "lm_head")
    for whole in ("embed_tokens", "embed_tokens|lm_head"):
        assert trained(whole) == {"embed_tokens/embedding"}


@pytest.mark.parametrize("by", ["training", "ownership"])
def test_combine_inverts_partition(adapted: Adapted, by: Any) -> None:
    params = adapted("decoder", "pissa_kept-standard-dora")
    mine, rest = partition(params, by=by, whole=("norm",))
    names = {path.rpartition("/")[2] for path in flatten(mine)}
    frozen = {"lora_scale", "lora_a0", "lora_b0", "start_scale"}
    assert names == {"lora_a", "lora_b", "magnitude", "scale"} | (
        frozen if by == "ownership" else set()
    )
    assert jax.tree.structure(combine(mine, rest)) == jax.tree.structure(params)
    assert flatten(combine(rest, mine)).keys() == flatten(params).keys()
    with pytest.raises(ValueError, match="two of the trees hold the leaf"):
        combine(mine, rest, mine)


def test_what_depends_on_a_step_belongs_to_no_adapter(zoo: Any, adapted: Adapted) -> None:
    layout = zoo("decoder").layout
    params = with_dropout(adapted("decoder", "kaiming-standard-dora"), KEY, rate=0.5)
    params = with_norms(params, layout=layout)
    owned, _ = partition(params, by="ownership")
    assert {path.rpartition("/")[2] for path in flatten(owned)} == {
        "lora_a",
        "lora_b",
        "lora_scale",
        "magnitude",
    }
    assert not {"norm", "dropout_key", "dropout_rate"} & {
        p.rpartition("/")[2] for p in flatten(merge_adapters(params, layout=layout))
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", TABLE)
def test_trained_leaves_share_no_buffer_with_frozen_ones(adapted: Adapted, method: str) -> None:
    """The step donates trained leaves; a frozen leaf in the same buffer would be deleted too."""
    trained, frozen = partition(adapted("decoder", method))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(frozen)]
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trained)} & set(pointers)
