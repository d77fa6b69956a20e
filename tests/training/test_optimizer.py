"""Schedules, decay and the chain against their formulas; the golden files hold the original's numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model import small
from tvq import sharding
from tvq.model import Weights, parameters
from tvq.run import tensors
from tvq.schema import OPTIMIZERS, SCHEDULES, Mesh, Model, Optimizer
from tvq.training import optimizer, state, transforms
from tvq.training.state import TrainState

WARMUP, MAX = 10, 110
KVG = transforms.joints(small.MODEL, "units")
CONFIG = Optimizer(n_warmup_step=WARMUP, n_max_step=MAX, lr_max=0.01, grad_clip=0.0, wd_lam=0.0)


def factor(name: str, step: int, **changed: int | float | str) -> float:
    made = optimizer.schedule(dataclasses.replace(CONFIG, schedule=name, **changed))
    return float(made(jnp.int32(step)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_from_zero_and_meets_the_decay_at_one(name):
    for step in range(WARMUP + 1):
        assert factor(name, step) == pytest.approx(step / WARMUP, abs=1e-6)
    assert factor(name, WARMUP + 1) == pytest.approx(1, abs=0.06)
    assert (factor(name, WARMUP + 1) == 1) == (name in ("constant", "wsd"))


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_ends_at_a_tenth_and_stays(name):
    middle = WARMUP + (MAX - WARMUP) // 2
    assert factor(name, middle) == pytest.approx(0.55, abs=1e-6)
    for step in (MAX, MAX + 1, 100 * MAX):
        assert factor(name, step) == pytest.approx(0.1, abs=1e-6)
    assert factor(name, MAX - 1) > 0.1


def test_cosine_is_a_cosine():
    for step in range(WARMUP, MAX, 7):
        want = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (MAX - WARMUP)))
        assert factor("cosine", step) == pytest.approx(want, abs=1e-6)


def test_inverse_square_root_has_no_end():
    for step in (WARMUP, WARMUP + 1, 4 * WARMUP, MAX, 100 * WARMUP, 10_000 * WARMUP):
        assert factor("inv_sqrt", step) == pytest.approx(math.sqrt(WARMUP / step), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changed", "values"),
    [
        ("constant", {}, {10: 1, 110: 1, 10_000: 1}),
        ("wsd", {}, {10: 1, 88: 1, 99: 0.55, 110: 0.1, 200: 0.1}),  # a fifth of 110 updates
        ("wsd", {"n_decay_step": 100}, {10: 1, 35: 0.775, 60: 0.55, 110: 0.1}),
        ("wsd", {"n_decay_step": 40, "floor": 0.0}, {70: 1, 90: 0.5, 109: 0.025, 110: 0, 111: 0}),
        ("wsd", {"n_decay_step": 40, "decay_shape": "sqrt", "floor": 0.0}, {70: 1, 80: 0.5, 110: 0}),
        ("wsd", {"n_decay_step": 40, "decay_shape": "sqrt", "floor": 0.2}, {80: 0.6, 110: 0.2, 500: 0.2}),
        ("wsd", {"n_decay_step": 40, "decay_shape": "cosine", "floor": 0.2}, {90: 0.6, 110: 0.2}),
        ("cosine", {"floor": 0.0}, {60: 0.5, 110: 0, 200: 0}),
        ("linear", {"floor": 0.0}, {35: 0.75, 110: 0, 200: 0}),
        ("linear", {"floor": 1.0}, {5: 0.5, 60: 1, 200: 1}),
    ],
)
def test_factors_worked_out_by_hand(name, changed, values):
    for step, want in values.items():
        assert factor(name, step, **changed) == pytest.approx(want, abs=1e-6), step


@pytest.mark.parametrize("name", ["cosine", "linear", "inv_sqrt"])
def test_without_warm_up_the_first_factor_is_one(name):
    assert factor(name, 0, n_warmup_step=0) == 1.0
    assert factor(name, 1, n_warmup_step=0) < 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_decay_spares_what_is_a_vector_in_one_unit(tied):
    """The rule: every parameter whose rank is not 1 decays; the dim that stacks units does not count."""
    model = dataclasses.replace(small.MODEL, pe_abs=True, e_preln=True, e_tie=tied)
    params, _ = jax.eval_shape(lambda: parameters.init(model, jax.random.key(0)))
    flags = jax.tree.leaves(optimizer.decayed(params, model))
    spared = set()
    for (path, leaf), flag in zip(jax.tree.leaves_with_path(params), flags, strict=True):
        rank = leaf.ndim - (path[0].key == "units")
        assert flag == (rank != 1), path
        if not flag:
            spared.add(path[-1].key)
    assert spared == {"gain", "bias", "u", "w"}


def tree(seed: int) -> dict:
    """Two units with a kernel large enough for Adafactor to factor, and others."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    # The second unit is a hundred times the first: together they would share one scale.
    size = jnp.asarray([1.0, 100.0])
    kernel = lambda *shape: draw(2, *shape) * size[:, None, None]
    units = {"q": kernel(130, 132), "k": kernel(130, 4), "v": kernel(130, 70), "g": kernel(130, 70)}
    return {"embed": {"table": draw(5, 4)}, "units": units | {"u": draw(2, 6) * size[:, None]}}


def run(tx: optax.GradientTransformation, params: dict, n_step: int = 3) -> tuple[dict, list[dict]]:
    """The parameters after updates with the gradients of seeds 1, 2, ..., and the updates."""
    opt_state, update = tx.init(params), jax.jit(tx.update)
    all_updates = []
    for seed in range(1, n_step + 1):
        grads = select(tree(seed), params)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return params, all_updates


def select(full: dict, like: dict) -> dict:
    """The part of a tree that `like` has."""
    return {k: select(full[k], v) if isinstance(v, dict) else full[k] for k, v in like.items()}


def test_adafactor_treats_each_unit_by_itself():
    got, _ = run(transforms.each_unit(optax.adafactor(0.01), small.MODEL), tree(0))
    got["units"] = transforms.joined(got["units"], KVG)
    for unit in range(2):
        one = lambda seed, unit=unit: jax.tree.map(
            lambda x: x[unit], transforms.joined(tree(seed)["units"], KVG)
        )
        tx = optax.adafactor(0.01)
        params = one(0)
        opt_state = tx.init(params)
        for seed in (1, 2, 3):
            updates, opt_state = tx.update(one(seed), opt_state, params)
            params = optax.apply_updates(params, updates)
        small.close({name: got["units"][name][unit] for name in params}, params, 1e-6)
    embed, _ = run(optax.adafactor(0.01), {"embed": tree(0)["embed"]})
    small.close(got["embed"], embed["embed"], 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_one_unit_does_not_depend_on_the_other(name):
    tx = optimizer.make(dataclasses.replace(CONFIG, name=name, n_warmup_step=0), small.MODEL)
    alone = lambda x: {**x, "units": jax.tree.map(lambda a: a.at[0].set(1e-3), x["units"])}
    params, grads = tree(0), tree(1)
    update = jax.jit(tx.update)
    want, _ = update(grads, tx.init(params), params)
    got, _ = update(alone(grads), tx.init(alone(params)), alone(params))
    second = lambda updates: jax.tree.map(lambda a: a[1], updates["units"])
    small.close(second(got), second(want), 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_is_by_the_norm_of_all_gradients_and_zero_leaves_it_out(name):
    def updates(grad_clip: float, scale: float = 1.0) -> list:
        tx = optimizer.make(
            dataclasses.replace(CONFIG, name=name, grad_clip=grad_clip, n_warmup_step=0), small.MODEL
        )
        opt_state = tx.init(tree(0))
        updates = []
        for seed in (1, 2):
            # The second gradient is small, so that clipping the first changes their ratio.
            grads = jax.tree.map(lambda g, k=seed: g * scale * 0.01 ** (k - 1), tree(seed))
            one, opt_state = jax.jit(tx.update)(grads, opt_state, tree(0))
            updates.append(one)
        return jax.tree.leaves(updates)

    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(tree(1)))))
    free, loose, tight = updates(0.0), updates(2 * norm), updates(norm / 50)
    for a, b in zip(free, loose, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(free, tight, strict=True))
    assert len(optimizer.make(dataclasses.replace(CONFIG, name=name), small.MODEL).init(tree(0))) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cut_arrays_are_updated_as_whole_ones(name):
    """Each device holds a part of parameters and moments: the norm, and Adafactor's means, are of all."""
    tx = optimizer.make(
        dataclasses.replace(CONFIG, name=name, grad_clip=0.1, n_warmup_step=0, wd_lam=0.01), small.MODEL
    )
    params, grads = tree(0), tree(1)
    update = jax.jit(tx.update)
    want, want_state = update(grads, tx.init(params), params)
    like = TrainState(jnp.int32(0), Weights(params, {}), tx.init(params), jax.random.key(0))
    mesh = sharding.make(Mesh(devices=2), jax.devices()[:2])
    specs = state.specs(like, Model(d_model=130), sharding.Axes(D="devices"))
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, sharding.sharding(mesh, spec)), like, specs)
    cut_grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, placed.weights.params)
    got, got_state = update(cut_grads, placed.opt_state, placed.weights.params)
    small.close((got, got_state), (want, want_state), 1e-6)
    moments = [x for x in jax.tree.leaves(placed.opt_state) if 130 in x.shape]
    assert not any(x.sharding.is_fully_replicated for x in moments)
    assert not placed.weights.params["units"]["v"].sharding.is_fully_replicated


def test_clipping_scales_by_the_norm_without_epsilon():
    params = {"units": {"q": jnp.ones((1, 2, 2))}, "out": {"kernel": jnp.ones((2, 2))}}
    grads = jax.tree.map(lambda p: 3.0 * p, params)  # norm 3 sqrt(8)
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(grads, clip.init(params))
    adam = optax.adam(0.01, b1=0.9, b2=0.98, eps=1e-9)
    want, _ = adam.update(clipped, adam.init(params), params)
    tx = optimizer.make(dataclasses.replace(CONFIG, grad_clip=1.0, n_warmup_step=0), small.MODEL)
    got, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(clipped["out"]["kernel"], 1 / math.sqrt(8), rtol=1e-6)
    np.testing.assert_allclose(got["out"]["kernel"], want["out"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_scaled_by_neither_rate_nor_schedule(name):
    tx = optimizer.make(dataclasses.replace(CONFIG, name=name, wd_lam=0.02), small.MODEL)
    params = tree(0)
    updates, opt_state = tx.update(tree(1), tx.init(params), params)
    # The factor of the first update is 0: only the decay is left, of the parameters before it.
    np.testing.assert_allclose(updates["embed"]["table"], -0.02 * params["embed"]["table"], rtol=1e-6)
    np.testing.assert_allclose(updates["units"]["q"], -0.02 * params["units"]["q"], rtol=1e-6)
    np.testing.assert_array_equal(updates["units"]["u"], 0.0)
    updates, _ = tx.update(tree(2), opt_state, params)
    assert np.abs(updates["units"]["u"]).max() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_of_the_state_do_not_depend_on_what_else_is_in_the_chain(name):
    """A run that diverged may be resumed with clipping, or with another decay."""

    def names(**changed: float) -> list[str]:
        config = dataclasses.replace(CONFIG, name=name, **changed)
        return list(tensors.named(jax.eval_shape(optimizer.make(config, small.MODEL).init, tree(0))))

    want = names()
    assert all(part in {name, "schedule"} for part in (path.split(".")[0] for path in want))
    for changed in ({"grad_clip": 1.0}, {"wd_lam": 0.1}, {"grad_clip": 1.0, "wd_lam": 0.1}):
        assert names(**changed) == want
