"""Old names and forms of calls still work in this version, and warn with the name of the new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from method_cases import Adapted

import lorax_ft as lft
from lorax_ft.models.model import Model

CALLS: dict[str, Callable[..., Any]] = {
    "merge_adapters": lambda params, base, **layout: lft.merge_adapters(params, **layout),
    "merge_weighted": lambda params, base, **layout: lft.merge_weighted(
        base, [params, params], [0.5, 0.25], **layout
    ),
    "unmerge_adapters": lambda params, base, **layout: lft.unmerge_adapters(base, params, **layout),
    "with_norms": lambda params, base, **layout: lft.with_norms(params, **layout),
    "disable_adapters": lambda params, base, **layout: lft.disable_adapters(params, base, **layout),
    "attach_adapters": lambda params, base, **layout: lft.attach_adapters(
        base, lft.partition(params, by="ownership")[0], **layout
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_a_layout_guesses_it(
    decoder: Any, adapted: Adapted, randomize: Any, name: str
) -> None:
    model = decoder()
    method = "pissa-standard" if name == "attach_adapters" else "kaiming-standard"
    params = randomize(adapted("decoder", method, targets=("all-linear",)))
    call = CALLS[name]
    with pytest.warns(DeprecationWarning, match=f"{name} without layout=") as caught:
        old = call(params, model.params)
    assert caught[0].filename == __file__
    chex.assert_trees_all_equal(old, call(params, model.params, layout=model.layout))


def test_a_guess_needs_the_trees_and_lora(decoder: Any, adapted: Adapted, randomize: Any) -> None:
    model = decoder()
    params = randomize(adapted("decoder", "kaiming-standard", targets=("all-linear",)))
    with pytest.warns(DeprecationWarning, match="without layout="):
        old = lft.merge_adapters(params=params)
    chex.assert_trees_all_equal(old, lft.merge_adapters(params, layout=model.layout))
    other = adapted("decoder", "ia3-standard", targets=("all-linear",))
    warned = pytest.warns(DeprecationWarning, match="without layout=")
    with warned, pytest.raises(ValueError, match="pass layout="):
        lft.merge_adapters(other)


def test_switched_off_is_disable_adapters(decoder: Any, adapted: Adapted) -> None:
    model, params = decoder(), adapted("decoder", "pissa-rank_stabilized-dora")
    with pytest.warns(DeprecationWarning, match="use disable_adapters"):
        old = lft.switched_off(params, model.params, layout=model.layout)
    new = lft.disable_adapters(params, model.params, layout=model.layout)
    chex.assert_trees_all_equal(old, new)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_step_of_a_model_is_that_of_its_supervised_loss(
    decoder: Callable[..., Model], padded_batches: Any
) -> None:
    model = decoder()
    tx = lft.make_optimizer(lft.OptimConfig(), steps=1)
    adapters = lft.add_adapters(
        model.params, lft.AdapterConfig(rank=2), layout=model.layout, key=jax.random.key(0)
    )
    trained, frozen = lft.partition(adapters)
    state = lft.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    (rows,) = padded_batches(1)
    batch = {name: value[None] for name, value in rows.items()}
    loss = lft.supervised_loss(model, packed=False, dropout=0.1)
    new = lft.make_train_step(loss, tx, layout=model.layout)(
        state, frozen, batch, jax.random.key(1)
    )
    with pytest.warns(DeprecationWarning, match="pass supervised_loss"):
        step = lft.make_train_step(model, tx, packed=False, dropout=0.1)
    old_state, old_metrics = step(state, frozen, batch=batch, key=jax.random.key(1))
    chex.assert_trees_all_equal(old_state, new[0])
    assert old_metrics["tokens"] == new[1]["weight"] > 0
    with pytest.warns(DeprecationWarning, match="pass supervised_loss"):
        evaluate = lft.make_eval_step(model, packed=False)
    again = lft.make_eval_step(loss, layout=model.layout)
    chex.assert_trees_all_equal(evaluate(adapters, rows), again(adapters, rows))
    with pytest.raises(TypeError, match="layout"):
        lft.make_train_step(loss, tx)
