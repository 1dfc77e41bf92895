"""How a run stands: its best evaluation, those since without an improvement, its skipped steps.

Each checkpoint holds the standing of its step, so a resumed run decides as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

WINDOW = 100
"""Steps, of which `train.max_skipped` may be skipped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """What the steps and evaluations of a run have shown so far. All values are plain, for JSON."""

    best_step: int | None = None
    """The evaluated step with the lowest validation loss; the earliest of equal ones."""
    best_loss: float | None = None
    """The validation loss of that step."""
    evaluated_step: int | None = None
    """The last step that was evaluated."""
    waited: int = 0
    """Evaluations since the best one."""
    seconds: float = 0.0
    """How long the run has trained, including what it trained before it was resumed."""
    skipped: int = 0
    """Steps that changed nothing, as their loss or gradients were not finite."""
    skipped_lately: Sequence[int] = ()
    """Those of the last `WINDOW` steps when the last one was skipped."""

    def evaluated(self, step: int, loss: float) -> Standing:
        """The standing after the evaluation of a step. A loss that is not finite never leads."""
        best = math.inf if self.best_loss is None else self.best_loss
        if loss < best:
            return dataclasses.replace(
                self, evaluated_step=step, best_step=step, best_loss=loss, waited=0
            )
        return dataclasses.replace(self, evaluated_step=step, waited=self.waited + 1)

    def out_of_patience(self, patience: int) -> bool:
        """Whether so many evaluations in a row brought no improvement; never with 0."""
        return 0 < patience <= self.waited

    def skips(self, step: int) -> Standing:
        """The standing after a step that was skipped."""
        lately = [earlier for earlier in self.skipped_lately if earlier > step - WINDOW]
        return dataclasses.replace(self, skipped=self.skipped + 1, skipped_lately=(*lately, step))
