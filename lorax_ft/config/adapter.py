"""The adapters: method, rank, scale, initialization, and the modules that get them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Literal

from lorax_ft.checks import check, check_positive, check_types, compile_pattern, parse_pattern
from lorax_ft.schema import INITS, METHODS, AdapterMethod, Factor, InitName


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules get adapters, their rank, and how they are initialized."""

    method: AdapterMethod = "lora"
    """Adapter method.
    lora: A B is added, also with dora and all inits; ia3: a vector scales the output;
    miss: shards of the input share one matrix;
    vera: all layers share one random A and B, and train two vectors each;
    loha, lokr: the elementwise product of two A B, or a Kronecker product, is added;
    shira: a few elements of the weight train; hira: A B times the weight, elementwise, is added;
    oft: the input is rotated in blocks;
    bottleneck: a small network with a ReLU acts on the output, or stands beside the layer."""
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
    mica: B from the smallest ones, to be frozen (adapter.freeze lora_b), and A = 0;
    olora: QR decomposition of the weight; loftq: SVD of the quantization error;
    eva, corda: from the layer's inputs on training data; lora_ga, lora_one: from its gradients.
    Embeddings start with A = 0 and a random B, but for mica."""
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
    vera_d_initial: float = 0.1
    """VeRA: the initial value of d, the vector of the ranks."""
    lokr_factor: int | None = None
    """LoKr: one factor of inputs and outputs (PEFT: decompose_factor); None: near their roots."""
    bottleneck_input: Literal["output", "input"] = "output"
    """Bottleneck: what it sees, the layer's output (Houlsby, Pfeiffer) or its input (parallel)."""
    oft_block_size: int = 32
    """OFT: the size of the rotated blocks, or the nearest that divides the inputs."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: names, suffixes, regular expressions, or all-linear
    (every layer except embeddings, routers and the language model head). A bottleneck may stand
    beside a whole module, such as mlp."""
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
    invocation: str | None = None
    """Activated LoRA: a text, such as "<|im_start|>assistant", from whose last occurrence in a
    sample on the adapter acts. What is before it is computed by the base alone."""
    train_whole: tuple[str, ...] = ()
    """Modules whose own weights are trained (PEFT: modules_to_save); "all": full fine-tuning.
    Same syntax as adapter.targets."""
    trainable_tokens: tuple[int | str, ...] = ()
    """Tokens whose rows of the embedding and the head train while the others stay (PEFT:
    trainable_token_indices), each as its id or its text. data.new_tokens need not be named."""
    freeze: tuple[Factor, ...] = ()
    """Adapter factors to freeze at their initial values; freezing lora_a is LoRA-FA."""
    start_from: str | None = dataclasses.field(default=None, metadata={"deprecated": True})
    """Deprecated: use continue_from."""

    def __post_init__(self) -> None:
        check_types(self)
        self._rename_start_from()
        check_positive(self, "rank", "alpha", "calibration_batches")
        check_positive(self, "lora_ga_gamma", "lora_one_gamma", "vera_d_initial")
        check_positive(self, "oft_block_size")
        if self.lokr_factor is not None:
            check_positive(self, "lokr_factor")
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
        for field in ("targets", "exclude", "feedforward", "train_whole"):
            for pattern in getattr(self, field):
                compile_pattern(pattern, f"adapter.{field}")
        changes_base = INITS[self.init].changes_base
        check(
            self.invocation is None or not (self.dora or changes_base),
            f"adapter.invocation is {self.invocation!r}, and nothing may change before it, but "
            f"adapter.{'dora' if self.dora else f'init {self.init}'} changes the whole layer; "
            "remove one of them",
        )
        check(
            not self.trainable_tokens or self.continue_from is None,
            "adapter.trainable_tokens is set, but an adapter to continue from "
            "(adapter.continue_from) has its own; remove it",
        )
        needed = INITS[self.init].frozen
        check(
            needed is None or needed in self.freeze,
            f"adapter.init {self.init} is defined with a frozen {needed}; "
            f"give --adapter.freeze {needed} too",
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
