"""The best checkpoint and patience: what a run knows, and which checkpoints it keeps."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft.run.checkpoints import FOLDER, Checkpoints, resolve_checkpoint
from lorax_ft.run.standing import Standing
from lorax_ft.training.step import TrainState

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: math.nan}


def test_the_best_is_the_lowest_and_the_earliest_of_equal_ones() -> None:
    standing = Standing()
    waited = []
    for step, loss in LOSSES.items():
        standing = standing.evaluated(step, loss)
        waited.append(standing.waited)
    assert (standing.best_step, standing.best_loss, standing.evaluated_step) == (20, 1.0, 50)
    assert waited == [0, 0, 1, 2, 3]
    assert [standing.out_of_patience(patience) for patience in (0, 3, 4)] == [False, True, False]


def test_a_first_loss_that_is_not_finite_is_not_the_best() -> None:
    for loss in (math.nan, math.inf):
        assert Standing().evaluated(5, loss).best_step is None


def saved_run(run: Path, *, keep_best: bool) -> None:
    """Checkpoints of all evaluations, of which the two latest are kept, and the best if asked."""
    checkpoints = Checkpoints(run / FOLDER, keep=2)
    standing = Standing()
    for step, loss in LOSSES.items():
        standing = standing.evaluated(step, loss)
        if keep_best:
            checkpoints.keep_best(standing.best_step)
        checkpoints.save(step, state(step), {}, standing)
    checkpoints.close()


def state(step: int) -> TrainState:
    return TrainState(jnp.asarray(step), {"a": jnp.full(3, float(step))}, ())


def test_a_checkpoint_is_found_as_latest_best_or_step(tmp_path: Path) -> None:
    saved_run(tmp_path, keep_best=True)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["20", "40", "50"]
    found = {which: resolve_checkpoint(tmp_path, which) for which in ("latest", "best", "40", 20)}
    assert found == {"latest": 50, "best": 20, "40": 40, 20: 20}
    checkpoints = Checkpoints(tmp_path / FOLDER, keep=2)
    restored, _ = checkpoints.restore(state(0), {}, step=20)
    np.testing.assert_array_equal(restored.trained["a"], np.full(3, 20.0))
    assert checkpoints.standing(50, keeps_best=True).waited == 3


@pytest.mark.parametrize(
    ("which", "problem"),
    [
        ("30", "has no checkpoint of step 30; it has 20, 40, 50"),
        ("bets", "'bets' is neither latest, best nor a step; .* did you mean best"),
        ("-1", "neither latest, best nor a step"),
    ],
)
def test_a_checkpoint_that_is_not_there(tmp_path: Path, which: str, problem: str) -> None:
    saved_run(tmp_path, keep_best=True)
    with pytest.raises(ValueError, match=problem):
        resolve_checkpoint(tmp_path, which)


def test_no_best_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint"):
        resolve_checkpoint(tmp_path, "latest")
    saved_run(tmp_path / "a", keep_best=False)
    with pytest.raises(ValueError, match=r"best step of .* was 20, .* not kept"):
        resolve_checkpoint(tmp_path / "a", "best")
    checkpoints = Checkpoints(tmp_path / "b" / FOLDER, keep=2)
    checkpoints.save(1, state(1), {}, Standing())
    checkpoints.close()
    with pytest.raises(ValueError, match="was not evaluated"):
        resolve_checkpoint(tmp_path / "b", "best")
