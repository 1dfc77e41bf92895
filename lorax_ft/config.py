"""The configuration of a run: frozen dataclasses that validate their values. Imports no JAX.

A config file is a Python file that defines `get_config() -> Config`. It is loaded by
`scripts/train.py --config FILE`, which accepts overrides such as `--adapter.rank 32`. The docstring
under each field is its `--help` text; tyro keeps its line breaks, so they stand between clauses.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lorax_ft.checks import (
    check,
    check_fraction,
    check_positive,
    check_types,
    compile_pattern,
    parse_pattern,
    parse_template_args,
)
from lorax_ft.schema import INITS, METHODS, AdapterMethod, Factor, InitName

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_MODEL = str(ASSETS / "tiny")
EMBEDDED_DATA = str(ASSETS / "questions")
# What rendering a conversation passes to its chat template.
_RENDERED = ("messages", "tools", "documents", "add_generation_prompt", "tokenize")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model to load, and how to run it."""

    path: str = EMBEDDED_MODEL
    """Base model to fine-tune: a Hugging Face folder, a .gguf file or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit, if model.path is a Hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of base weights and activations; adapters and optimizer state are always float32."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention implementation.
    auto: cuDNN on a GPU in bfloat16, blockwise causal attention on a CPU, XLA otherwise."""
    remat: Literal["none", "dots", "mlp", "full"] = "full"
    """Gradient checkpointing: what the backward pass recomputes.
    none: nothing; dots: all but matrix products; mlp: all but the MLP's wide activations;
    full: everything."""

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
class AdapterConfig:
    """Which modules get adapters, their rank, and how they are initialized."""

    method: AdapterMethod = "lora"
    """Adapter method.
    lora: A B is added, also with dora and all inits; ia3: a vector scales the output;
    miss: shards of the input share one matrix."""
    rank: int = 8
    """Rank r of the adapters."""
    alpha: float = 16.0
    """LoRA alpha: the numerator of the scale, see adapter.scaling."""
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    """Scale of A B: alpha / r (standard), or alpha / sqrt(r) (rank_stabilized, rsLoRA)."""
    init: InitName = "kaiming"
    """Initialization of A and B.
    kaiming, gaussian: random A and B = 0; orthogonal: random A and B with A B = 0;
    pissa, milora: the largest or smallest singular triples of the weight;
    olora: QR decomposition of the weight; loftq: SVD of the quantization error;
    eva, corda: from the layer's inputs on training data; lora_ga, lora_one: from its gradients.
    Embeddings always start with a random A and B = 0."""
    calibration_batches: int = 8
    """Training batches to measure for the data-driven inits (eva, corda, lora_ga, lora_one)."""
    eva_rho: float = 2.0
    """EVA: maximum rank after redistribution, relative to rank; 1 disables redistribution."""
    corda_mode: Literal["kpm", "ipm"] = "kpm"
    """CorDA mode.
    kpm (knowledge-preserved): adapt the directions that the calibration data uses least;
    ipm (instruction-previewed): adapt those that it uses most."""
    lora_ga_gamma: float = 16.0
    """LoRA-GA's gamma: A and B are the gradient's singular vectors times O^(1/4) / sqrt(gamma)."""
    lora_one_gamma: float = 128.0
    """LoRA-One's gamma: A B starts as a gradient descent step of spectral norm 1 / gamma."""
    svd_iterations: int | None = None
    """Power iterations of a randomized SVD, for inits that use an SVD; None: exact SVD."""
    dora: bool = False
    """DoRA: also train a magnitude for each output channel."""
    dropout: float = 0.0
    """Dropout rate on the input of the adapter branch, in training only."""
    keep_base: bool = False
    """Keep the base weights unchanged where the init, such as pissa, would modify them;
    the forward pass subtracts the initial A B instead."""
    feedforward: tuple[str, ...] = ()
    """IA3: targets whose input is scaled, and not their output (PEFT: feedforward_modules)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: names, suffixes, regular expressions, or all-linear
    (every layer except embeddings, routers and the language model head)."""
    exclude: tuple[str, ...] = ()
    """Modules to exclude from adapter.targets, in the same syntax."""
    layers: tuple[int, ...] = ()
    """Indices of the layers to adapt (PEFT: layers_to_transform); empty adapts all."""
    rank_pattern: tuple[str, ...] = ()
    """Ranks of single modules, each as "pattern=rank"; the first match wins."""
    alpha_pattern: tuple[str, ...] = ()
    """Alphas of single modules, each as "pattern=alpha"; the first match wins."""
    continue_from: str | None = None
    """PEFT adapter folder to continue training from.
    Its rank, alpha, targets and use of DoRA replace the options given here."""
    train_whole: tuple[str, ...] = ()
    """Modules whose own weights are trained (PEFT: modules_to_save); "all": full fine-tuning.
    Same syntax as adapter.targets."""
    freeze: tuple[Factor, ...] = ()
    """Adapter factors to freeze at their initial values; freezing lora_a is LoRA-FA."""
    start_from: str | None = dataclasses.field(default=None, metadata={"deprecated": True})
    """Deprecated: use continue_from."""

    def __post_init__(self) -> None:
        check_types(self)
        self._rename_start_from()
        check_positive(
            self, "rank", "alpha", "calibration_batches", "lora_ga_gamma", "lora_one_gamma"
        )
        check(
            1 <= self.eva_rho < 1000,
            f"adapter.eva_rho is {self.eva_rho}; it must be at least 1 and below 1000",
        )
        check(
            0 <= self.dropout < 1,
            f"adapter.dropout is {self.dropout}; it must be at least 0 and below 1",
        )
        for index in self.layers:
            check(index >= 0, f"adapter.layers is {self.layers}; indices start at 0")
        self._check_svd()
        self._check_options()
        self._check_ranks()
        self._check_trained_modules()

    def _rename_start_from(self) -> None:
        """Move the value of the deprecated `start_from` to `continue_from`."""
        old, new = self.start_from, self.continue_from
        if old is None:
            return
        check(
            new is None or new == old,
            f"adapter.start_from is {old} and adapter.continue_from is {new}; "
            "give adapter.continue_from only",
        )
        # Level 4 is the caller of AdapterConfig(); below it are __init__ and __post_init__.
        warnings.warn(
            "adapter.start_from is deprecated; use adapter.continue_from",
            DeprecationWarning,
            stacklevel=4,
        )
        # `object.__setattr__`, because the dataclass is frozen.
        object.__setattr__(self, "continue_from", old)
        # Copies made by dataclasses.replace() would warn again, or find two different values.
        object.__setattr__(self, "start_from", None)

    def _check_svd(self) -> None:
        if self.svd_iterations is None:
            return
        check(
            self.svd_iterations >= 0,
            f"adapter.svd_iterations is {self.svd_iterations}; it must be 0 or more, "
            "or None for the exact SVD",
        )
        # Power iterations converge to the largest singular values, so there is no randomized
        # version of the inits that use the smallest ones.
        uses_smallest = self.init == "milora" or (self.init == "corda" and self.corda_mode == "kpm")
        check(
            not uses_smallest,
            f"adapter.svd_iterations is {self.svd_iterations}, but a randomized SVD finds the "
            f"largest singular triples, and adapter.init {self.init} uses the smallest; "
            "remove adapter.svd_iterations",
        )

    def _check_options(self) -> None:
        """Raise if an option was changed that the method or the init would silently ignore."""
        used_by_init = {name: row.options for name, row in INITS.items()}
        self._check_used("method", self.method, METHODS)
        self._check_used("init", self.init, used_by_init)

    def _check_used(self, choice: str, chosen: str, used_by: Mapping[str, tuple[str, ...]]) -> None:
        """Raise if an option that some choices use was changed, and the chosen one ignores it."""
        optional = {option: None for options in used_by.values() for option in options}
        for field in optional:
            value = getattr(self, field)
            unchanged = value == getattr(type(self), field)
            users = [name for name, options in used_by.items() if field in options]
            check(
                unchanged or chosen in users,
                f"adapter.{field} is {value}, but adapter.{choice} {chosen} does not use it; "
                f"it applies to {', '.join(users)}",
            )

    def _check_ranks(self) -> None:
        for entry in self.rank_pattern:
            parse_pattern(entry, "rank_pattern", int)
        for entry in self.alpha_pattern:
            parse_pattern(entry, "alpha_pattern", float)
        if self.init != "orthogonal":
            return
        # The orthogonal init builds A from one half of an orthogonal basis and B from the other.
        ranks = [value for _, value in self.patterns("rank_pattern")]
        for rank in (self.rank, *ranks):
            check(
                rank % 2 == 0,
                f"adapter.init orthogonal splits the rank in two halves, and the rank is {rank:g}; "
                "give an even rank",
            )

    def _check_trained_modules(self) -> None:
        for pattern in (*self.targets, *self.exclude, *self.feedforward, *self.train_whole):
            compile_pattern(pattern, "adapter.targets, exclude or train_whole")
        check(
            bool(self.targets or self.train_whole),
            "adapter.targets and adapter.train_whole are both empty, so nothing would train; "
            "give one of them",
        )
        # With both factors frozen, only DoRA magnitudes and fully trained modules are left.
        freezes_both = len(set(self.freeze)) == 2
        check(
            not freezes_both or self.dora or bool(self.train_whole),
            f"adapter.freeze is {self.freeze}: nothing would train; freeze only one factor",
        )

    def patterns(
        self, field: Literal["rank_pattern", "alpha_pattern"]
    ) -> tuple[tuple[str, float], ...]:
        """The (pattern, value) pairs of `rank_pattern` or `alpha_pattern`."""
        return tuple(parse_pattern(entry, field, float) for entry in getattr(self, field))

    def module_patterns(self) -> dict[str, tuple[str, ...]]:
        """The options whose patterns must each match a module of the model."""
        return {"targets": self.targets, "exclude": self.exclude}

    def patterns_within_targets(self) -> dict[str, tuple[str, ...]]:
        """The options whose patterns must each match one of the adapted modules."""
        return {"feedforward": self.feedforward}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation data, and how they become token rows."""

    train: tuple[str, ...] = (EMBEDDED_DATA,)
    """Training data: files (.jsonl, .json, .csv, .parquet; also .gz, .zst), patterns ("d/*.jsonl"),
    a folder with a file per split or saved by datasets.save_to_disk, or a Hub id ("owner/name" or
    "owner/name:subset"). Several are mixed; "PATH=2" takes the rows of PATH twice in an epoch,
    "PATH=0.5" half of them."""
    validation: tuple[str, ...] = ()
    """Validation data: files, a folder or a Hub id.
    "name=path" makes sets with losses of their own, such as easy=a.jsonl hard=b.jsonl;
    the first one picks the best checkpoint, and its questions are answered.
    If empty: data.validation_split of the training folder if it exists,
    else held-out training rows."""
    split: str = "train"
    """Split to read if data.train is a folder or Hub id."""
    revision: str | None = None
    """Branch, tag or commit, if data.train or data.validation is a Hub id."""
    validation_split: str = "test"
    """Split to read if the validation data is a folder or Hub id."""
    validation_rows: int = 200
    """Training rows to hold out if there is no validation data, at most a tenth; 0: none."""
    limit: int | None = None
    """Maximum number of training rows to read; None reads all."""
    shape: Literal[
        "auto", "messages", "alpaca", "sharegpt", "question_answer", "prompt_completion", "text"
    ] = "auto"
    """Format of a row; auto detects it from the fields of the first row of each source.
    prompt_completion and text are trained without a chat template, unless prompt and completion
    are messages."""
    fields: tuple[str, ...] = ()
    """Field names in the data, each as "expected=actual", such as "question=prompt"."""
    system: str | None = None
    """System message for conversations that have none."""
    tools: str | None = None
    """JSON file of tools, a list of function schemas, for conversations that have none."""
    template_args: tuple[str, ...] = ()
    """Variables of the chat template, each as "name=value", such as "enable_thinking=false"."""
    max_length: int | Literal["auto"] = 256
    """Tokens per row; longer samples are truncated.
    auto: as long as the longest sample, rounded up, and at most the model's positions."""
    pack: bool = False
    """Pack several samples into each row; samples do not attend to one another.
    Plain texts without a prompt then fill rows to the end, and go on in the next one."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that contribute to the loss: the assistant's turns (assistant), only the last of
    them (last), or all. Turns with "train": false or "weight": 0 never contribute."""
    reasoning_loss: Literal["data", "all", "none"] = "data"
    """Reasoning that contributes to the loss.
    data: what the data has; all: also an empty thought that the chat template writes, such as
    Qwen3's; none: no reasoning."""
    append_end: bool = False
    """Append the end-of-sequence token where the chat template ends a conversation without one."""

    def __post_init__(self) -> None:
        check_types(self)
        check(bool(self.train), "data.train is empty; give a file or a hub id")
        check(
            self.max_length == "auto" or self.max_length >= 8,
            f"data.max_length is {self.max_length}; it must be at least 8 tokens, or auto",
        )
        check(
            self.validation_rows >= 0,
            f"data.validation_rows is {self.validation_rows}; it must be 0 or more",
        )
        check(
            self.limit is None or self.limit > 0, f"data.limit is {self.limit}; it must be above 0"
        )
        for entry in self.fields:
            check(
                re.fullmatch(r"\w+=.+", entry) is not None,
                f'data.fields: {entry!r} is not of the form "expected=actual"',
            )
        for name in self.parsed_template_args():
            check(
                name not in _RENDERED,
                f"data.template_args: {name} is not a variable to set: it comes from the data",
            )

    def parsed_template_args(self) -> dict[str, Any]:
        """The variables of the chat template, by name."""
        return parse_template_args(self.template_args, "data.template_args")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rates and their schedule."""

    # Elementwise optimizers only: scanned layers share one leaf, and norms over a whole leaf (LAMB,
    # Adafactor) would mix them.
    optimizer: Literal["adamw", "adam", "nadamw", "lion", "sgd"] = "adamw"
    """Optimizer, from optax."""
    learning_rate: float = 2e-4
    """Peak learning rate; the two ratios below scale it for B and for DoRA's magnitudes."""
    lora_plus_ratio: float = 1.0
    """LoRA+: ratio of B's learning rate to A's; the paper recommends 16."""
    magnitude_ratio: float = 1.0
    """Ratio of the learning rate of DoRA's magnitudes to A's."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate schedule after warmup.
    wsd (warmup-stable-decay): constant, with a linear decay over the last fifth."""
    warmup_fraction: float = 0.03
    """Fraction of all steps used for linear warmup."""
    final_fraction: float = 0.0
    """Final learning rate as a fraction of the peak, for schedules that decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay; not applied to DoRA magnitudes, biases and norms."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.999
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon, added to the denominator."""
    clip_norm: float = 1.0
    """Maximum global norm of the gradient; 0 disables clipping."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "learning_rate", "lora_plus_ratio", "magnitude_ratio")
        check_fraction(self, "warmup_fraction", "final_fraction")
        for field in ("b1", "b2"):
            value = getattr(self, field)
            check(0 <= value < 1, f"optim.{field} is {value}; it must be at least 0 and below 1")
        for field in ("weight_decay", "eps", "clip_norm"):
            value = getattr(self, field)
            check(
                math.isfinite(value) and value >= 0,
                f"optim.{field} is {value}; it must be 0 or more and finite",
            )
        check(
            not self.weight_decay or self.optimizer != "adam",
            f"optim.weight_decay is {self.weight_decay}, but adam has no weight decay; use adamw",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run, its batches, logs and checkpoints."""

    output: str = "out/run"
    """Output folder for the adapter, the log, the loss plot and the checkpoints; may be gs://."""
    overwrite: bool = False
    """Delete the previous run in the output folder once the new run starts; keep other files."""
    resume: bool = False
    """Resume from the latest checkpoint in the output folder."""
    steps: int | None = None
    """Number of optimizer steps; None computes it from train.epochs."""
    epochs: float | None = None
    """Passes over the training rows; None: one. train.steps wins if both are given."""
    max_minutes: float | None = None
    """End the training after so many minutes, with the evaluation and the adapter of a full run.
    train.resume with more minutes continues it; the schedule stays that of all steps."""
    batch_size: int = 16
    """Global batch size: rows per optimizer step, over all devices."""
    microbatches: int = 1
    """Gradient accumulation: microbatches per optimizer step, to save memory.
    The result is the same, except for the random draws of dropout and NEFTune."""
    neftune_alpha: float = 0.0
    """NEFTune: scale of the uniform noise on the embeddings; the paper uses 5 to 15; 0: off."""
    seed: int = 0
    """Random seed for adapter initialization, row order, dropout and NEFTune noise."""
    log_every: int = 1
    """Log every N steps."""
    eval_every: int | Literal["epoch"] = 0
    """Evaluate every N steps, or at the end of each epoch;
    0 evaluates only at the start and the end."""
    load_best: bool = False
    """Save the adapter of the step with the lowest validation loss, not of the last step.
    The last step stays in its checkpoint. Needs train.eval_every."""
    patience: int = 0
    """Early stopping: end after N evaluations in a row without a new lowest loss; 0: never.
    Needs train.eval_every."""
    save_every: int | Literal["epoch"] = 0
    """Save a checkpoint every N steps, or at the end of each epoch;
    0 saves only at the end or on Ctrl-C."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep; train.load_best keeps the best one too."""
    profile: int = 0
    """Record N steps, after the first two, with jax.profiler; 0: none.
    XProf, TensorBoard and Perfetto show the trace, which lies in the folder profile of the output.
    """
    push_to_hub: str | None = None
    """Hub repository, as owner/name, to upload the adapter to at the end; a new one is private.
    Needs a token: run hf auth login, or set HF_TOKEN."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Trackers to log to; none without a value. wandb needs pip install "lorax_ft[wandb]"."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "batch_size", "microbatches", "log_every", "keep_checkpoints")
        for field in ("epochs", "max_minutes"):
            if getattr(self, field) is not None:
                check_positive(self, field)
        check(
            self.steps is None or 0 < self.steps < 2**31,
            f"train.steps is {self.steps}; it must be above 0 and below 2^31",
        )
        check(
            0 <= self.seed < 2**32,
            f"train.seed is {self.seed}; it must be 0 or more and below 2^32",
        )
        check(
            self.batch_size % self.microbatches == 0,
            f"train.batch_size {self.batch_size} does not divide into "
            f"train.microbatches {self.microbatches}",
        )
        for field in ("neftune_alpha", "eval_every", "save_every", "patience", "profile"):
            value = getattr(self, field)
            check(value == "epoch" or value >= 0, f"train.{field} is {value}; it must be 0 or more")
        for field in ("load_best", "patience"):
            check(
                not getattr(self, field) or self.eval_every != 0,
                f"train.{field} compares evaluations, but train.eval_every is 0; "
                "give train.eval_every N, or epoch",
            )
        check(
            self.push_to_hub is None
            or re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+", self.push_to_hub) is not None,
            f"train.push_to_hub is {self.push_to_hub}; it must be owner/name",
        )
        check(
            not self.output.startswith("hf://"),
            f"train.output {self.output}: a run writes to a folder, local or on gs://; "
            f"use train.push_to_hub {self.output.removeprefix('hf://')} to upload its adapter",
        )
        check(
            not (self.resume and self.overwrite),
            "train.resume and train.overwrite are mutually exclusive; give one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure on the validation rows, and what to print."""

    rows: int = 64
    """Validation rows to compute the loss on at each evaluation; 0 uses all."""
    exact_match_rows: int = 100
    """Validation questions to answer before and after training, for exact match; 0: none."""
    answer_pattern: str | None = None
    r"""Regular expression whose first group is the part of an answer to compare,
    such as "#### (-?[\d,.]+)"; None compares whole answers."""
    samples: int = 3
    """Number of sample answers to print from before and after training."""
    max_new_tokens: int = 64
    """Maximum length of a generated answer, in tokens."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "max_new_tokens")
        for field in ("rows", "exact_match_rows", "samples"):
            check(
                getattr(self, field) >= 0,
                f"eval.{field} is {getattr(self, field)}; it must be 0 or more",
            )
        if self.answer_pattern is not None:
            compiled = compile_pattern(self.answer_pattern, "eval.answer_pattern")
            check(
                compiled.groups >= 1,
                f"eval.answer_pattern {self.answer_pattern!r} has no group for the answer; "
                "put the answer in parentheses",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Shape of the device mesh: the number of devices along each axis."""

    data: int = -1
    """Data parallelism: number of replicas of the weights; -1 uses all remaining devices."""
    fsdp: int = 1
    """FSDP: number of devices that shard both the rows of a batch and the weights."""
    tensor: int = 1
    """Tensor parallelism: number of devices that shard each matrix."""

    def __post_init__(self) -> None:
        check_types(self)
        check(
            self.data == -1 or self.data > 0, f"mesh.data is {self.data}; it must be above 0, or -1"
        )
        check_positive(self, "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The complete configuration of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_types(self)
        self._check_push()
        quant, adapter = self.quant, self.adapter
        if quant.rounds == 1 or adapter.continue_from is not None:
            return
        # Each round quantizes what A B does not explain; keep_base forbids that change of the base.
        alternates = (
            INITS[adapter.init].fits_quantized and quant.format != "none" and not adapter.keep_base
        )
        check(
            alternates,
            f"quant.rounds is {quant.rounds}, which has no effect here; "
            "set quant.format nf4 and adapter.init pissa or loftq, without adapter.keep_base",
        )

    def _check_push(self) -> None:
        adapter = self.adapter
        keeps_base = adapter.continue_from is not None or adapter.keep_base
        changes_base = INITS[adapter.init].changes_base and not keeps_base
        check(
            self.train.push_to_hub is None or not changes_base or self.quant.format == "none",
            f"train.push_to_hub: adapter.init {adapter.init} changes the quantized base, which is "
            "not uploaded, so nobody could use the adapter; use another adapter.init, or upload "
            "the merged model with scripts/merge.py --output hf://owner/name",
        )

    def to_json(self) -> str:
        """The config as JSON, with the value of every field."""
        sections = dataclasses.asdict(self)
        del sections["adapter"]["start_from"]  # deprecated; its value is in continue_from
        return json.dumps(sections, indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """The config that `to_json` wrote.

        Raises:
          ValueError: a section or a field is unknown, or a value is invalid.
        """
        section_types: dict[str, Any] = {}
        for field in dataclasses.fields(Config):
            section_types[field.name] = field.default_factory
        sections: dict[str, Any] = {}
        for name, values in json.loads(text).items():
            check(
                name in section_types,
                f"unknown section {name!r} of the config; known: {', '.join(section_types)}",
            )
            for key, value in values.items():
                if isinstance(value, list):  # JSON has no tuples
                    values[key] = tuple(value)
            try:
                sections[name] = section_types[name](**values)
            except TypeError as error:  # an unknown field
                raise ValueError(f"section {name!r} of the config: {error}") from error
        return Config(**sections)


def load_config(path: str | Path) -> Config:
    """The config that `get_config()` of a Python file returns.

    Raises:
      ValueError: the file is missing, raises an exception, or does not return a `Config`.
    """
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.py"))
        message = f"there is no config file {path}"
        if siblings:
            message += f"; files in {path.parent}: {', '.join(siblings)}"
        raise ValueError(message)
    # importlib returns no loader for other suffixes.
    check(path.suffix == ".py", f"{path} is not a .py file with get_config()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    # The file is user code: it may raise anything.
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    check(
        isinstance(config, Config),
        f"{path}: get_config() returned {type(config).__name__}, not a Config",
    )
    return config
