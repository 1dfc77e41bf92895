"""The tables of the schema: complete, heeded everywhere, and the only place with leaves' names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from method_cases import KEY, Adapted
from run_cases import ROOT

import lorax_ft as lft
from lorax_ft.interop.peft import save_peft
from lorax_ft.lowrank.inits import find_init
from lorax_ft.lowrank.terms import TERMS
from lorax_ft.schema import INITS, LEAVES, METHODS, AdapterMethod, InitName, Owner, Place
from lorax_ft.tree import flatten, unflatten

PACKAGE = ROOT / "lorax_ft"
ADDED = {name for name, row in LEAVES.items() if row.owner is not Owner.BASE}
MAY_NAME_LEAVES = ("schema.py", "lowrank/terms/", "soft_prompts/", "interop/")


def string_constants(file: Path) -> set[str]:
    """The strings in a file's code, without docstrings."""
    tree = ast.parse(file.read_text())
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {
        node.value for node in constants if isinstance(node.value, str) and id(node) not in docs
    }


def test_leaves_are_named_in_the_schema_the_terms_and_interop_alone() -> None:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        relative = file.relative_to(PACKAGE).as_posix()
        if not relative.startswith(MAY_NAME_LEAVES):
            parts = {part for text in string_constants(file) for part in text.split("/")}
            if named := parts & ADDED:
                found[relative] = named
    # A module of each of these is called norm, as in Hugging Face's checkpoints.
    assert found == {
        "models/linear_attention.py": {"norm"},
    }
    assert string_constants(PACKAGE / "lowrank/terms/low_rank.py") >= {"lora_a", "lora_b"}


def test_every_leaf_has_a_term_and_every_term_has_rows() -> None:
    of_terms = {name for term in TERMS for name in (*term.all_leaves, *term.shared)}
    beside_kernels = {name for name in ADDED if LEAVES[name].place is not Place.DOOR}
    # The tokens of an invocation stand in no layer.
    assert of_terms == beside_kernels - {"lora_invocation"} | {"bias"}
    assert {term.active for term in TERMS} - {None} <= ADDED


def test_names_of_inits_and_methods_are_their_rows() -> None:
    assert get_args(InitName) == tuple(INITS)
    assert get_args(AdapterMethod) == tuple(METHODS)
    assert all(callable(find_init(name)) for name in INITS)
    with pytest.raises(ValueError, match=r"no init 'pisa'; known: kaiming.*mean 'pissa'"):
        find_init("pisa")


def without(params: Any, name: str) -> Any:
    return unflatten({p: leaf for p, leaf in flatten(params).items() if p != name})


@pytest.mark.parametrize(
    ("method", "missing", "said"),
    [
        ("kaiming-standard-dora", "lora_a", r"has the leaf 'lora_\w+' but no 'lora_a'"),
        ("kaiming-standard-dora", "lora_b", r"has the leaf 'lora_\w+' but no 'lora_b'"),
        ("kaiming-standard-dora", "lora_scale", r"has the leaf 'lora_\w+' but no 'lora_scale'"),
        ("ia3-standard", "ia3_active", "has the leaf 'ia3_out' but no 'ia3_active'"),
        ("ia3-standard", "ia3_out", "has the leaf 'ia3_active' but no 'ia3_in'"),
        ("miss-standard", "miss_block", "has the leaf 'miss_rank' but no 'miss_block'"),
        ("miss-standard", "miss_rank", "has the leaf 'miss_block' but no 'miss_rank'"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_missing_leaves_are_the_same_error_through_every_door(
    decoder: Any, adapted: Adapted, tmp_path: Path, method: str, missing: str, said: str
) -> None:
    model = decoder()
    whole = adapted("decoder", method)
    path = "layers/mlp/up_proj"
    broken = without(whole, f"{path}/{missing}")
    layer = broken["layers"]["mlp"]["up_proj"]
    base, owned = lft.partition(whole, by="ownership")[::-1]
    tokens = jnp.zeros((1, 4), jnp.int32)
    doors = {
        "linear": lambda: lft.linear(layer, jnp.ones((1, 32)), jnp.matmul),
        "merged_kernel": lambda: lft.merged_kernel(layer),
        "forward": lambda: model.apply({"params": broken}, tokens),
        "partition": lambda: lft.partition(broken),
        "merge": lambda: lft.merge_adapters(broken, layout=model.layout),
        "disable": lambda: lft.disable_adapters(broken, model.params, layout=model.layout),
        "norms": lambda: lft.with_norms(broken, layout=model.layout),
        "attach": lambda: lft.attach_adapters(
            base, without(owned, f"{path}/{missing}"), layout=model.layout
        ),
        "save": lambda: save_peft(tmp_path / "adapter", broken, model),
    }
    for name, door in doors.items():
        with pytest.raises(ValueError, match=said):
            print(name, door())  # shown where it does not raise


def test_a_norm_without_its_magnitude_and_a_start_without_its_factors_raise() -> None:
    kernel = jnp.ones((3, 2))
    for leaf, needed in (("norm", "magnitude"), ("lora_a0", "lora_b0"), ("dropout_key", "dropout")):
        with pytest.raises(ValueError, match=f"'{leaf}' but no '{needed}"):
            lft.merged_kernel({"kernel": kernel, leaf: jnp.ones(2)})


def test_a_layer_with_both_vectors_of_ia3_raises() -> None:
    layer = {"kernel": jnp.ones((3, 2)), "ia3_active": jnp.ones(())}
    layer |= {"ia3_in": jnp.ones(3), "ia3_out": jnp.ones(2)}
    with pytest.raises(ValueError, match="'ia3_in' and 'ia3_out', of which it may have one"):
        lft.merged_kernel(layer)
    with pytest.raises(ValueError, match="'ia3_in' and 'ia3_out', of which it may have one"):
        lft.linear(layer, jnp.ones((1, 3)), jnp.matmul)


def test_an_init_of_ones_own(zoo: Any) -> None:
    """Nothing of the library is edited; what it removes is subtracted from the base."""
    case = zoo("decoder")

    def tenth(context: lft.InitContext) -> lft.InitResult:
        factors = context.truncated_svd(context.weight / 10)
        return lft.InitResult(context.divided_by_scale(factors), removed=factors)

    def same(context: lft.InitContext) -> lft.InitResult:
        factors = context.divided_by_scale(context.truncated_svd(context.weight))
        return lft.InitResult(factors, removed=factors)

    options = {"rank": 3, "alpha": 6.0, "targets": ("all-linear", "lm_head")}
    config = lft.AdapterConfig(**options)
    own = lft.add_adapters(case.params, config, layout=case.layout, key=KEY, init=same)
    named = lft.add_adapters(
        case.params, lft.AdapterConfig(init="pissa", **options), layout=case.layout, key=KEY
    )
    jax.tree.map(lambda a, b: assert_equal(a, b), own, named)
    other = lft.add_adapters(case.params, config, layout=case.layout, key=KEY, init=tenth)
    assert set(flatten(other)) == set(flatten(named))


def assert_equal(a: Any, b: Any) -> None:
    assert bool(jnp.array_equal(a, b))
