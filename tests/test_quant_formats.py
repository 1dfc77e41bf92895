"""The quantized formats: codebooks, bits per parameter, errors and layout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import Array
from quant_cases import FORMATS

from lorax_ft.quant.double import VALUES
from lorax_ft.quant.kernels import dense, quantize
from lorax_ft.quant.nf4 import CODEBOOK

pytestmark = pytest.mark.usefixtures("strict")


def test_the_codebook_is_its_quantile_construction() -> None:
    """QLoRA (2305.14314, section 3): quantiles of N(0, 1), scaled to [−1, 1].

    8 levels for the negative half and 9 for the positive half, which share 0.
    """
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*above, 0, *below]) / above.max()
    np.testing.assert_allclose(CODEBOOK, values, atol=3e-7)


def normal(shape: tuple[int, ...], seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_errors_on_normal_weights() -> None:
    """In blocks of 64: mean absolute error 0.0728, MSE 0.00846; NF4 < FP4 < INT4 in MSE."""
    w = normal((1024, 1024))
    error = np.asarray(dense(quantize(w, format="nf4", n_stack=0, n_in=1)) - w, np.float64)
    assert np.abs(error).mean() == pytest.approx(0.0728, rel=0.01)
    assert (error**2).mean() == pytest.approx(0.00846, rel=0.01)
    # FP4 is E2M1, and INT4 has ±7 steps. INT4 with 16 levels would beat FP4, and bitsandbytes' FP4
    # (with a subnormal of 1/192).
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    blocks = np.asarray(w, np.float64).T.reshape(-1, 64)
    fp4_error, int4_error = (
        rounded_error(blocks, np.union1d(-values, values)) for values in (fp4, np.arange(8) / 7)
    )
    assert (error**2).mean() < fp4_error < int4_error


def rounded_error(blocks: np.ndarray, codebook: np.ndarray) -> float:
    """The MSE of normal blocks, scaled to absmax 1 and rounded to the nearest codebook value."""
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, blocks / absmax)
    return float(((codebook[codes] * absmax - blocks) ** 2).mean())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shape", [(3, 576, 1536), (3, 576, 576), (2, 1536, 192)])
def test_a_parameter_takes_4_127_bits(shape: tuple[int, ...]) -> None:
    """Counted in bytes; double quantization adds almost no error (QLoRA, section 3)."""
    w = normal(shape)
    single, double_quant = (
        quantize(w, format="nf4", double_quant=d, n_stack=1, n_in=1) for d in (False, True)
    )
    bits = [
        8 * sum(part.nbytes for part in jax.tree.leaves(leaf)) / w.size
        for leaf in (single, double_quant)
    ]
    assert bits == pytest.approx([4.5, 4.127], abs=1e-3)
    lost = [float(jnp.mean((dense(leaf) - w) ** 2)) for leaf in (single, double_quant)]
    assert lost[1] == pytest.approx(lost[0], rel=0.01)


def test_codes_lie_as_bitsandbytes_has_them() -> None:
    """Blocks of 64 along `[out, in]`; two codes per byte, the first in the high 4 bits.

    Ties go to the lower code.
    """
    w = np.asarray(normal((128, 6)))
    for i, o in ((128, 6), (70, 5), (3, 3)):
        leaf = quantize(jnp.asarray(w[:i, :o]), format="nf4", n_stack=0, n_in=1)
        flat = w[:i, :o].T.reshape(-1)
        padded = np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)
        absmax = np.abs(padded).max(1)
        codes = (
            np.abs(padded[..., None] / absmax[:, None, None] - np.array(CODEBOOK))
            .argmin(-1)
            .reshape(-1)
        )
        codes = codes[: flat.size + flat.size % 2]
        np.testing.assert_array_equal(
            np.asarray(leaf.codes).reshape(-1), 16 * codes[::2] + codes[1::2]
        )
        np.testing.assert_array_equal(np.asarray(leaf.absmax).reshape(-1), absmax)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@example(stack=(), ins=[30], outs=[1], name="nf4", dtype="float32")  # a single row of whole blocks
@given(
    stack=st.sampled_from([(), (2,), (2, 3)]),
    ins=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    outs=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_kernels_of_any_shape_come_back(
    stack: tuple[int, ...], ins: list[int], outs: list[int], name: str, dtype: str
) -> None:
    """Shape and dtype are kept, and each value is within half a step of its block's absmax."""
    w = normal((*stack, *ins, *outs)).astype(dtype)
    config = FORMATS[name]
    to = functools.partial(quantize, format=config.format, double_quant=config.double)  # type: ignore[arg-type]
    leaf = to(w, n_stack=len(stack), n_in=len(ins))
    back = dense(leaf)
    assert leaf.shape == back.shape == w.shape
    assert leaf.ndim == w.ndim
    assert back.dtype == w.dtype
    largest = np.abs(np.float32(w)).max()
    widest = 0.5 / 127 if name == "int8" else (1 - 0.6961928) / 2
    step = {"float32": 1e-6, "bfloat16": 2**-8}[dtype] + (0.02 if name == "nf4_double" else 0)
    assert np.abs(np.float32(back) - np.float32(w)).max() <= (widest + step) * largest
    for index in np.ndindex(*stack):
        alone = dense(to(w[index], n_stack=0, n_in=len(ins)))
        np.testing.assert_allclose(np.float32(back[index]), np.float32(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    config = FORMATS[name]
    w = normal((128, 8)).at[:, 3].set(0).at[64:, 5].set(0)  # one channel and one block
    leaf = quantize(w, format=config.format, double_quant=config.double, n_stack=0, n_in=1)  # type: ignore[arg-type]
    back = np.asarray(dense(leaf))
    assert np.isfinite(back).all()
    assert not back[:, 3].any()
    assert not back[64:, 5].any()
    nothing = quantize(0 * w, format=config.format, double_quant=config.double, n_stack=0, n_in=1)  # type: ignore[arg-type]
    assert not np.asarray(dense(nothing)).any()


def test_int8_is_within_half_a_step_of_each_channel() -> None:
    w = normal((100, 12)) * jnp.logspace(-3, 3, 12)
    back = dense(quantize(w, format="int8", n_stack=0, n_in=1))
    absmax = np.abs(w).max(axis=0)
    assert (np.abs(back - w).max(axis=0) <= 0.5001 / 127 * absmax).all()
    np.testing.assert_allclose(np.abs(back).max(axis=0), absmax, rtol=1e-6)


def test_the_dynamic_values_are_256_and_ascend() -> None:
    assert VALUES.shape == (256,)
    assert (np.diff(VALUES) > 0).all()
    assert VALUES[0] == -np.float32(0.99296875)
    assert VALUES[-1] == 1
    assert 0 in VALUES


def test_quantized_leaves_are_trees_of_arrays() -> None:
    """So they work with jit, device_put, checkpoints and eval_shape."""
    leaf = quantize(normal((128, 8)), format="nf4", double_quant=True, n_stack=0, n_in=1)
    assert [part.dtype for part in jax.tree.leaves(leaf)] == [
        "uint8",
        "uint8",
        "float32",
        "float32",
    ]
    shapes = jax.eval_shape(
        lambda w: quantize(w, format="nf4", double_quant=True, n_stack=0, n_in=1), normal((128, 8))
    )
    assert jax.tree.structure(shapes) == jax.tree.structure(leaf)
    assert dataclasses.replace(leaf, dtype="bfloat16").dequantized().dtype == jnp.bfloat16
