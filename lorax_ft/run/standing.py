"""How a run stands: its best evaluation, and the evaluations since that did not improve on it.

Each checkpoint holds the standing of its step, so a resumed run decides as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """What the evaluations of a run have shown so far. All values are plain, for JSON."""

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
