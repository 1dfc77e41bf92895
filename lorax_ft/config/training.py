"""The optimizer, the course of a run, and what is evaluated."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from lorax_ft.checks import (
    alternatives,
    check,
    check_fraction,
    check_positive,
    check_types,
    compile_pattern,
    divisors,
)
from lorax_ft.program import command, either


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rates and their schedule."""

    # Optimizers that work element by element, or matrix by matrix: scanned layers share one leaf,
    # and norms over a whole leaf (LAMB, Adafactor) would mix them.
    optimizer: Literal["adamw", "adam", "nadamw", "lion", "sgd", "lora_muon"] = "adamw"
    """Optimizer, from optax.
    lora_muon: LoRA-Muon (2606.12921), spectral steepest descent on the product A B; its learning
    rates are larger, and what is not A or B is trained by AdamW."""
    riemannian: bool = False
    """Riemannian preconditioning (2402.02347): the gradients of A and B are multiplied by the
    inverse Gram matrix of the other factor before the optimizer sees them."""
    learning_rate: float | Literal["find", "auto"] = 2e-4
    """Peak learning rate; the two ratios below scale it for B and for DoRA's magnitudes.
    find: short runs at several rates first, in one program; the run takes the best one;
    auto: by the model's width, the rule of LoRA Without Regret, which needs adapter.alpha 32."""
    lora_plus_ratio: float = 1.0
    """LoRA+: ratio of B's learning rate to A's; the paper recommends 16."""
    magnitude_ratio: float = 1.0
    """Ratio of the learning rate of DoRA's magnitudes to A's."""
    prompt_ratio: float = 1.0
    """Ratio of the learning rate of the soft prompt to A's."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate schedule after warmup.
    wsd (warmup-stable-decay): constant, with a linear decay over the last fifth."""
    warmup_fraction: float = 0.03
    """Fraction of all steps used for linear warmup."""
    warmup_steps: int | None = None
    """Steps of linear warmup, in place of the fraction; None: the fraction."""
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
        check(
            not self.riemannian or self.optimizer != "lora_muon",
            "optim.riemannian and optim.optimizer lora_muon both precondition A and B; give one",
        )
        if not isinstance(self.learning_rate, str):
            check_positive(self, "learning_rate")
        check_positive(self, "lora_plus_ratio", "magnitude_ratio", "prompt_ratio")
        check_fraction(self, "warmup_fraction", "final_fraction")
        check(
            self.warmup_steps is None or 0 <= self.warmup_steps < 2**31,
            f"optim.warmup_steps is {self.warmup_steps}; it must be 0 or more and below 2^31",
        )
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

    @property
    def peak(self) -> float:
        """The peak learning rate, once it is a number.

        Raises:
          ValueError: it is still to be found.
        """
        if isinstance(self.learning_rate, str):
            raise ValueError(
                f"optim.learning_rate is {self.learning_rate}, which "
                f"{either('lorax_ft.train', command('train'))} resolves; give a number here"
            )
        return self.learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the run, its batches, logs and checkpoints."""

    output: str = "out/run"
    """Output folder for the adapter, the log, the loss plot and the checkpoints; may be gs://."""
    overwrite: bool = False
    """Delete the previous run in the output folder once the new run starts; keep other files."""
    resume: Literal["auto", "always", "never"] = "auto"
    """What to do with a run in the output folder.
    auto: go on with an unfinished run of the same settings, and begin where there is none;
    always: refuse where there is nothing to go on from; never: refuse where there is a run."""
    steps: int | None = None
    """Number of optimizer steps; None computes it from train.epochs."""
    epochs: float | None = None
    """Passes over the training rows; None: one. train.steps wins if both are given."""
    max_minutes: float | None = None
    """End the training after so many minutes, with the evaluation and the adapter of a full run.
    The same command with more minutes continues it; the schedule stays that of all steps."""
    batch_size: int = 16
    """Global batch size: rows per optimizer step, over all devices."""
    microbatches: int = 1
    """Gradient accumulation: microbatches per optimizer step, to save memory.
    The result is the same, except for the random draws of dropout and NEFTune."""
    neftune_alpha: float = 0.0
    """NEFTune: scale of the uniform noise on the embeddings; the paper uses 5 to 15; 0: off."""
    router_aux_loss_coef: float = 0.0
    """Weight of the router's load-balancing loss beside the cross-entropy, for models with experts;
    0: off. It is computed of each microbatch."""
    max_skipped: int = 10
    """Steps of the last 100 that may be skipped. A step whose loss or gradients are not finite
    changes nothing; one more ends the run with a checkpoint. 0 ends it at the first."""
    step_timeout: float | None = None
    """End the process if a step takes longer than so many seconds, the first ones ten times as long
    (they may compile): with the stack of each thread and exit status 1; the same command goes on.
    Evaluations and checkpoints have no limit. None: never."""
    verify: bool = True
    """At the end, check that the frozen weights are bitwise what they were, and that the saved
    adapter, read again from its folder, gives the logits of the trained model."""
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
        # The flag that it was, in the config.json of older runs.
        if isinstance(self.resume, bool):
            object.__setattr__(self, "resume", "always" if self.resume else "auto")
        check_types(self)
        check_positive(self, "batch_size", "microbatches", "log_every", "keep_checkpoints")
        for field in ("epochs", "max_minutes", "step_timeout"):
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
        self._check_microbatches()
        for field in (
            "neftune_alpha",
            "eval_every",
            "save_every",
            "patience",
            "profile",
            "max_skipped",
        ):
            value = getattr(self, field)
            check(value == "epoch" or value >= 0, f"train.{field} is {value}; it must be 0 or more")
        coef = self.router_aux_loss_coef
        check(
            math.isfinite(coef) and coef >= 0,
            f"train.router_aux_loss_coef is {coef}; it must be 0 or more and finite",
        )
        self._check_evaluation()
        self._check_output()

    def _check_microbatches(self) -> None:
        if self.batch_size % self.microbatches == 0:
            return
        fitting = divisors(self.batch_size)
        below = [number for number in fitting if number < self.microbatches]
        above = [number for number in fitting if number > self.microbatches]
        raise ValueError(
            f"train.batch_size {self.batch_size} does not divide into train.microbatches "
            f"{self.microbatches}; {alternatives(below[-1:] + above[:1])} microbatches would"
        )

    def _check_evaluation(self) -> None:
        for field in ("load_best", "patience"):
            check(
                not getattr(self, field) or self.eval_every != 0,
                f"train.{field} compares evaluations, but train.eval_every is 0; "
                "give train.eval_every N, or epoch",
            )

    def _check_output(self) -> None:
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
            not (self.resume == "always" and self.overwrite),
            "train.resume always and train.overwrite are mutually exclusive; give one of them",
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
    choices: str | None = None
    """Folder of multiple-choice questions (MMLU, C-Eval or CMMLU), whose accuracy is measured at
    each evaluation, in the chat template if the tokenizer has one."""
    choices_limit: int | None = None
    """Questions of each subject to ask, from the first; None asks all."""
    shots: int = 0
    """Questions of dev, with their answers, before each question of eval.choices."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "max_new_tokens")
        check(
            self.choices_limit is None or self.choices_limit > 0,
            f"eval.choices_limit is {self.choices_limit}; it must be above 0",
        )
        for field in ("rows", "exact_match_rows", "samples", "shots"):
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
