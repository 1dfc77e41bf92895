"""Loads a model from a Hugging Face folder, a GGUF file or the hub."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lorax_ft.config import ModelConfig, QuantConfig
from lorax_ft.files import read_json, within
from lorax_ft.interop.bitsandbytes import NF4Tensor
from lorax_ft.interop.chat_template import use_template
from lorax_ft.interop.expert_stacks import split_experts
from lorax_ft.interop.gguf import read_gguf
from lorax_ft.interop.huggingface import (
    decoder_config,
    family_names,
    read_folder,
    stacks_experts,
)
from lorax_ft.interop.lazy_tensor import Index, Read, Tensors
from lorax_ft.interop.locate import locate
from lorax_ft.interop.params import Parts, head_is_table, load_params
from lorax_ft.interop.text_part import notice
from lorax_ft.interop.tokenizer import load_tokenizer
from lorax_ft.lowrank.requantize import Original
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import PART_OF, LoadedModel, decoder_layout
from lorax_ft.quant.kernels import Format, Quantized, format_of, quantize
from lorax_ft.quant.stream import streamed
from lorax_ft.tree import Shape, Tree, flatten

Shardings = Callable[[str, Any], Any]
"""(slash path, shapes of the leaf) -> its sharding; a quantized leaf has one for each part."""


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto",
    expert_products: Literal["auto", "dense", "blocks", "ragged"] = "auto",
    remat: Literal["none", "products", "mlp", "full"] = "full",
    quant: QuantConfig | None = None,
    shardings: Shardings | None = None,
    check: Callable[[DecoderConfig], None] = lambda config: None,
) -> LoadedModel:
    """Loads a decoder with its parameters and tokenizer.

    Of a checkpoint with a `text_config`, which sees images too, it loads the text part and warns.

    Args:
      path: a Hugging Face folder, a .gguf file, or a hub id such as "HuggingFaceTB/SmolLM2-135M".
      revision: branch, tag or commit of a hub id.
      chat_template: in place of the tokenizer's own, as `ModelConfig` says.
      dtype: of the parameters and the activations.
      attention: the attention kernel, as `ModelConfig` says.
      expert_products: how the experts of a sparse model multiply, as `ModelConfig` says.
      remat: what the backward pass recomputes, as `ModelConfig` says.
      quant: the format to quantize the kernels of linear layers to, one matrix at a time. A
        checkpoint that is already in bitsandbytes' NF4 keeps its own codes.
      shardings: (slash path, shapes) -> sharding, for each leaf; for a quantized leaf, the sharding
        of each of its parts. None puts everything on the default device.
      check: called with the decoder's config before the weights are read; it may raise.

    Raises:
      ValueError: there is no model at `path`, or it is damaged or not supported.
    """
    computing: dict[str, Any] = {
        "dtype": dtype,
        "attention": attention,
        "expert_products": expert_products,
        "remat": remat,
    }
    # Its constructor validates these values.
    ModelConfig(path=str(path), revision=revision, chat_template=chat_template, **computing)
    _check_quant(quant)
    _check_attention(attention)

    location, source = locate(path, revision), str(path)
    hf_config, tensors, tokenizer = _read(location)
    if chat_template is not None and tokenizer is not None:
        use_template(tokenizer, chat_template)
    config = decoder_config(hf_config, source=source, **computing)
    config, hf_config = _with_own_head(config, hf_config, tensors)
    check(config)
    _warn_of_part(hf_config, source)

    loader = Loader(
        dtype=dtype,
        quant=_quantization(quant, tensors, source),
        shardings=shardings or _default_device,
        quantizable=_quantizable(config),
    )
    params = load_params(
        config, tensors, names=family_names(hf_config), source=source, place=loader.place
    )
    return LoadedModel(
        config=config,
        format=_format(params),
        params=params,
        originals=loader.originals,
        prequantized=_is_quantized(tensors),
        tokenizer=tokenizer,
        hf_config=hf_config,
        source=source,
        generation_config=_generation_config(location),
    )


def _check_attention(attention: str) -> None:
    """Raise if attention is named that only other devices compute."""
    backend = jax.default_backend()
    if attention == "splash" and backend != "tpu":
        raise ValueError(
            f"model.attention is splash, which needs a TPU (the backend is {backend}); use auto"
        )


def _warn_of_part(hf_config: dict[str, Any], source: str) -> None:
    """Warn where only the text part of a checkpoint is loaded."""
    if PART_OF in hf_config:
        # Level 3 is the caller of load_model.
        warnings.warn(notice(hf_config, source=source), stacklevel=3)


def _with_own_head(
    config: DecoderConfig, hf_config: dict[str, Any], tensors: Mapping[str, Any]
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The configs without the tie, where the checkpoint's head differs from its table."""
    if not config.tied or head_is_table(tensors):
        return config, hf_config
    untied = dataclasses.replace(config, tied=False)
    return untied, {**hf_config, "tie_word_embeddings": False}


def _check_quant(quant: Any) -> None:
    """Raise for the name of a format where its options are expected."""
    if not isinstance(quant, QuantConfig | None):
        raise ValueError(
            f"quant is {quant!r}; give a QuantConfig, such as QuantConfig(format='nf4')"
        )


def _quantizable(config: DecoderConfig) -> set[str]:
    """The paths of the modules whose kernels `quant.format` quantizes."""
    return {path for path, spec in decoder_layout(config).items() if spec.quantizable}


def _format(params: Tree) -> Format | None:
    """The format of the quantized kernels; None if there are none."""
    for leaf in flatten(params).values():
        if format_of(leaf) is not None:
            return format_of(leaf)
    return None


def _read(location: Path) -> tuple[dict[str, Any], Tensors, Any]:
    """Reads the config.json, the tensors and the tokenizer of a folder or a .gguf file."""
    if location.suffix == ".gguf":
        return read_gguf(location)
    hf_config, tensors = read_folder(location)
    if stacks_experts(hf_config):
        tensors = split_experts(tensors)
    return hf_config, tensors, load_tokenizer(location)


def _generation_config(location: Path) -> dict[str, Any]:
    # Many checkpoints have none, and a .gguf file never does.
    if location.suffix == ".gguf" or not (location / "generation_config.json").is_file():
        return {}
    return read_json(within(location, "generation_config.json"))


def _quantization(quant: QuantConfig | None, tensors: Tensors, source: str) -> QuantConfig:
    """How to quantize kernels: not at all if the checkpoint's are quantized."""
    if not _is_quantized(tensors):
        return quant or QuantConfig()
    if quant and quant.format == "int8":
        raise ValueError(
            f"quant.format is int8, but {source} is in NF4 already; leave quant out to keep NF4"
        )
    return QuantConfig()


def _is_quantized(tensors: Tensors) -> bool:
    return any(isinstance(tensor, NF4Tensor) for tensor in tensors.values())


def _default_device(path: str, leaf: Any) -> Any:
    return jax.tree.map(lambda part: SingleDeviceSharding(jax.devices()[0]), leaf)


class Loader:
    """Puts leaves on their devices and quantizes kernels.

    `originals` maps the path of each quantized module to a function that reads its kernel again.
    """

    def __init__(
        self, *, dtype: str, quant: QuantConfig, shardings: Shardings, quantizable: Set[str]
    ) -> None:
        self._dtype = dtype
        self._quant = quant
        self._shardings = shardings
        self._quantizable = quantizable
        self.originals: dict[str, Original] = {}

    def place(self, path: str, shape: Shape, read: Read, parts: Parts) -> Any:
        """Puts a leaf on its devices (see `lorax_ft.interop.params.Place`)."""
        quantized = {}
        for index, part in parts.items():
            if isinstance(part, NF4Tensor):
                quantized[index] = part
        module, _, name = path.rpartition("/")
        is_kernel = name == "kernel" and module in self._quantizable
        # A stack is one leaf, so it is quantized as a whole or not at all: a checkpoint that
        # quantizes only some matrices of it is dequantized, which `read` does.
        is_quantized = len(quantized) == len(parts) or self._quant.format != "none"
        if is_kernel and is_quantized:
            return self._place_quantized(path, shape, read, quantized)
        sharding = self._shardings(path, jax.ShapeDtypeStruct(shape, self._dtype))
        return jax.make_array_from_callback(shape, sharding, read)  # type: ignore[arg-type]

    def _place_quantized(
        self,
        path: str,
        shape: Shape,
        read: Read,
        quantized: Mapping[Shape, NF4Tensor],
    ) -> Any:
        """Puts a stack of kernels `[*stack, in, out]` on its devices, quantized one by one."""
        format: Format = "int8" if self._quant.format == "int8" else "nf4"
        double_quant = self._quant.double
        if quantized:
            double_quant = all(part.double_quant for part in quantized.values())
        stack, matrix_shape = shape[:-2], shape[-2:]

        def original(index: Shape) -> np.ndarray:
            one: Index = tuple(slice(i, i + 1) for i in index)
            whole = (slice(None), slice(None))
            matrix = read(one + whole)  # [1, ..., in, out]
            return matrix.reshape(matrix_shape)

        def to_format(w: jax.Array, n_stack: int) -> Quantized:
            return quantize(
                w,
                format=format,
                double_quant=double_quant,
                n_stack=n_stack,
                n_in=1,
            )

        def quantized_matrix(index: Shape) -> Quantized:
            if quantized:
                return quantized[index].nf4(self._dtype)
            w = jnp.asarray(original(index))
            return to_format(w, n_stack=0)

        module = path.removesuffix("/kernel")
        self.originals[module] = original
        like = jax.eval_shape(
            lambda w: to_format(w, n_stack=len(stack)),
            jax.ShapeDtypeStruct(shape, self._dtype),
        )
        sharding = self._shardings(path, like)
        return streamed(quantized_matrix, stack=stack, like=like, on=sharding)
