"""Updates that are left out leave nothing behind; z-loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.training import test_train_step as steps
from tvq.training import loss, optimizer, skip, state, train_step
from tvq.training.skip import Recent

WINDOW, N_DEVICE = 4, 2


def recent(losses: list[float], norms: list[float], n_update: int = WINDOW) -> Recent:
    return Recent(jnp.asarray(losses), jnp.asarray(norms), jnp.int32(n_update), jnp.int32(3))


@pytest.mark.parametrize(
    ("loss", "norm", "n_update", "is_skipped"),
    [
        (3.9, 1.0, WINDOW, False),  # mean 2, deviation 1: the limit is 4
        (4.1, 1.0, WINDOW, True),
        (-9.0, 1.0, WINDOW, False),
        (2.0, 1.1, WINDOW, True),  # the norm was always 1
        (4.1, 9.0, WINDOW - 1, False),  # not enough to judge by
        (4.1, 1.0, 9, True),
    ],
)
def test_far_is_above_the_updates_before(loss, norm, n_update, is_skipped):
    before = recent([1.0, 3.0, 1.0, 3.0], [1.0] * WINDOW, n_update)
    got, after = skip.judge(before, jnp.float32(loss), jnp.float32(norm), 2.0)
    assert bool(got) == is_skipped
    assert int(after.n_skipped) == 3 + is_skipped
    assert int(after.n_update) == n_update + 1
    # Skipped or not, it takes the place of the oldest.
    assert float(after.loss_W[n_update % WINDOW]) == np.float32(loss)
    assert np.sum(np.asarray(after.loss_W != before.loss_W)) == 1


SKIPPING = dataclasses.replace(
    steps.RUN, optimizer=dataclasses.replace(steps.RUN.optimizer, skip_sigma=0.5, skip_window=WINDOW)
)


@functools.cache
def compiled() -> tuple[state.TrainState, jax.stages.Compiled]:
    tx = optimizer.make(SKIPPING.optimizer, SKIPPING.model)
    return steps.first_state(SKIPPING, tx, N_DEVICE), steps.compile_step(SKIPPING, tx, N_DEVICE)


def after_a_call(usual: float) -> tuple[state.TrainState, state.TrainState, dict]:
    """The state before and after a call where the losses and norms before were `usual`, on the host."""
    first, step = compiled()
    full = recent([usual] * WINDOW, [usual] * WINDOW)._replace(n_skipped=jnp.int32(0))
    full = jax.device_put(full, jax.tree.map(lambda x: x.sharding, first.opt_state[skip.STATE]))
    now = jax.tree.map(jnp.copy, first._replace(opt_state=first.opt_state | {skip.STATE: full}))
    before = jax.device_get(now._replace(key=0))
    now, metrics = step(now, steps.batch(0, N_DEVICE))
    return before, jax.device_get(now._replace(key=0)), jax.device_get(metrics)


@pytest.mark.slow
def test_a_skipped_update_changes_nothing_but_counts():
    before, after, metrics = after_a_call(usual=0.01)
    for (path, a), (_, b) in zip(
        *(jax.tree.leaves_with_path((x.weights, x.opt_state["adamw"])) for x in (after, before)), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert int(after.step) == int(after.opt_state["schedule"].count) == steps.N_UPDATE
    assert metrics["updates_skipped"] == after.opt_state[skip.STATE].n_skipped == steps.N_UPDATE


@pytest.mark.slow
def test_an_update_that_is_not_skipped_is_as_without():
    _, after, metrics = after_a_call(usual=1e3)
    want, _ = steps.compiled(N_DEVICE)(
        steps.first_state(steps.RUN, steps.ADAMW, N_DEVICE), steps.batch(0, N_DEVICE)
    )
    small.close(after.weights, jax.device_get(want.weights), 1e-6)
    assert metrics["updates_skipped"] == 0


def test_z_loss_is_the_square_of_log_z():
    """And the loss of the tokens is what it is without; gradients follow the coefficient."""
    weights = small.parameters(small.MODEL)
    piece = {name: jnp.asarray(rows) for name, rows in steps.host_batch(0).items()}
    x_BTD = jax.random.normal(jax.random.key(0), (steps.B, steps.T, 16))
    arguments = weights, x_BTD, piece["targets"], piece["loss_mask"], small.MODEL
    nll_BT, z_BT = jax.jit(loss.token_nll_and_z, static_argnums=4)(*arguments)
    small.close(nll_BT, jax.jit(loss.token_nll, static_argnums=4)(*arguments), 1e-5)
    logits_BTC = x_BTD @ weights.params["out"]["kernel"] + weights.params["out"]["bias"][None, None]
    want_BT = jnp.log(jnp.exp(logits_BTC).sum(-1)) ** 2 * piece["loss_mask"]
    small.close(z_BT, want_BT, 1e-5)


@pytest.mark.slow
def test_z_loss_is_added_by_its_weight():
    weights = small.parameters(small.MODEL)
    piece = {name: jnp.asarray(rows) for name, rows in steps.host_batch(0).items()}
    begin = steps.transformer.start(small.MODEL, steps.B)
    of = jax.jit(train_step.loss_fn, static_argnums=(5, 6, 7, 8))
    axes = steps.sharding.UNCUT
    (plain, _), (more, (_, _, metrics)) = (
        of(*weights, piece, begin, None, small.MODEL, 0, axes, z) for z in (0.0, 0.5)
    )
    np.testing.assert_allclose(more - plain, 0.5 * metrics["loss_z_per_token"], rtol=1e-4)
