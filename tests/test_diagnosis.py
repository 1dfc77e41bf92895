"""What a run warns of at its end, and what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorax_ft.run.diagnosis import diagnose


def log(losses: Any, norms: Any = None) -> list[dict[str, Any]]:
    norms = np.ones(len(losses)) if norms is None else norms
    lines: list[dict[str, Any]] = [{"step": 0, "validation_loss": 5.0}]
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1):
        lines.append({"step": step, "loss": float(loss), "grad_norm": float(norm)})
    return lines


def noisy(start: float, end: float, *, steps: int = 100, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.2, steps)
    return np.linspace(start, end, steps) + noise


def test_a_rate_that_is_far_too_high() -> None:
    """As a run with a rate of 50 went: it explodes, and then nothing moves."""
    losses = [4.97, 8.96, 7.2, *[6.64] * 37]
    lines = log(losses, [5.0, 9.0, 3.0, *[0.0] * 37])
    (warning,) = diagnose(lines, before=5.2, after=6.64, learning_rate=50.0)
    assert warning == (
        "the training loss rose from 4.97 to 6.64, and the validation loss rose from 5.20 to 6.64, "
        "and the gradient norm was 0.0 at the last 4 steps; lower optim.learning_rate (it was 50)"
    )


def test_overfitting() -> None:
    (warning,) = diagnose(log(noisy(2.0, 0.3)), before=2.0, after=2.5, learning_rate=1e-4)
    assert "the validation loss rose from 2.00 to 2.50; the training loss fell" in warning
    assert "train.load_best" in warning


def test_small_losses_are_told_apart() -> None:
    (warning,) = diagnose(log([0.02, 0.02]), before=0.0192, after=0.0198, learning_rate=1e-4)
    assert "the validation loss rose from 0.0192 to 0.0198" in warning


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("start", "end"), [(2.0, 0.5), (1.0, 1.0), (1.0, 0.95)])
def test_a_run_that_went_well_or_was_level(seed: int, start: float, end: float) -> None:
    """The noise of single batches is no rise."""
    for steps in (3, 10, 100):
        lines = log(noisy(start, end, steps=steps, seed=seed))
        for before, after in ((1.0, 0.9), (1.0, 1.0), (None, None)):
            assert diagnose(lines, before=before, after=after, learning_rate=1e-4) == []


def test_short_logs() -> None:
    for losses in ([], [2.0], [2.0, 3.0]):
        assert diagnose(log(losses), before=None, after=None, learning_rate=1e-4) == []
