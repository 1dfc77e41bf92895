"""NF4 checkpoints of transformers and bitsandbytes: their tensors, read and written.

A plain checkpoint stores a kernel of I inputs and O outputs as `X.weight` `[O, I]`. With N = O · I,
these checkpoints store

    X.weight                                [⌈N / 2⌉, 1] bytes  the codes
    X.weight.absmax                         [⌈N / 64⌉]          float32; uint8 if quantized too
    X.weight.quant_map                      [16]                the codebook
    X.weight.quant_state.bitsandbytes__nf4  JSON as bytes       shape, dtype, block sizes, offset

and with double quantization also

    X.weight.nested_absmax                  [⌈N / 64 / 256⌉]    the absmax of the absmax values
    X.weight.nested_quant_map               [256]               their codebook
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

from lorax_ft.interop.lazy_tensor import Index, LazyTensor, Tensors, all_finite
from lorax_ft.quant import double, nf4
from lorax_ft.quant.double import DoubleQuantized
from lorax_ft.quant.kernels import quantize
from lorax_ft.quant.nf4 import NF4

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
WAY_OUT = "load the original checkpoint and set quant.format instead"


@dataclasses.dataclass(frozen=True)
class NF4Tensor(LazyTensor):
    """A weight `[O, I]` that its file stores in NF4; `read` dequantizes it."""

    nf4: Callable[[str], NF4]
    """Returns the kernel `[I, O]` with the file's codes, given the dtype to dequantize to."""
    double_quant: bool
    """Whether its absmax values are quantized too."""


def check_quantization_config(config: Any, *, source: str) -> None:
    """Raises a `ValueError` unless a quantization_config is that of bitsandbytes NF4."""
    method = _quantization_method(config)
    if method != "bitsandbytes nf4":
        raise ValueError(
            f"{source} has a quantization_config of {method!r}; "
            f"only bitsandbytes nf4 and mxfp4 are supported: {WAY_OUT}"
        )


def _quantization_method(config: Any) -> Any:
    """The method and its format in words; a config that names no method is returned as it is."""
    if not isinstance(config, Mapping):
        return config
    method = config.get("quant_method")
    if method != "bitsandbytes":
        return method or config
    if not config.get("load_in_4bit"):
        return "bitsandbytes LLM.int8()"
    # fp4 is the default of transformers' BitsAndBytesConfig.
    return f"bitsandbytes {config.get('bnb_4bit_quant_type', 'fp4')}"


def assemble_nf4(tensors: Tensors, *, source: str) -> dict[str, LazyTensor]:
    """Replaces the tensors that make up an NF4 weight by one `NF4Tensor` under the weight's name.

    Raises:
      ValueError: a part is missing or has the wrong size, or a block size or codebook differs from
        those of `lorax_ft.quant`.
    """
    assembled = dict(tensors)
    double_quants = set()
    for name in tensors:
        if f"{name}.{STATE}" not in tensors:
            continue
        weight = _nf4_tensor(tensors, name, where=f"{source}: {name}")
        double_quants.add(weight.double_quant)
        for part in PARTS:
            assembled.pop(f"{name}.{part}", None)
        assembled[name] = weight
    # A stack of kernels is one leaf, in one format.
    if len(double_quants) > 1:
        raise ValueError(
            f"{source} uses double quantization for some of its weights only; {WAY_OUT}"
        )
    return assembled


def nf4_tensors(name: str, leaf: NF4) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that store a kernel `[I, O]`; `name` is that of its weight."""
    o, i = math.prod(leaf.outs), math.prod(leaf.ins)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": leaf.dtype,
        "shape": [o, i],
    }
    codes = np.asarray(leaf.codes)
    yield name, codes.reshape(-1, 1)
    absmax = leaf.absmax
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
    # safetensors files hold only tensors, so bitsandbytes stores the JSON as a tensor of bytes.
    text = json.dumps(state).encode()
    yield f"{name}.{STATE}", np.frombuffer(text, np.uint8)


def quantization_config(*, double_quant: bool, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """The quantization_config of a config.json.

    Args:
      double_quant: whether absmax values are quantized too.
      dtype: the dtype that the model computes in.
      skipped: names of the linear modules that are not quantized.
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


def _nf4_tensor(tensors: Tensors, name: str, *, where: str) -> NF4Tensor:
    """Checks the parts of a weight; the large ones stay views of the file until they are read."""

    def part(suffix: str) -> np.ndarray:
        tensor = tensors.get(f"{name}.{suffix}")
        if tensor is None:
            raise ValueError(f"{where} lacks its {suffix}")
        return tensor.read(())

    state = _read_state(part(STATE), where=where)
    o, i = state["shape"]
    double_quant = "nested_blocksize" in state
    expected = _abstract_kernel(i, o, double_quant=double_quant)
    # bnb_4bit_quant_storage may be any dtype: its bytes are the codes, then padding.
    stored_codes = tensors[name].read(())
    codes = stored_codes.reshape(-1).view(np.uint8)
    stored = dataclasses.replace(
        expected,
        codes=codes[: expected.codes.size],
        absmax=_absmax(part, state, where=where),
    )
    _check_parts(stored, expected, where=where)

    def to_device(view: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(view).reshape(like.shape)

    def read_nf4(dtype: str) -> NF4:
        scales = stored.absmax
        floats = scales.scale if isinstance(scales, DoubleQuantized) else scales
        if not all_finite(np.asarray(floats)):
            raise ValueError(f"{where}: its absmax holds values that are not finite: {WAY_OUT}")
        leaf = jax.tree.map(to_device, stored, expected)
        return dataclasses.replace(leaf, dtype=dtype)

    def read(index: Index) -> np.ndarray:
        kernel = read_nf4("float32").dequantized()  # [I, O]
        return np.asarray(kernel).T[index]

    return NF4Tensor(shape=(o, i), read=read, nf4=read_nf4, double_quant=double_quant)


def _absmax(part: Callable[[str], np.ndarray], state: Mapping[str, Any], *, where: str) -> Any:
    """The absmax values as stored: an array, or with double quantization a `DoubleQuantized`."""
    absmax = part("absmax")
    _check_quant_map(part("quant_map"), np.array(nf4.CODEBOOK), where=f"{where}.quant_map")
    if "nested_blocksize" not in state:
        return absmax
    nested_map = part("nested_quant_map")
    _check_quant_map(nested_map, double.VALUES, where=f"{where}.nested_quant_map")
    # The fields are declared as JAX arrays; these stay NumPy views of the file.
    fields: dict[str, Any] = {
        "codes": absmax,
        "scale": part("nested_absmax"),
        "offset": np.array(state["nested_offset"], np.float32),
    }
    return DoubleQuantized(**fields)


def _abstract_kernel(i: int, o: int, *, double_quant: bool) -> Any:
    """The shapes and dtypes that an NF4 kernel `[I, O]` has here."""

    def quantized(w: jax.Array) -> Any:
        return quantize(w, format="nf4", double_quant=double_quant, n_stack=0, n_in=1)

    return jax.eval_shape(quantized, jax.ShapeDtypeStruct((i, o), jnp.float32))


def _check_parts(stored: NF4, expected: NF4, *, where: str) -> None:
    """Raises a `ValueError` if a part has the wrong size or dtype for the kernel's shape.

    Shapes may differ: bitsandbytes stores codes and absmax flat.
    """
    o, i = math.prod(expected.outs), math.prod(expected.ins)
    # In the order of the leaves. The last leaf, the offset, comes from the state instead.
    parts = ("codes", "absmax", "nested_absmax")
    leaves = jax.tree.leaves(stored)
    expected_leaves = jax.tree.leaves(expected)
    for part, given, wanted in zip(parts, leaves, expected_leaves, strict=False):
        found = f"{given.size} {given.dtype}"
        needed = f"{wanted.size} {wanted.dtype}"
        if found != needed:
            raise ValueError(f"{where} has {found} for its {part}; {o} × {i} needs {needed}")


def _read_state(text: np.ndarray, *, where: str) -> dict[str, Any]:
    """Parses the quant state of a weight from its JSON, and checks that it is supported."""
    try:
        state = json.loads(text.tobytes())
        fields = {
            "quant_type": state["quant_type"],
            "blocksize": state["blocksize"],
            "nested_blocksize": state.get("nested_blocksize", double.BLOCK),
        }
        shape = [int(size) for size in state["shape"]]
        if "nested_blocksize" in state:
            float(state["nested_offset"])
    # RecursionError: of nested lists; OverflowError: of infinite sizes.
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: its {STATE} is damaged ({reason})") from error
    supported = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "nested_blocksize": double.BLOCK,
    }
    for field, value in fields.items():
        ours = supported[field]
        if value != ours:
            raise ValueError(
                f"{where} has the {field} {value!r}; only {ours!r} is supported: {WAY_OUT}"
            )
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{where} has the shape {shape} in its {STATE}, which is not a matrix's")
    return state | {"shape": shape}


def _check_quant_map(given: np.ndarray, known: np.ndarray, *, where: str) -> None:
    """Raises a `ValueError` if the codes of a file stand for other values than ours."""
    # Not bitwise: bitsandbytes computes these maps at run time, where rounding may differ.
    same = given.size == known.size
    if same:
        values = given.reshape(-1).astype(np.float32)
        same = np.allclose(values, known, rtol=1e-6, atol=0)
    if not same:
        raise ValueError(f"{where} differs from the values of bitsandbytes 0.50; {WAY_OUT}")
