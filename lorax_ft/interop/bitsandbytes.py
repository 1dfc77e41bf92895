"""NF4 checkpoints of transformers and bitsandbytes, read and written.

A kernel of I inputs and O outputs, which a plain checkpoint has as `X.weight` `[O, I]`, is there, with N = O · I,

    X.weight                                [⌈N / 2⌉, 1] bytes      the codes
    X.weight.absmax                         [⌈N / 64⌉]              float32, or uint8 where quantized twice
    X.weight.quant_map                      [16]                    the codebook
    X.weight.nested_absmax                  [⌈N / 64 / 256⌉]        of the absmax values, where quantized twice
    X.weight.nested_quant_map               [256]                   what their uint8 mean
    X.weight.quant_state.bitsandbytes__nf4  JSON as bytes           shape, dtype, block sizes, offset
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.lazy_tensor import LazyTensor
from lorax_ft.quant import double, nf4
from lorax_ft.quant.double import DoubleQuantized
from lorax_ft.quant.kernels import quantize
from lorax_ft.quant.nf4 import NF4

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
WAY_OUT = "take the checkpoint that it came from, which quant.format quantizes while it is loaded"


@dataclasses.dataclass(frozen=True)
class NF4Tensor(LazyTensor):
    """A weight `[O, I]` that lies in the file as NF4; `read` dequantizes."""

    nf4: Callable[[str], NF4]
    """The kernel `[I, O]` as it lies in the file, whose values have a dtype once dequantized."""
    double_quant: bool
    """Whether its absmax values are quantized too."""


def check_packing(packing: Any, *, source: str) -> None:
    """Raise a `ValueError` unless the quantization_config of a config.json is bitsandbytes' NF4."""
    given = packing if isinstance(packing, Mapping) else {}
    what = given.get("quant_method")
    if what == "bitsandbytes":
        what = f"bitsandbytes {given.get('bnb_4bit_quant_type', 'fp4') if given.get('load_in_4bit') else 'LLM.int8()'}"
    if what != "bitsandbytes nf4":
        raise ValueError(
            f"{source} has a quantization_config of {what or packing!r}; read is bitsandbytes nf4 alone: {WAY_OUT}"
        )


def unpacked(tensors: Mapping[str, LazyTensor], *, source: str) -> dict[str, LazyTensor]:
    """A checkpoint's tensors with all that belongs to a packed weight in one, under the weight's name.

    Raises:
      ValueError: a part is missing or has another size, or blocks or codebooks are not those of `lorax_ft.quant`.
    """
    names = [name for name in tensors if f"{name}.{STATE}" in tensors]
    parts = {f"{name}.{part}" for name in names for part in PARTS}
    plain = {name: stored for name, stored in tensors.items() if name not in parts}
    packed = {name: _packed(tensors, name, where=f"{source}: {name}") for name in names}
    if len({weight.double_quant for weight in packed.values()}) > 1:
        raise ValueError(
            f"{source} has absmax values in 8 bits in some of its weights alone; {WAY_OUT}"
        )
    return plain | packed


def packed_tensors(name: str, leaf: NF4) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a kernel `[I, O]` whose weight has this name."""
    absmax = leaf.absmax
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": leaf.dtype,
        "shape": [math.prod(leaf.outs), math.prod(leaf.ins)],
    }
    yield name, np.asarray(leaf.codes).reshape(-1, 1)
    if isinstance(absmax, DoubleQuantized):
        state |= {
            "nested_blocksize": double.BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(absmax.offset),
        }
        yield f"{name}.nested_absmax", np.asarray(absmax.scale)
        yield f"{name}.nested_quant_map", double.VALUES
        absmax = absmax.codes
    yield f"{name}.absmax", np.asarray(absmax).reshape(-1)
    yield f"{name}.quant_map", np.array(nf4.CODEBOOK, np.float32)
    yield f"{name}.{STATE}", np.frombuffer(json.dumps(state).encode(), np.uint8)


def packing_config(*, double_quant: bool, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """The quantization_config of a config.json.

    Args:
      double_quant: whether absmax values are quantized too.
      dtype: in which the model computes.
      skipped: names of the linear modules that are not packed.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def _packed(tensors: Mapping[str, LazyTensor], name: str, *, where: str) -> NF4Tensor:
    """The weight of this name. Its parts are checked; the large ones stay views of their file."""

    def part(suffix: str) -> np.ndarray:
        if f"{name}.{suffix}" not in tensors:
            raise ValueError(f"{where} lacks its {suffix}")
        return tensors[f"{name}.{suffix}"].read(())

    state = _state(part(STATE), where=where)
    double_quant = "nested_blocksize" in state
    o, i = state["shape"]
    abstract = jax.ShapeDtypeStruct((i, o), jnp.float32)
    like: Any = jax.eval_shape(
        lambda w: quantize(w, format="nf4", double_quant=double_quant, n_stack=0, n_in=1), abstract
    )
    codes = (
        tensors[name].read(()).reshape(-1).view(np.uint8)
    )  # stored as any dtype (bnb_4bit_quant_storage)
    absmax: Any = part("absmax")
    _check_map(part("quant_map"), np.array(nf4.CODEBOOK), where=f"{where}.quant_map")
    if double_quant:
        _check_map(part("nested_quant_map"), double.VALUES, where=f"{where}.nested_quant_map")
        offset: Any = np.array(state["nested_offset"], np.float32)
        absmax = DoubleQuantized(codes=absmax, scale=part("nested_absmax"), offset=offset)  # type: ignore[arg-type]
    views = dataclasses.replace(like, codes=codes[: like.codes.size], absmax=absmax)
    for what, given, wanted in zip(
        ("codes", *PARTS[::2]), *map(jax.tree.leaves, (views, like)), strict=False
    ):
        if given.dtype != wanted.dtype or given.size != wanted.size:
            raise ValueError(
                f"{where} has {given.size} {given.dtype} for its {what}; {o} × {i} takes {wanted.size} {wanted.dtype}"
            )

    def read_nf4(dtype: str) -> NF4:
        parts = jax.tree.map(lambda view, like: jnp.asarray(view).reshape(like.shape), views, like)
        return dataclasses.replace(parts, dtype=dtype)

    return NF4Tensor(
        (o, i),
        lambda index: np.asarray(read_nf4("float32").dequantized()).T[index],
        read_nf4,
        double_quant,
    )


def _state(text: np.ndarray, *, where: str) -> dict[str, Any]:
    """What the JSON beside a weight says."""
    try:
        state = json.loads(text.tobytes())
        given = {"quant_type": state["quant_type"], "blocksize": state["blocksize"]}
        given["nested_blocksize"] = state.get("nested_blocksize", double.BLOCK)
        shape = [int(size) for size in state["shape"]]
        if "nested_blocksize" in state:
            float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: its {STATE} is damaged ({type(error).__name__}: {error})"
        ) from error
    known = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "nested_blocksize": double.BLOCK}
    if other := [field for field, value in given.items() if value != known[field]]:
        field = other[0]
        raise ValueError(
            f"{where} has the {field} {given[field]!r}; read is {known[field]!r} alone: {WAY_OUT}"
        )
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{where} has the shape {shape} in its {STATE}, which is not a matrix's")
    return state | {"shape": shape}


def _check_map(given: np.ndarray, known: np.ndarray, *, where: str) -> None:
    """Raise where codes mean other values than here; what computed the map may have rounded another way."""
    if given.size != known.size or not np.allclose(
        given.reshape(-1).astype(np.float32), known, rtol=1e-6, atol=0
    ):
        raise ValueError(f"{where} holds other values than bitsandbytes 0.50 has; {WAY_OUT}")
