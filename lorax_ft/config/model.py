"""The base model, its quantization and the mesh of devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from lorax_ft.checks import check, check_positive, check_types

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED_MODEL = str(ASSETS / "tiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model to load, and how to run it."""

    path: str = EMBEDDED_MODEL
    """Base model to fine-tune: a Hugging Face folder, a .gguf file or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit, if model.path is a Hub id."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a Jinja file, or a name that LLaMA-Factory has
    for it, such as chatml, llama3 or alpaca. A base model, whose tokenizer has none, needs one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of base weights and activations; adapters and optimizer state are always float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention implementation.
    auto: splash attention (Pallas) on a TPU, cuDNN on a GPU in bfloat16, blocks of queries on a
    CPU, and XLA where these do not fit."""
    expert_products: Literal["auto", "dense", "blocks", "ragged"] = "auto"
    """How the experts of a sparse model multiply.
    dense: every expert computes every token; blocks, ragged: tokens are sorted by expert, and only
    the chosen experts compute, in blocks of rows or by jax.lax.ragged_dot.
    auto: blocks on a CPU, ragged otherwise."""
    remat: Literal["auto", "none", "products", "mlp", "full"] = "auto"
    """Gradient checkpointing: what the backward pass recomputes.
    none: nothing; products: only what needs no product with a weight; mlp: all but the MLP's wide
    activations; full: everything.
    auto: products, mlp or full, the first that saves at most half of the memory beside the
    weights; full on a CPU in bfloat16."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantization of the frozen base weights, as in QLoRA."""

    format: Literal["none", "nf4", "int8"] = "none"
    """Format of linear weights: none, nf4 (4-bit NormalFloat in blocks of 64) or int8."""
    double: bool = True
    """Double quantization of NF4's absmax values: 4.13 instead of 4.5 bits per parameter."""
    rounds: int = 1
    """Alternating rounds of quantization and SVD, for adapter.init pissa and loftq."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "rounds")
        check(self.rounds <= 100, f"quant.rounds is {self.rounds}; it must be at most 100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Shape of the device mesh: the number of devices along each axis."""

    data: int = -1
    """Data parallelism: number of replicas of the weights; -1 uses all remaining devices."""
    fsdp: int = 1
    """FSDP: number of devices that shard both the rows of a batch and the weights."""
    expert: int = 1
    """Expert parallelism: number of devices that share the experts of a sparse model, and the rows
    of a batch. It must divide the number of experts."""
    context: int = 1
    """Context parallelism: number of devices that shard both the tokens of a row and the weights,
    for rows that are too long for one device."""
    tensor: int = 1
    """Tensor parallelism: number of devices that shard each matrix."""

    def __post_init__(self) -> None:
        check_types(self)
        check(
            self.data == -1 or self.data > 0, f"mesh.data is {self.data}; it must be above 0, or -1"
        )
        for field in ("fsdp", "expert", "context", "tensor"):
            value = getattr(self, field)
            only = "; only mesh.data may be -1" if value == -1 else ""
            check(value > 0, f"mesh.{field} is {value}; it must be above 0{only}")
        check(
            self.expert == 1 or self.context == 1,
            f"mesh.expert is {self.expert} and mesh.context {self.context}; one of them must be 1",
        )

    def check_length(self, length: int) -> None:
        """Raise if rows of so many tokens do not divide over `context` devices.

        Raises:
          ValueError: they do not; the error says which lengths would.
        """
        shorter = length // self.context * self.context
        longer = shorter + self.context
        lengths = f"{shorter} or {longer}" if shorter else f"{longer}"
        check(
            shorter == length,
            f"data.max_length is {length}, which does not divide over mesh.context "
            f"{self.context} devices; {lengths} would",
        )
