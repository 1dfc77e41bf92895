"""Experts that a checkpoint stacks, and weights in MXFP4, without torch."""

from __future__ import annotations

import numpy as np
import pytest

from lorax_ft.interop.expert_stacks import joined_experts, split_experts
from lorax_ft.interop.lazy_tensor import LazyTensor
from lorax_ft.interop.mxfp4 import assemble_mxfp4, dequantized

E, I, F, O = 3, 64, 5, 4


def lazy(array: np.ndarray) -> LazyTensor:
    return LazyTensor(array.shape, array.__getitem__)


def test_columns_of_gate_and_up_alternate() -> None:
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(E, I, 2 * F))
    bias = rng.normal(size=(E, 2 * F))
    name = "model.layers.0.mlp.experts"
    tensors = {f"{name}.gate_up_proj": lazy(stack), f"{name}.gate_up_proj_bias": lazy(bias)}
    split = split_experts(tensors | {"model.norm.weight": lazy(np.ones(4))})
    assert len(split) == 4 * E + 1
    for tensor in split.values():
        assert tensor.read(()).shape == tensor.shape
    np.testing.assert_array_equal(split[f"{name}.2.gate_proj.weight"].read(()), stack[2, :, ::2].T)
    np.testing.assert_array_equal(split[f"{name}.1.up_proj.weight"].read(()), stack[1, :, 1::2].T)
    np.testing.assert_array_equal(split[f"{name}.1.up_proj.bias"].read(()), bias[1, 1::2])
    some = (slice(1, 3), slice(10, 20))
    up = split[f"{name}.0.up_proj.weight"]
    np.testing.assert_array_equal(up.read(some), up.read(())[some])


def test_joined_as_they_were() -> None:
    rng = np.random.default_rng(0)
    leaves = {
        "layers/mlp/experts/down_proj/kernel": rng.normal(size=(2, E, F, O)),
        "layers/mlp/experts/gate_proj/kernel": rng.normal(size=(2, E, I, F)),
        "layers/mlp/experts/gate_proj/bias": rng.normal(size=(2, E, F)),
        "layers/mlp/experts/up_proj/bias": rng.normal(size=(2, E, F)),
        "layers/mlp/experts/up_proj/kernel": rng.normal(size=(2, E, I, F)),
        "norm/scale": rng.normal(size=4),
    }
    joined = dict(joined_experts(leaves.items(), {}))
    assert {name: tensor.shape for name, tensor in joined.items()} == {
        "model.layers.0.mlp.experts.down_proj": (E, F, O),
        "model.layers.1.mlp.experts.down_proj": (E, F, O),
        "model.layers.0.mlp.experts.gate_up_proj": (E, I, 2 * F),
        "model.layers.1.mlp.experts.gate_up_proj": (E, I, 2 * F),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (E, 2 * F),
        "model.layers.1.mlp.experts.gate_up_proj_bias": (E, 2 * F),
        "model.norm.weight": (4,),
    }
    again = split_experts({name: lazy(tensor) for name, tensor in joined.items()})
    gate = again["model.layers.1.mlp.experts.2.gate_proj.weight"].read(())
    np.testing.assert_array_equal(gate.T, leaves["layers/mlp/experts/gate_proj/kernel"][1, 2])


def test_the_values_of_mxfp4() -> None:
    # Codes 1 and 15 in each byte, the lower four bits first, with the exponents 2 and 1.
    blocks = np.full((1, 1, 2, 16), 0xF1, np.uint8)
    scales = np.array([[[129, 128]]], np.uint8)
    expected = np.concatenate([np.tile([2.0, -24.0], 16), np.tile([1.0, -12.0], 16)])
    np.testing.assert_array_equal(dequantized(blocks, scales), expected[None, None])


def test_a_part_of_an_mxfp4_weight() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (E, O, I // 32, 16), np.uint8)
    scales = rng.integers(120, 130, (E, O, I // 32), np.uint8)
    parts = {"x.down_proj_blocks": lazy(blocks), "x.down_proj_scales": lazy(scales)}
    weight = assemble_mxfp4(parts, source="these tests")["x.down_proj"]
    assert weight.shape == (E, I, O)
    whole = weight.read(())
    np.testing.assert_array_equal(whole.swapaxes(1, 2), dequantized(blocks, scales))
    some = (slice(1, 2), slice(3, 40), slice(1, None, 2))
    np.testing.assert_array_equal(weight.read(some), whole[some])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"x_blocks": (2, 3, 1, 16)}, "these tests: x_blocks lacks its x_scales"),
        (
            {"x_blocks": (2, 3, 1, 16), "x_scales": (2, 3, 2)},
            r"x_blocks has the shape \(2, 3, 1, 16\) and its scales \(2, 3, 2\); expected",
        ),
        ({"x_blocks": (3, 1, 16), "x_scales": (3, 1)}, "expected"),
    ],
)
def test_damaged_mxfp4(parts: dict[str, tuple[int, ...]], said: str) -> None:
    tensors = {name: lazy(np.zeros(shape, np.uint8)) for name, shape in parts.items()}
    with pytest.raises(ValueError, match=said):
        assemble_mxfp4(tensors, source="these tests")
