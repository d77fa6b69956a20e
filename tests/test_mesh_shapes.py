"""Every shape of the mesh computes what one device does: values, gradients, statistics and the next state."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.model import small
from tests.model.small import close
from tvq import schema, sharding
from tvq.training import state, train_step
from tvq.training.state import TrainState

# In a part of 4 tokens the memory of 6 comes from two neighbours.
B, T, U = 4, 32, 16
MODEL = dataclasses.replace(
    small.MODEL, p_dropemb=0.1, p_dropsin=0.2, p_dropres=0.3, p_droplyr=0.3, c_beta=0.01, pe_abs=True,
    attend_across_documents=False, dtype="float64", param_dtype="float64",
)  # fmt: skip
ONE_HEAD = dataclasses.replace(MODEL, n_head=1, e_tie=True, n_parallel=1)
BLOCK_BY_BLOCK = dataclasses.replace(ONE_HEAD, grad_thru_cache=False, attend_across_documents=True)
SGD = optax.sgd(0.5)  # parameters then tell the gradients


def run_of(model: schema.Model, shape: dict[str, Any], **train: int) -> schema.Config:
    return schema.Config(
        model=model,
        train=schema.Train(steps=2, global_batch_size=B, sequence_len=T, update_len=U, **train),
        mesh=schema.Mesh(**{"devices": 1} | shape),
    )


def host_batch() -> dict[str, np.ndarray]:
    """Documents of all lengths (1 is the end id); one sequence is padded."""
    rng = np.random.default_rng(0)
    text = rng.choice([1, *range(3, 11)], (B, T + 1), p=[0.1] + [0.1125] * 8).astype(np.int32)
    mask = np.ones((B, T), np.int32)
    mask[1, 19:] = 0
    return {"inputs": text[:, :-1], "targets": text[:, 1:], "loss_mask": mask}


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial(model: schema.Model, tx: optax.GradientTransformation) -> TrainState:
    return state.init(model, tx, 0)


def on(run: schema.Config) -> jax.sharding.Mesh:
    sizes = dataclasses.asdict(run.mesh)
    n_device = int(np.prod([sizes[axis] for axis in sharding.AXES]))
    mesh = sharding.make(run.mesh, jax.devices()[:n_device])
    sharding.check(mesh, run)
    return mesh


def placed(run: schema.Config, tx: optax.GradientTransformation) -> TrainState:
    shardings = jax.tree.map(lambda x: x.sharding, state.place(run, tx, on(run)))
    return jax.device_put(initial(run.model, tx), shardings)


@functools.cache
def one_call(run: schema.Config) -> tuple[TrainState, dict]:
    """State and metrics of two updates: the second finds what the first has carried out."""
    with jax.enable_x64(True):
        now = placed(run, SGD)
        batch = sharding.global_batch(on(run), host_batch(), B)
        step = train_step.make(run, on(run), SGD).lower(now, batch).compile()
        now, metrics = step(now, batch)
        assert jax.tree.map(lambda x: x.sharding.spec, now.weights) == jax.tree.map(
            lambda x: x.sharding.spec, placed(run, SGD).weights
        )
        return jax.device_get((now._replace(key=0), metrics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape", "train"),
    [
        (MODEL, {"replica": 2, "devices": 2, "shard_params": True}, {}),
        (MODEL, {"devices": 2, "shard_params": True}, {"accumulate": 2}),
        (MODEL, {"tensor": 2}, {}),
        (MODEL, {"sequence": 4}, {}),
        (MODEL, {"devices": 2, "sequence": 2, "tensor": 2, "shard_params": True}, {"segment_len": 8}),
        (ONE_HEAD, {"replica": 2, "sequence": 2, "tensor": 2}, {"accumulate": 2, "segment_len": 8}),
        (BLOCK_BY_BLOCK, {"sequence": 2, "tensor": 4}, {}),
    ],
)
def test_a_shape_computes_what_one_device_does(model, shape, train):
    want, want_metrics = one_call(run_of(model, {}))
    got, metrics = one_call(run_of(model, shape, **train))
    close(got, want, 1e-9)
    assert set(metrics) == set(want_metrics)
    close(metrics, want_metrics, 1e-9)
