"""The tables that say what the library's data is: a row for each leaf and for each initialization.

A layer of a model is a dict of leaves. The leaves beside its kernel say which method it uses, and
their rows here say everything else: canonical axis order, shapes, optimizer groups, shardings,
what is counted, trained and saved. Imports no JAX, so that configs can read it.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping
from typing import Literal, NamedTuple

KernelAxis = Literal["stack", "in", "out"]
KERNEL_AXES: tuple[KernelAxis, ...] = ("stack", "in", "out")
"""The axes that a leaf shares with its kernel, each of which may be several axes of the array."""
OwnAxis = Literal[
    "rank",
    "left_in",
    "right_in",
    "left_out",
    "right_out",
    "entry",
    "block",
    "pair",
    "virtual",
    "width",
    "hidden",
    "layer",
    "key_or_value",
    "head",
    "channel",
    "token",
    "batch",
    "direction",
    "gates",
]
Axis = KernelAxis | OwnAxis
"""All others are one axis of the array, with a size of their own."""
PADDED: tuple[Axis, ...] = ("rank", "entry")
"""Axes along which zeros add nothing, so that the matrices of a stack may differ in size."""


class Owner(enum.Enum):
    """Whom a leaf belongs to."""

    BASE = "base"
    """The pretrained model."""
    ADAPTER = "adapter"
    """The fine-tuning: saved with it, though it may be frozen (scales, starts)."""
    STEP = "step"
    """One forward pass: derived or drawn for it, never stored."""


class Group(enum.StrEnum):
    """Groups of the optimizer. Each has a learning rate of its own."""

    LORA_A = "lora_a"
    LORA_B = "lora_b"
    MAGNITUDE = "magnitude"
    WEIGHT = "weight"
    """Other matrices."""
    VECTOR = "vector"
    """Other vectors: biases, norms, IA3, VeRA."""
    PROMPT = "prompt"
    """Soft prompts and their encoders."""


class Place(enum.Enum):
    """Where a leaf lies."""

    MODULE = "module"
    """Beside a kernel, or as a parameter of the model."""
    ROOT = "root"
    """At the tree's root: all adapted layers share it. Its "in" and "out" are the largest of all
    layers."""
    DOOR = "door"
    """Where the model takes virtual tokens (`lorax_ft.soft_prompts`)."""


class LeafSchema(NamedTuple):
    """What a leaf is."""

    axes: tuple[Axis, ...]
    """Its axes in canonical order."""
    owner: Owner
    group: Group | None = None
    """Group of the optimizer where the leaf trains; None: it is always frozen."""
    place: Place = Place.MODULE
    """Where it lies."""
    indexes: KernelAxis | Literal["vocabulary"] | None = None
    """What it holds indices of, as int32; None: it holds numbers, as float32."""
    counts: OwnAxis | None = None
    """The axis of which it says how much each matrix uses, in whole numbers that are float32."""
    is_flag: bool = False
    """Whether it is 1, or 0 for matrices of a stack that are not adapted, as float32."""

    @property
    def dtype(self) -> str:
        """Of an adapter's leaf."""
        return "float32" if self.indexes is None else "int32"


BASE, ADAPTER, STEP = Owner.BASE, Owner.ADAPTER, Owner.STEP


def _prompt(*axes: Axis) -> LeafSchema:
    """A leaf of a soft prompt."""
    return LeafSchema(axes, ADAPTER, Group.PROMPT, place=Place.DOOR)


LEAVES: Mapping[str, LeafSchema] = {
    # The base: W and b. Anything else that a model has is `OTHER`.
    "kernel": LeafSchema(("stack", "in", "out"), BASE, Group.WEIGHT),
    "embedding": LeafSchema(("stack", "in", "out"), BASE, Group.WEIGHT),
    "bias": LeafSchema(("stack", "out"), BASE, Group.VECTOR),
    # A number that multiplies a layer's output, which transformers does not train either.
    "layer_scalar": LeafSchema(("stack", "out"), BASE),
    # LoRA: A, B and the scale s = alpha / r, or alpha / √r for rsLoRA.
    "lora_a": LeafSchema(("stack", "in", "rank"), ADAPTER, Group.LORA_A),
    "lora_b": LeafSchema(("stack", "rank", "out"), ADAPTER, Group.LORA_B),
    "lora_scale": LeafSchema(("stack",), ADAPTER),
    # Activated LoRA: the invocation, and 1 for the tokens of a batch from it on.
    "lora_invocation": LeafSchema(("token",), ADAPTER, place=Place.ROOT, indexes="vocabulary"),
    "lora_rows": LeafSchema(("stack", "batch", "token"), STEP),
    # A₀ and B₀ of an init that changes the base. `start_scale` is s where the base was kept as it
    # was, so that the forward subtracts s · x A₀ B₀.
    "lora_a0": LeafSchema(("stack", "in", "rank"), ADAPTER),
    "lora_b0": LeafSchema(("stack", "rank", "out"), ADAPTER),
    "start_scale": LeafSchema(("stack",), ADAPTER),
    # IA3: a vector l for the input or the output; `ia3_active` is 0 where a matrix has none.
    "ia3_in": LeafSchema(("stack", "in"), ADAPTER, Group.VECTOR),
    "ia3_out": LeafSchema(("stack", "out"), ADAPTER, Group.VECTOR),
    "ia3_active": LeafSchema(("stack",), ADAPTER, is_flag=True),
    # MiSS: D, and each matrix's own rank r, 0 where it is not adapted.
    "miss_block": LeafSchema(("stack", "rank", "out"), ADAPTER, Group.WEIGHT),
    "miss_rank": LeafSchema(("stack",), ADAPTER, counts="rank"),
    # VeRA: A and B of the whole model, and each layer's d and b.
    "vera_a": LeafSchema(("in", "rank"), ADAPTER, place=Place.ROOT),
    "vera_b": LeafSchema(("rank", "out"), ADAPTER, place=Place.ROOT),
    "vera_lambda_d": LeafSchema(("stack", "rank"), ADAPTER, Group.VECTOR),
    "vera_lambda_b": LeafSchema(("stack", "out"), ADAPTER, Group.VECTOR),
    "vera_active": LeafSchema(("stack",), ADAPTER, is_flag=True),
    # LoHa: two products A B, and s.
    "loha_a1": LeafSchema(("stack", "in", "rank"), ADAPTER, Group.WEIGHT),
    "loha_b1": LeafSchema(("stack", "rank", "out"), ADAPTER, Group.WEIGHT),
    "loha_a2": LeafSchema(("stack", "in", "rank"), ADAPTER, Group.WEIGHT),
    "loha_b2": LeafSchema(("stack", "rank", "out"), ADAPTER, Group.WEIGHT),
    "loha_scale": LeafSchema(("stack",), ADAPTER),
    # LoKr: K₁, K₂ whole or as A B, and s.
    "lokr_left": LeafSchema(("stack", "left_in", "left_out"), ADAPTER, Group.WEIGHT),
    "lokr_right": LeafSchema(("stack", "right_in", "right_out"), ADAPTER, Group.WEIGHT),
    "lokr_right_a": LeafSchema(("stack", "right_in", "rank"), ADAPTER, Group.WEIGHT),
    "lokr_right_b": LeafSchema(("stack", "rank", "right_out"), ADAPTER, Group.WEIGHT),
    "lokr_scale": LeafSchema(("stack",), ADAPTER),
    # SHiRA: the elements of a sparse matrix, their places, and r, 0 where a matrix is not adapted.
    "shira_value": LeafSchema(("stack", "entry"), ADAPTER, Group.WEIGHT),
    "shira_row": LeafSchema(("stack", "entry"), ADAPTER, indexes="in"),
    "shira_column": LeafSchema(("stack", "entry"), ADAPTER, indexes="out"),
    "shira_rank": LeafSchema(("stack",), ADAPTER, counts="entry"),
    # HiRA: A and B of a product that multiplies W elementwise.
    "hira_a": LeafSchema(("stack", "in", "rank"), ADAPTER, Group.WEIGHT),
    "hira_b": LeafSchema(("stack", "rank", "out"), ADAPTER, Group.WEIGHT),
    "hira_active": LeafSchema(("stack",), ADAPTER, is_flag=True),
    # OFT: the elements above the diagonal of the skew-symmetric matrices.
    "oft_pairs": LeafSchema(("stack", "block", "pair"), ADAPTER, Group.WEIGHT),
    "oft_active": LeafSchema(("stack",), ADAPTER, is_flag=True),
    # Bottleneck adapters: A of the layer's output or of its input, B, and their biases.
    "bottleneck_a_output": LeafSchema(("stack", "out", "rank"), ADAPTER, Group.WEIGHT),
    "bottleneck_a_input": LeafSchema(("stack", "in", "rank"), ADAPTER, Group.WEIGHT),
    "bottleneck_b": LeafSchema(("stack", "rank", "out"), ADAPTER, Group.WEIGHT),
    "bottleneck_bias_a": LeafSchema(("stack", "rank"), ADAPTER, Group.VECTOR),
    "bottleneck_bias_b": LeafSchema(("stack", "out"), ADAPTER, Group.VECTOR),
    "bottleneck_active": LeafSchema(("stack",), ADAPTER, is_flag=True),
    # Trainable tokens: their ids, and their rows of an embedding or columns of a head.
    "token_rows": LeafSchema(("stack", "token", "out"), ADAPTER, Group.WEIGHT),
    "token_columns": LeafSchema(("stack", "in", "token"), ADAPTER, Group.WEIGHT),
    "token_ids": LeafSchema(("stack", "token"), ADAPTER, indexes="vocabulary"),
    "token_active": LeafSchema(("stack",), ADAPTER, is_flag=True),
    # DoRA: m, and n = ‖W + s A B‖ of the current step.
    "magnitude": LeafSchema(("stack", "out"), ADAPTER, Group.MAGNITUDE),
    "norm": LeafSchema(("stack", "out"), STEP),
    # Soft prompts: what virtual tokens have in the place of an embedding, or of keys and values.
    "prompt_embedding": _prompt("virtual", "width"),
    "prefix_key": _prompt("stack", "virtual", "head", "channel"),
    "prefix_value": _prompt("stack", "virtual", "head", "channel"),
    # The encoder of a soft prompt, an MLP or an LSTM: its input, its layers, and its output's.
    "encoder_input": _prompt("virtual", "width"),
    "encoder_kernel_0": _prompt("width", "hidden"),
    "encoder_bias_0": _prompt("hidden"),
    "encoder_kernel_1": _prompt("hidden", "hidden"),
    "encoder_bias_1": _prompt("hidden"),
    "lstm_input_0": _prompt("direction", "width", "gates"),
    "lstm_hidden_0": _prompt("direction", "hidden", "gates"),
    "lstm_bias_0": _prompt("direction", "gates"),
    "lstm_input_1": _prompt("direction", "hidden", "gates"),
    "lstm_hidden_1": _prompt("direction", "hidden", "gates"),
    "lstm_bias_1": _prompt("direction", "gates"),
    "encoder_to_prompt": _prompt("hidden", "width"),
    "encoder_prompt_bias": _prompt("width"),
    "encoder_to_prefix": _prompt("hidden", "layer", "key_or_value", "head", "channel"),
    "encoder_prefix_bias": _prompt("layer", "key_or_value", "head", "channel"),
    # Dropout on the adapter branch's input, in a training step.
    "dropout_key": LeafSchema(("stack",), STEP),
    "dropout_rate": LeafSchema(("stack",), STEP),
}

OTHER = LeafSchema((), BASE, Group.VECTOR)
"""A leaf of the base that has no row, such as the scale of a norm."""


Factor = Literal["lora_a", "lora_b"]
"""The factors that `adapter.freeze` may freeze."""

AdapterMethod = Literal[
    "lora",
    "ia3",
    "miss",
    "vera",
    "loha",
    "lokr",
    "shira",
    "hira",
    "oft",
    "bottleneck",
]

METHODS: Mapping[str, tuple[str, ...]] = {
    "lora": (
        *("rank", "rank_pattern", "alpha", "alpha_pattern", "scaling", "init", "dora", "dropout"),
        *("freeze", "invocation"),
    ),
    "ia3": ("feedforward",),
    "miss": ("rank", "dropout"),
    "vera": ("rank", "dropout", "vera_d_initial"),
    "loha": ("rank", "rank_pattern", "alpha", "alpha_pattern", "scaling", "dropout"),
    "lokr": (
        *("rank", "rank_pattern", "alpha", "alpha_pattern", "scaling", "dropout"),
        "lokr_factor",
    ),
    "shira": ("rank", "dropout"),
    "hira": ("rank", "rank_pattern", "dropout"),
    "oft": ("oft_block_size",),
    "bottleneck": ("rank", "rank_pattern", "dropout", "bottleneck_input"),
}
"""The options of AdapterConfig that a method uses. Others may not be set."""


class InitSchema(NamedTuple):
    """How an initialization of A and B works, and what it needs."""

    function: str
    """Its function in `lorax_ft.lowrank.inits`, as "module:name"."""
    changes_base: bool = False
    """Whether s A₀ B₀ is subtracted from the base, so that the adapted model starts unchanged."""
    reads_base: bool = False
    """Whether it computes the factors from W without changing the base."""
    adapts_embeddings: bool = False
    """Whether it also starts embeddings, which else start with A = 0 and a random B."""
    frozen: Factor | None = None
    """The factor that `adapter.freeze` must name, since the method is defined so."""
    statistic: Literal["covariance", "moment", "gradient"] | None = None
    """What is measured on data first: Σ (x − x̄)ᵀ(x − x̄) / N or Σ xᵀx / N of inputs, or ∂L/∂W."""
    options: tuple[str, ...] = ()
    """Fields of AdapterConfig that this init uses and others may not set."""
    choose_ranks: str | None = None
    """A function that gives the plans new ranks by what the inits of all modules `explained`."""
    fits_quantized: bool = False
    """Whether it can fit A and B to what quantizing the base loses (`quant.rounds`)."""
    any_rank: bool = False
    """Whether a rank may be above the smaller side of a matrix, as in PEFT: a model may have small
    projections beside large ones."""
    on_host: bool = False
    """Whether it computes on the host, outside jit, unless `svd_iterations` is set."""


InitName = Literal[
    "kaiming",
    "gaussian",
    "orthogonal",
    "pissa",
    "milora",
    "mica",
    "olora",
    "loftq",
    "eva",
    "corda",
    "lora_ga",
    "lora_one",
]

INITS: Mapping[str, InitSchema] = {
    "kaiming": InitSchema("random:kaiming", any_rank=True),
    "gaussian": InitSchema("random:gaussian", any_rank=True),
    "orthogonal": InitSchema("orthogonal:orthogonal"),
    "pissa": InitSchema(
        "pissa:pissa",
        changes_base=True,
        options=("svd_iterations", "keep_base"),
        fits_quantized=True,
        on_host=True,
    ),
    "milora": InitSchema("milora:milora", changes_base=True, options=("keep_base",), on_host=True),
    "mica": InitSchema(
        "mica:mica",
        reads_base=True,
        adapts_embeddings=True,
        frozen="lora_b",
        on_host=True,
    ),
    "olora": InitSchema("olora:olora", changes_base=True, options=("keep_base",)),
    "loftq": InitSchema(
        "loftq:loftq",
        changes_base=True,
        options=("svd_iterations", "keep_base"),
        fits_quantized=True,
        on_host=True,
    ),
    "eva": InitSchema(
        "eva:eva",
        choose_ranks="eva:redistribute",
        statistic="covariance",
        options=("calibration_batches", "eva_rho", "svd_iterations"),
        on_host=True,
    ),
    "corda": InitSchema(
        "corda:corda",
        changes_base=True,
        statistic="moment",
        options=("calibration_batches", "corda_mode", "svd_iterations", "keep_base"),
        on_host=True,
    ),
    "lora_ga": InitSchema(
        "lora_ga:lora_ga",
        changes_base=True,
        statistic="gradient",
        options=("calibration_batches", "lora_ga_gamma", "svd_iterations", "keep_base"),
        on_host=True,
    ),
    "lora_one": InitSchema(
        "lora_one:lora_one",
        statistic="gradient",
        options=("calibration_batches", "lora_one_gamma", "svd_iterations"),
        on_host=True,
    ),
}


def leaf_schema(name: str) -> LeafSchema:
    """The row of the leaf called `name`."""
    return LEAVES.get(name, OTHER)


def leaf_name(path: str) -> str:
    """The last part of a slash path.

    >>> leaf_name("layers/mlp/up_proj/kernel")
    'kernel'
    """
    return path.rpartition("/")[2]


def is_base(path: str) -> bool:
    """Whether the leaf at a slash path belongs to the base model."""
    return leaf_schema(leaf_name(path)).owner is Owner.BASE


def is_adapter(path: str) -> bool:
    """Whether the leaf at a slash path belongs to the fine-tuning and is saved with it."""
    return leaf_schema(leaf_name(path)).owner is Owner.ADAPTER


def is_soft_prompt(path: str) -> bool:
    """Whether the leaf at a slash path belongs to a soft prompt."""
    return leaf_schema(leaf_name(path)).place is Place.DOOR


def init_schema(name: str) -> InitSchema:
    """The row of an init.

    Raises:
      ValueError: there is no init of that name.
    """
    if name not in INITS:
        near = difflib.get_close_matches(name, INITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no init {name!r}; known: {', '.join(INITS)}{hint}")
    return INITS[name]
