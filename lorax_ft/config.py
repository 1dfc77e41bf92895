"""What a run is: frozen dataclasses, checked when they are built. Imports no JAX.

A config file is a Python file with `get_config() -> Config`; `scripts/train.py --config FILE` loads
it and takes overrides such as `--adapter.rank 32`. The sentence under each field is its `--help`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

from lorax_ft.checks import check, pattern_value, positive, regex, typed, within

FROM_DATA = ("eva", "corda", "lora_ga", "lora_one")
USED_BY = {
    "calibration_batches": FROM_DATA,
    "eva_rho": ("eva",),
    "corda_mode": ("corda",),
    "lora_ga_gamma": ("lora_ga",),
    "lora_one_gamma": ("lora_one",),
    "svd_iterations": ("pissa", "loftq", *FROM_DATA),
    "keep_base": ("pissa", "milora", "olora", "loftq", "corda", "lora_ga"),
}
"""Options of adapters that some inits alone heed."""

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_MODEL = str(ASSETS / "tiny")
EMBEDDED_DATA = str(ASSETS / "questions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, and how it is computed."""

    path: str = EMBEDDED_MODEL
    """Hugging Face folder, .gguf file or hub id of the checkpoint to fine-tune."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base weights and of the activations; adapters and their moments are float32 always."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention kernel; auto takes cuDNN on a GPU in bfloat16, causal blocks on a CPU, and XLA elsewhere."""
    remat: Literal["none", "dots", "mlp", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matrix products, all but the MLP's wide ones, or all."""

    def __post_init__(self) -> None:
        typed(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """In how many bits the frozen base is kept: QLoRA and its kin."""

    format: Literal["none", "nf4", "int8"] = "none"
    """Type of the kernels of linear layers: as the model has them, 4 bits in blocks of 64, or 8 bits."""
    double: bool = True
    """Quantize NF4's absmax values too: 4.13 bits a parameter in place of 4.5."""
    rounds: int = 1
    """Rounds of decomposition and quantizing of the starts that fit themselves to a quantized base (pissa, loftq)."""

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "rounds")
        check(self.rounds <= 100, f"quant.rounds is {self.rounds}; it must be at most 100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules get low-rank leaves, of which rank, and how they start."""

    rank: int = 8
    """Rank r of the adapters."""
    alpha: float = 16.0
    """Numerator of the scale: alpha / r, or alpha / sqrt(r) if rank-stabilized."""
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    """alpha / r (LoRA) or alpha / sqrt(r) (rsLoRA)."""
    init: Literal[
        "kaiming",
        "gaussian",
        "orthogonal",
        "pissa",
        "milora",
        "olora",
        "loftq",
        "eva",
        "corda",
        "lora_ga",
        "lora_one",
    ] = "kaiming"
    """How A and B start: random A with B = 0 (kaiming, gaussian), both random with A B = 0 (orthogonal), top singular
    triples (pissa) or the last ones (milora), by QR (olora), from what quantizing the base loses (loftq), or from data:
    the layers' inputs (eva, corda), or their gradients (lora_ga, lora_one). Embeddings start at random always."""
    calibration_batches: int = 8
    """Training batches, from the first on, that inits from data are measured on."""
    eva_rho: float = 2.0
    """EVA: the largest rank that a matrix may get over its own, where ranks go to what explains most; 1 leaves them."""
    corda_mode: Literal["kpm", "ipm"] = "kpm"
    """CorDA: start from what the data's inputs need least, to keep it (kpm), or most, to learn it (ipm)."""
    lora_ga_gamma: float = 16.0
    """LoRA-GA: gamma; A and B start as O^(1/4) / sqrt(gamma) times singular vectors of the gradient."""
    lora_one_gamma: float = 128.0
    """LoRA-One: gamma; A B starts as a step of spectral norm 1 / gamma down the gradient."""
    svd_iterations: int | None = None
    """Power iterations of a randomized SVD, for inits by SVD; None computes the exact one."""
    dora: bool = False
    """Train a magnitude for each output channel beside the direction (DoRA)."""
    dropout: float = 0.0
    """Dropout rate on the adapter branch's input, in training only."""
    keep_base: bool = False
    """Leave the base weights as they are where the init would change them; the forward subtracts the start."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: all-linear (all but embeddings, routers and a language model's head), names, suffixes, or
    regular expressions."""
    exclude: tuple[str, ...] = ()
    """Modules to leave alone, written as targets are."""
    layers: tuple[int, ...] = ()
    """Indices of the layers to adapt, and nothing outside them; none given means everything."""
    rank_pattern: tuple[str, ...] = ()
    """Ranks by module, each as "pattern=rank"; the first match wins."""
    alpha_pattern: tuple[str, ...] = ()
    """Alphas by module, each as "pattern=alpha"; the first match wins."""
    start_from: str | None = None
    """PEFT folder whose adapter trains on; it says rank, alpha, targets and DoRA, and what is given here of them is not
    used."""
    train_whole: tuple[str, ...] = ()
    """Modules whose own weights train in full, written as targets are; "all" is full fine-tuning."""
    freeze: tuple[Literal["lora_a", "lora_b"], ...] = ()
    """Factors that stay where they start, without gradient or moments: lora_a is LoRA-FA."""

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "rank", "alpha", "calibration_batches", "lora_ga_gamma", "lora_one_gamma")
        check(
            1 <= self.eva_rho < 1000,
            f"adapter.eva_rho is {self.eva_rho}; it must be at least 1 and below 1000",
        )
        check(
            0 <= self.dropout < 1,
            f"adapter.dropout is {self.dropout}; it must be at least 0 and below 1",
        )
        check(
            self.svd_iterations is None or self.svd_iterations >= 0,
            f"adapter.svd_iterations is {self.svd_iterations}; it must be 0 or more, or None for the exact SVD",
        )
        smallest = self.init == "milora" or (self.init == "corda" and self.corda_mode == "kpm")
        check(
            self.svd_iterations is None or not smallest,
            f"adapter.svd_iterations is {self.svd_iterations}; the randomized SVD finds the largest singular triples, "
            f"and adapter.init {self.init} starts from the smallest: leave it out",
        )
        for field, inits in USED_BY.items():
            value = getattr(self, field)
            check(
                value == getattr(type(self), field) or self.init in inits,
                f"adapter.{field} is {value}, but adapter.init {self.init} has no use for it; it is for "
                f"{', '.join(inits)}",
            )
        check(
            all(i >= 0 for i in self.layers), f"adapter.layers is {self.layers}; indices start at 0"
        )
        for field in ("rank_pattern", "alpha_pattern"):
            for entry in getattr(self, field):
                pattern_value(entry, field, int if field == "rank_pattern" else float)
        if self.init == "orthogonal":
            for rank in (self.rank, *(value for _, value in self.patterns("rank_pattern"))):
                check(
                    rank % 2 == 0,
                    f"adapter.init orthogonal halves the rank, which is {rank:g}; give an even one",
                )
        for pattern in (*self.targets, *self.exclude, *self.train_whole):
            regex(pattern, "adapter.targets, exclude or train_whole")
        check(
            bool(self.targets or self.train_whole),
            "adapter.targets and adapter.train_whole are empty: nothing would train",
        )
        check(
            len(set(self.freeze)) < 2 or self.dora or bool(self.train_whole),
            f"adapter.freeze is {self.freeze}: nothing would train; leave one of them out",
        )

    def patterns(
        self, field: Literal["rank_pattern", "alpha_pattern"]
    ) -> tuple[tuple[str, float], ...]:
        """The (pattern, value) pairs of `rank_pattern` or `alpha_pattern`."""
        return tuple(pattern_value(entry, field, float) for entry in getattr(self, field))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from, and in which form the model sees it."""

    train: tuple[str, ...] = (EMBEDDED_DATA,)
    """Training files (.jsonl, .json, .csv, .parquet), or a folder or hub id ("owner/name:subset") with splits."""
    validation: tuple[str, ...] = ()
    """Validation files, folder or hub id; none takes the training folder's other split, or holds out rows."""
    split: str = "train"
    """Split to read of a folder or hub id in data.train."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    validation_split: str = "test"
    """Split to read of a folder or hub id to validate on."""
    validation_rows: int = 200
    """Training rows to hold out, at most a tenth of them, where there is nothing else to validate on; 0 is none."""
    limit: int | None = None
    """Largest number of training rows to read; None reads all."""
    shape: Literal["auto", "messages", "alpaca", "sharegpt", "question_answer"] = "auto"
    """Shape of a row; auto looks at the first row's fields."""
    fields: tuple[str, ...] = ()
    """Renamed fields, each as "expected=actual", such as "question=prompt"."""
    system: str | None = None
    """System message put before each conversation that has none."""
    max_length: int = 256
    """Tokens in a row; longer samples are cut."""
    pack: bool = False
    """Put several samples in a row, none of which attends to another."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that count in the loss: those of the assistant's turns, or all."""

    def __post_init__(self) -> None:
        typed(self)
        check(bool(self.train), "data.train is empty; give a file or a hub id")
        check(
            self.max_length >= 8,
            f"data.max_length is {self.max_length}; it must be at least 8 tokens",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its rates and their schedule."""

    optimizer: Literal["adamw", "adam", "nadamw", "lion", "sgd"] = "adamw"
    """Optimizer, from optax; all work element by element, so that a stack of layers is no other than its layers."""
    learning_rate: float = 2e-4
    """Peak learning rate of A, of magnitudes and of whole modules."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of B over that of A; the paper's value is 16."""
    magnitude_ratio: float = 1.0
    """The learning rate of DoRA's magnitudes over that of A."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate falls after warm-up; wsd is warmup-stable-decay, which falls over the last fifth."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the rate rises, in equal steps, to its peak."""
    final_fraction: float = 0.0
    """The last rate over the peak rate, where the schedule falls."""
    weight_decay: float = 0.0
    """Decoupled weight decay of A, B and whole matrices; magnitudes, biases and norms are not decayed."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "learning_rate", "lora_plus_ratio", "magnitude_ratio")
        within(self, "warmup_fraction", "final_fraction")
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
            f"optim.weight_decay is {self.weight_decay}, and optim.optimizer adam has none; take adamw",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, in which batches, and what to write where."""

    output: str = "out/run"
    """Folder for the adapter, the log, the plot and the checkpoints."""
    overwrite: bool = False
    """Delete the run that the output folder holds, once the new one has begun; other files stay."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    steps: int | None = None
    """Optimizer steps; None counts them from epochs."""
    epochs: float = 1.0
    """Passes over the training rows, where steps is None."""
    batch_size: int = 16
    """Rows in an optimizer step, over all devices."""
    microbatches: int = 1
    """Parts that a batch is cut into, to save memory; the result is the same, but for what dropout and noise draw."""
    neftune_alpha: float = 0.0
    """NEFTune: strength of the uniform noise on the embeddings in training; the paper's values are 5 to 15."""
    seed: int = 0
    """Seed of the adapters, the order of rows, dropout and noise."""
    log_every: int = 1
    """Steps between two lines of the log."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates at the start and the end only."""
    save_every: int = 0
    """Steps between two checkpoints; 0 saves one at the end, or where the run is interrupted (Ctrl-C)."""
    keep_checkpoints: int = 2
    """Checkpoints to keep."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Trackers that receive the log as well; wandb is installed by an extra of its own."""

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "epochs", "batch_size", "microbatches", "log_every", "keep_checkpoints")
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
            f"train.batch_size {self.batch_size} does not divide into {self.microbatches} microbatches",
        )
        for field in ("neftune_alpha", "eval_every", "save_every"):
            check(
                getattr(self, field) >= 0,
                f"train.{field} is {getattr(self, field)}; it must be 0 or more",
            )
        check(
            not (self.resume and self.overwrite),
            "train.resume and train.overwrite exclude each other",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure and to show on the validation rows."""

    rows: int = 64
    """Validation rows whose loss is measured at each evaluation; 0 takes all."""
    exact_match_rows: int = 100
    """Validation questions answered before and after training, to count exact matches; 0 counts none."""
    answer_pattern: str | None = None
    r"""Regular expression whose first group is the answer to compare, such as "#### (-?[\d,.]+)"; None compares all."""
    samples: int = 3
    """Answers to show before and after training."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "max_new_tokens")
        for field in ("rows", "exact_match_rows", "samples"):
            check(
                getattr(self, field) >= 0,
                f"eval.{field} is {getattr(self, field)}; it must be 0 or more",
            )
        if self.answer_pattern is not None:
            compiled = regex(self.answer_pattern, "eval.answer_pattern")
            check(
                compiled.groups >= 1,
                f"eval.answer_pattern {self.answer_pattern!r} has no group to take the answer from",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices share the work."""

    data: int = -1
    """Devices along the data axis (whole copies of the weights); -1 takes all that are left."""
    fsdp: int = 1
    """Devices along the fsdp axis (rows are split, and so are the weights)."""
    tensor: int = 1
    """Devices along the tensor axis (each matrix is split)."""

    def __post_init__(self) -> None:
        typed(self)
        check(
            self.data == -1 or self.data > 0, f"mesh.data is {self.data}; it must be above 0, or -1"
        )
        positive(self, "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: which model, which adapters, which data, how long, and where the result goes."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        typed(self)
        q, a = self.quant, self.adapter
        fits = a.start_from is not None or (
            a.init in ("pissa", "loftq") and q.format != "none" and not a.keep_base
        )
        check(
            q.rounds == 1 or fits,
            f"quant.rounds is {q.rounds}, but nothing goes in rounds: set quant.format nf4 and adapter.init pissa or "
            "loftq, without adapter.keep_base",
        )

    def to_json(self) -> str:
        """The config as JSON, every field resolved."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """The config that `to_json` wrote.

        Raises:
          ValueError: a section or a field is unknown, or a value out of range.
        """
        sections: dict[str, Any] = {}
        known: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
        for name, values in json.loads(text).items():
            check(
                name in known, f"unknown section {name!r} of the config; known: {', '.join(known)}"
            )
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            try:
                sections[name] = known[name](**values)
            except TypeError as error:
                raise ValueError(f"section {name!r} of the config: {error}") from error
        return Config(**sections)


def load_config(path: str | Path) -> Config:
    """The config of a Python file with `get_config()`.

    Raises:
      ValueError: the file is missing, fails, or does not return a `Config`.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ValueError(
            f"no config file at {path}" + (f"; beside it: {', '.join(near)}" if near else "")
        )
    check(path.suffix == ".py", f"{path} is no .py file with get_config()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    check(
        isinstance(config, Config),
        f"{path}: get_config() returned {type(config).__name__}, not a Config",
    )
    return config
