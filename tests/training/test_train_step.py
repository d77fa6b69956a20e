"""The step: the same on any mesh, the same as its mathematics written out, and nothing goes to the host."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model import small
from tests.model.small import close
from tvq import schema, sharding
from tvq.model import transformer
from tvq.model.layers import Draws
from tvq.training import optimizer, state, train_step
from tvq.training.state import TrainState

B, T, U = 8, 16, 8
N_UPDATE = T // U
DROPOUT = dataclasses.replace(
    small.MODEL, p_dropemb=0.1, p_dropsin=0.2, p_dropres=0.3, p_droplyr=0.3, c_beta=0.01,
    attend_across_documents=False, revive_codes=N_UPDATE,
)  # fmt: skip
RUN = schema.Config(
    model=DROPOUT,
    optimizer=schema.Optimizer(lr_max=3e-3, n_warmup_step=4, n_max_step=40, grad_clip=0.5),
    train=schema.Train(steps=20, global_batch_size=B, sequence_len=T, update_len=U),
)
PLAIN = dataclasses.replace(RUN, model=dataclasses.replace(small.MODEL, c_beta=0.01))


def host_batch(number: int) -> dict[str, np.ndarray]:
    """Learnable: each token is the one before it and one more. One sequence ends early."""
    rng = np.random.default_rng(number)
    text = (rng.integers(0, 11, (B, 1)) + np.arange(T + 1)[None]) % 11
    mask = np.ones((B, T), np.int32)
    mask[number % B, 11:] = 0
    return {
        "inputs": text[:, :-1].astype(np.int32),
        "targets": text[:, 1:].astype(np.int32),
        "loss_mask": mask,
    }


def on(n_device: int) -> jax.sharding.Mesh:
    return sharding.make(schema.Mesh(), jax.devices()[:n_device])


def batch(number: int, n_device: int) -> dict[str, jax.Array]:
    return sharding.global_batch(on(n_device), host_batch(number), B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial(run: schema.Config, tx: optax.GradientTransformation) -> TrainState:
    return state.init(run.model, tx, run.train.seed)


def first_state(run: schema.Config, tx: optax.GradientTransformation, n_device: int) -> TrainState:
    return jax.device_put(initial(run, tx), sharding.sharding(on(n_device), sharding.WHOLE))


def compile_step(run: schema.Config, tx: optax.GradientTransformation, n_device: int) -> jax.stages.Compiled:
    step = train_step.make(run, on(n_device), tx)
    return step.lower(first_state(run, tx, n_device), batch(0, n_device)).compile()


ADAMW = optimizer.make(RUN.optimizer, RUN.model)


@functools.cache
def compiled(n_device: int) -> jax.stages.Compiled:
    return compile_step(RUN, ADAMW, n_device)


@functools.cache
def trained(n_device: int, attempt: int = 0) -> tuple[list[dict], TrainState, TrainState]:
    """Metrics of 20 updates, the state after the first call and the last."""
    now = first_state(RUN, ADAMW, n_device)
    rows, first = [], None
    for number in range(20 // N_UPDATE):
        now, metrics = compiled(n_device)(now, batch(number, n_device))
        rows.append(jax.device_get(metrics))
        first = first or jax.device_get(now._replace(key=jax.random.key_data(now.key)))
    return rows, first, jax.device_get(now._replace(key=jax.random.key_data(now.key)))


@pytest.mark.slow
@pytest.mark.parametrize("n_device", [2, 4, 8])
def test_losses_do_not_depend_on_the_mesh(n_device):
    (want, want_first, _), (got, first, _) = trained(1), trained(n_device)
    for a, b in zip(got, want, strict=True):
        assert set(a) == set(b)
        np.testing.assert_allclose(
            a["loss_lm_per_token_unscaled"], b["loss_lm_per_token_unscaled"], rtol=1e-5
        )
    # The codes of the first updates are the same: each count is a sum of whole numbers.
    close(first.weights.extra, want_first.weights.extra, 1e-6)
    close(first.weights.params, want_first.weights.params, 1e-5)


@pytest.mark.slow
def test_a_run_learns():
    losses = [row["loss_lm_per_token_unscaled"] for row in trained(1)[0]]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_the_same_mesh_is_bitwise_repeatable():
    for a, b in zip(*(jax.tree.leaves(trained(8, attempt)) for attempt in (0, 1)), strict=True):
        np.testing.assert_array_equal(a, b)


@functools.cache
def trained_in_fixed_order(n_device: int) -> tuple[list[dict], TrainState]:
    """Metrics and last state of 30 updates from batches in as many parts on any number of devices."""
    train = dataclasses.replace(RUN.train, accumulate=B // n_device, reproducible=True)
    step = compile_step(dataclasses.replace(RUN, train=train), ADAMW, n_device)
    now, rows = first_state(RUN, ADAMW, n_device), []
    for number in range(30 // N_UPDATE):
        now, metrics = step(now, batch(number, n_device))
        rows.append(jax.device_get(metrics))
    return rows, jax.device_get(now._replace(key=0))


@pytest.mark.slow
@pytest.mark.parametrize("n_device", [1, 2])
def test_reproducible_is_bitwise_on_any_number_of_devices(n_device):
    want, got = (jax.tree.leaves_with_path(trained_in_fixed_order(n)) for n in (8, n_device))
    for (path, a), (_, b) in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_the_old_state_is_donated_and_nothing_goes_to_the_host():
    n_device = 8
    now = first_state(RUN, ADAMW, n_device)
    batches = [batch(number, n_device) for number in range(3)]
    step = compiled(n_device)
    rows = []
    with jax.transfer_guard("disallow"):
        for one in batches:
            old = now
            now, metrics = step(now, one)
            rows.append(metrics)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert int(now.step) == 3 * N_UPDATE
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((now, rows)))


def by_hand(run: schema.Config, now: TrainState, one: dict, rate: float) -> tuple[dict, dict, list]:
    """The updates of one call with plain gradient descent, on one device, written out."""
    gradient = jax.jit(jax.value_and_grad(train_step.loss_fn, has_aux=True), static_argnums=5)
    params, codebooks = now.weights.params, now.weights.extra["codebooks"]
    attention, rows = transformer.start(run.model, B), []
    for start in range(0, T, U):
        piece = {name: rows[:, start : start + U] for name, rows in one.items()}
        (_, (attention, stats, metrics)), grads = gradient(
            params, {"codebooks": codebooks}, piece, attention, None, run.model
        )
        rows.append(metrics)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        gamma = run.model.c_gamma
        codebooks = {name: gamma * codebooks[name] + (1 - gamma) * stats[name] for name in codebooks}
    return params, codebooks, rows


@pytest.mark.slow
def test_a_call_on_eight_devices_is_its_updates_written_out():
    n_device, rate = 8, 0.5
    tx = optax.sgd(rate)
    now = first_state(PLAIN, tx, n_device)
    want_params, want_codebooks, want_rows = by_hand(PLAIN, initial(PLAIN, tx), host_batch(0), rate)
    now, metrics = compile_step(PLAIN, tx, n_device)(now, batch(0, n_device))
    close(now.weights.params, want_params, 1e-5)
    close(now.weights.extra["codebooks"], want_codebooks, 1e-5)
    assert int(now.step) == N_UPDATE
    for name in want_rows[0]:
        want = np.mean([row[name] for row in want_rows])
        np.testing.assert_allclose(metrics[name], want, rtol=1e-4, err_msg=name)
    factors = [optimizer.schedule(PLAIN.optimizer)(i) for i in range(N_UPDATE)]
    np.testing.assert_allclose(metrics["learning_rate"], PLAIN.optimizer.lr_max * np.mean(factors), rtol=1e-5)


@pytest.mark.slow
def test_an_update_in_segments_is_the_update():
    """Loss, statistics, next state and gradients, with everything drawn."""
    weights = small.parameters(DROPOUT)
    piece = {name: jnp.asarray(rows) for name, rows in host_batch(0).items()}
    attention = transformer.start(DROPOUT, B)
    draws = Draws(jax.random.key(0), jax.random.key(1), jnp.arange(B))
    gradient = jax.jit(jax.value_and_grad(train_step.loss_fn, has_aux=True), static_argnums=(5, 6))
    want = gradient(*weights, piece, attention, draws, DROPOUT, 0)
    got = gradient(*weights, piece, attention, draws, DROPOUT, small.MODEL.block_len)
    close(got, want, 1e-5)


@pytest.mark.slow
def test_what_is_drawn_when(monkeypatch):
    """Ephemeral keys are new each update, timeless ones each call; sequences count through the devices."""
    seen: list[tuple] = []
    loss_fn = train_step.loss_fn

    def spy(*arguments: Any):
        draws = arguments[4]
        keys = jax.random.key_data(draws.ephemeral), jax.random.key_data(draws.timeless)
        jax.debug.callback(
            lambda *values: seen.append(tuple(tuple(v.tolist()) for v in values)), *keys, draws.sequence_B
        )
        return loss_fn(*arguments)

    monkeypatch.setattr(train_step, "loss_fn", spy)
    tx = optax.sgd(0.0)
    now = first_state(PLAIN, tx, 2)
    step = compile_step(PLAIN, tx, 2)
    calls = []
    for number in range(2):
        seen.clear()
        now, _ = step(now, batch(number, 2))
        jax.effects_barrier()
        calls.append(list(seen))
    for call in calls:
        assert {rows for _, _, rows in call} == {(0, 1, 2, 3), (4, 5, 6, 7)}
        assert len({ephemeral for ephemeral, _, _ in call}) == N_UPDATE
        assert len({timeless for _, timeless, _ in call}) == 1
    every = [entry for call in calls for entry in call]
    assert len({ephemeral for ephemeral, _, _ in every}) == 2 * N_UPDATE
    assert len({timeless for _, timeless, _ in every}) == 2
    assert {e for e, _, _ in every}.isdisjoint({t for _, t, _ in every})


def n_used(now: TrainState) -> np.ndarray:
    """Codes that hold more than a hundredth of an even share, of each unit and head."""
    count_NHS = np.asarray(now.weights.extra["codebooks"]["count"])
    return np.sum(count_NHS > 0.01 * count_NHS.mean(-1, keepdims=True), -1)


@pytest.mark.slow
@pytest.mark.parametrize("n_device", [1, 8])
def test_dead_codes_come_back_to_life(n_device):
    """All codewords but one lie where no key is."""
    now = first_state(RUN, ADAMW, n_device)
    codebooks = now.weights.extra["codebooks"]
    away = codebooks["sum"].at[:, :, 1:].add(100.0)
    count = codebooks["count"].at[:, :, 1:].set(1e-6)
    far = {"codebooks": codebooks | {"sum": away, "count": count}}
    now = now._replace(weights=now.weights._replace(extra=far))
    assert (n_used(now) == 1).all()
    now, metrics = compiled(n_device)(now, batch(0, n_device))
    # After N_UPDATE updates all are seeded, the first of them with the first key; but none with a masked one.
    masked = np.asarray(metrics["probe"]["mask"])[:, None, : small.MODEL.n_code - 1] == 0
    assert masked.any()
    np.testing.assert_array_equal(
        now.weights.extra["codebooks"]["idle"][:, :, 1:], np.where(masked, N_UPDATE, 0) + np.zeros((1, 2, 1))
    )
    first_key = metrics["probe"]["key"][:, :, 0]
    np.testing.assert_array_equal(now.weights.extra["codebooks"]["sum"][:, :, 1], first_key)
    for number in range(1, 10):
        now, _ = compiled(n_device)(now, batch(number, n_device))
    assert (n_used(now) > 12).all(), n_used(now)
