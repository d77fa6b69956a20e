"""Every optimizer of the registry: on any mesh, resumed bitwise, and what each is about."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model import small
from tests.model.small import close
from tests.training import test_train_step as steps
from tvq import schema, sharding
from tvq.model import parameters
from tvq.run.checkpoint import Checkpoints
from tvq.schema import OPTIMIZERS
from tvq.training import optimizer, state, train_step
from tvq.training.optimizers import muon

# Wide enough for Adafactor to factor its kernels.
MODEL = dataclasses.replace(
    small.MODEL, d_model=128, d_v=64, pe_abs=True, dtype="float64", param_dtype="float64"
)
ONE_HEAD = dataclasses.replace(MODEL, n_head=1, d_v=128, e_tie=True)
CONFIG = schema.Optimizer(
    lr_max=0.01, lr_rest=0.002, n_warmup_step=0, n_max_step=50, grad_clip=1.0, wd_lam=0.01
)
SHAPES: dict[str, dict[str, Any]] = {
    "one": {"devices": 1},
    "devices": {"devices": 8},
    "shard_params": {"devices": 4, "shard_params": True},
    "all": {"devices": 2, "sequence": 2, "tensor": 2, "shard_params": True},
}


@functools.cache
def weights(model: schema.Model) -> parameters.Weights:
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(lambda: parameters.init(model, jax.random.key(0)))())


@functools.cache
def program(name: str, model: schema.Model, shape: str) -> tuple[state.TrainState, Any]:
    """A first state on the mesh, and an update by made-up gradients."""
    c = schema.Config(
        model=model, optimizer=dataclasses.replace(CONFIG, name=name), mesh=schema.Mesh(**SHAPES[shape])
    )
    n_device = np.prod([getattr(c.mesh, axis) for axis in sharding.AXES])
    mesh = sharding.make(c.mesh, jax.devices()[:n_device])
    tx = optimizer.make(c.optimizer, model)
    shardings = jax.tree.map(lambda x: x.sharding, state.place(c, tx, mesh))
    given = jax.device_put(weights(model), shardings.weights)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(given.params)
    now = state.TrainState(jnp.int32(0), given, opt_state, jax.random.key(0))

    def update(now: state.TrainState) -> state.TrainState:
        number = jnp.float64(now.step + 1)
        params = now.weights.params
        grads = jax.tree.map(lambda x: jnp.sin(number * jnp.arange(x.size)).reshape(x.shape), params)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            updates, opt_state = tx.update(grads, now.opt_state, params)
        after = now.weights._replace(params=optax.apply_updates(params, updates))
        return state.TrainState(now.step + 1, after, opt_state, now.key)

    return jax.device_put(now, shardings), jax.jit(update, out_shardings=shardings)


@functools.cache
def updated(name: str, model: schema.Model, shape: str) -> state.TrainState:
    """The state after two updates."""
    now, update = program(name, model, shape)
    return jax.device_get(update(update(now))._replace(key=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "shape"),
    [
        *((name, MODEL, shape) for name in OPTIMIZERS for shape in ("shard_params", "all")),
        ("muon", MODEL, "devices"),
        ("muon", ONE_HEAD, "all"),
    ],
)
def test_every_mesh_updates_as_one_device_does(name, model, shape):
    with jax.enable_x64(True):
        close(updated(name, model, shape), updated(name, model, "one"), 1e-9)
        moments = jax.tree.leaves(program(name, model, shape)[0].opt_state)
    if SHAPES[shape].get("shard_params"):
        cut = [not x.sharding.is_fully_replicated for x in moments if 128 in x.shape]
        assert sum(cut) >= (6 if name == "adafactor" else 7), "kernels and tables"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_resumes_bitwise(name, tmp_path):
    """From a checkpoint, on parameters that are cut."""
    with jax.enable_x64(True):
        first, update = program(name, MODEL, "all")
        now = update(first)
        with Checkpoints(tmp_path, keep=1, keep_every=0) as checkpoints:
            checkpoints.save(1, now, {}, {})
            restored = checkpoints.restore(first, print)
        assert_same(update(restored.state), update(now))


def assert_same(got: state.TrainState, want: state.TrainState) -> None:
    pairs = zip(*(jax.tree.leaves_with_path(x._replace(key=0)) for x in (got, want)), strict=True)
    for (path, a), (_, b) in pairs:
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_run_with_muon_that_skips_resumes_bitwise(tmp_path):
    c = dataclasses.replace(
        steps.RUN,
        optimizer=dataclasses.replace(steps.RUN.optimizer, name="muon", skip_sigma=0.5, skip_window=2),
        mesh=schema.Mesh(devices=2, shard_params=True),
    )
    mesh = sharding.make(c.mesh, jax.devices()[:2])
    tx = optimizer.make(c.optimizer, c.model)
    placed = state.place(c, tx, mesh)
    now = jax.device_put(steps.initial(c, tx), jax.tree.map(lambda x: x.sharding, placed))
    batches = [sharding.global_batch(mesh, steps.host_batch(number), steps.B) for number in range(2)]
    step = train_step.make(c, mesh, tx).lower(now, batches[0]).compile()
    now, _ = step(now, batches[0])
    with Checkpoints(tmp_path, keep=1, keep_every=0) as checkpoints:
        checkpoints.save(2, now, {}, {})
        restored = checkpoints.restore(placed, print)
    want, got = (step(one, batches[1])[0] for one in (now, restored.state))
    assert_same(got, want)


def test_a_name_is_a_module():
    assert set(OPTIMIZERS) == {path.stem for path in Path(muon.__file__).parent.glob("[!_]*.py")}
    assert set(OPTIMIZERS) == {"adamw", "lion", "adafactor", "muon"}


def first_update(**changed: Any) -> dict:
    """Of random parameters, by a gradient that equals them."""
    tx = optimizer.make(dataclasses.replace(CONFIG, grad_clip=0.0, **changed), small.MODEL)
    params = small.parameters(small.MODEL).params
    return jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])(params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_may_be_times_the_rate_which_may_be_two(name):
    params = small.parameters(small.MODEL).params
    updates = functools.partial(first_update, name=name)
    one, two = updates(wd_lam=0.0, lr_rest=0.0), updates(wd_lam=0.0)
    decayed = updates(wd_lam=0.5, wd_times_rate=True)
    close(two["units"]["q"], one["units"]["q"], 1e-6)
    for path in (("embed", "table"), ("units", "u"), ("out", "bias")):
        close(dig(two, *path), 0.2 * dig(one, *path), 1e-6)
    for path, rate in ((("units", "q"), 0.01), (("embed", "table"), 0.002), (("units", "u"), 0.0)):
        taken = np.asarray(dig(decayed, *path) - dig(two, *path))
        np.testing.assert_allclose(taken, -0.5 * rate * dig(params, *path), rtol=1e-3, atol=1e-6)


def dig(tree: dict, *path: str) -> jax.Array:
    return functools.reduce(lambda part, name: part[name], path, tree)


def test_muon_makes_each_matrix_of_each_head_orthogonal():
    muons, others = (first_update(name=name, wd_lam=0.0) for name in ("muon", "adamw"))
    updates = muons["units"]
    D, H, K, V = 16, 2, 8, 8
    as_matrices = {
        **{name: (updates[name].reshape(2, D, H, width), "ndhk->nhdk") for name, width in
           {"q": K, "k": K, "r": K, "v": V, "g": V}.items()},
        "out": (updates["out"].reshape(2, H, V, D), "nhkd->nhkd"),
    }  # fmt: skip
    for name, (x, order) in as_matrices.items():
        values = np.linalg.svd(jnp.einsum(order, x), compute_uv=False) / (0.01 * muon.RMS * D**0.5)
        assert values.shape == (2, H, 8), name
        assert (values > 0.3).all(), (name, values)
        assert (values < 1.3).all(), (name, values)
    # What is no kernel moves as by AdamW.
    rest = lambda tree: [tree["embed"], tree["out"], tree["units"]["u"], tree["units"]["norm"]]
    close(rest(muons), rest(others), 1e-6)


def test_the_heads_of_a_kernel_are_matrices_of_their_own():
    """What one head's gradient is does not show in the other's update."""
    units = small.parameters(small.MODEL).params["units"]
    kernels = {"units": {name: units[name] for name in ("q", "v", "out")}}
    other = {name: x.at[..., : x.shape[-1] // 2].add(1.0) for name, x in kernels["units"].items()}
    other["out"] = kernels["units"]["out"].at[:, :8].add(1.0)
    make = jax.jit(lambda tree: muon.orthogonal(tree, small.MODEL)["units"])
    want, got = make(kernels), make({"units": other})
    for name in ("q", "v"):
        close(got[name][..., 8:], want[name][..., 8:], 1e-6)
    close(got["out"][:, 8:], want["out"][:, 8:], 1e-6)
    assert np.abs(got["q"] - want["q"])[..., :8].max() > 0.1


def test_muon_says_what_it_gathers():
    c = schema.Config(model=small.MODEL, optimizer=schema.Optimizer(name="muon"))
    size = 4 * 2 * 16 * 6 * 16 / 2**20  # two units of six kernels
    assert f"2 devices gather whole kernels of units, {size:,.1f} MiB" in muon.describe(c, 8)
    assert muon.describe(c, 1) == ""
    fixed = dataclasses.replace(c, train=dataclasses.replace(c.train, reproducible=True))
    assert muon.describe(fixed, 8) == ""
