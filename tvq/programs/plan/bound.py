"""What a train step needs at least, from its shapes alone: this decides what a sweep compiles first."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tvq import chips, sharding
from tvq import model as lm
from tvq.programs.plan import step
from tvq.schema import Config, Model
from tvq.training import optimizer, state


class Bound(NamedTuple):
    """For one device and one call of the step."""

    chip: chips.Chip
    bytes_needed: float
    step_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step may fit in memory."""
        return self.bytes_needed <= self.chip.memory


def bound(config: Config, mesh: Mesh) -> Bound:
    """Memory of the state, its gradient and what is kept for it; time of products and of messages."""
    chip = chips.chip(mesh.devices.flat[0].device_kind)
    assert chip is not None, "every target has its chip"
    t, m, sizes = config.train, config.model, mesh.shape
    axes = sharding.axes(mesh, m, config.mesh.shard_params)
    held = {"n_head": m.n_head // sizes["tensor"]} if axes.H else {"d_v": m.d_v // sizes["tensor"]}
    part = dataclasses.replace(m, **held)
    carried = state.place(config, optimizer.make(config.optimizer, config.model), mesh)
    empty = jax.eval_shape(lambda: lm.start(m, t.global_batch_size))
    attention = sharding.with_sharding(mesh, empty, lm.state_specs(m, axes))
    n_sequence = t.global_batch_size / sharding.n_data(mesh)
    n_token = n_sequence * t.update_len / sizes["sequence"]
    at_once = n_token / t.accumulate * (t.segment_len or t.update_len) / t.update_len
    gradient = step.device_bytes(carried.weights.params)
    sent = gradient_messages(config, mesh, gradient) + unit_messages(part, mesh, n_sequence, n_token)
    peak = chip.bfloat16 if m.dtype == "bfloat16" else chip.float32
    seconds = lm.train_flops(part, t.update_len) * n_token / peak + sent / chip.link
    return Bound(
        chip,
        bytes_needed=step.device_bytes((carried, attention)) + gradient + lm.kept_bytes(part) * at_once,
        step_seconds=t.sequence_len // t.update_len * seconds,
    )


def gradient_messages(config: Config, mesh: Mesh, gradient: int) -> float:
    """Bytes that a device sends on a ring in an update, for parameters and gradients."""
    if not config.mesh.shard_params:
        return 2 * gradient * share(mesh, "replica", "devices", "sequence")
    # Gathered for both passes, and scattered.
    narrow = jnp.dtype(config.model.dtype).itemsize / jnp.dtype(config.model.param_dtype).itemsize
    whole = gradient * mesh.shape["devices"] * config.train.accumulate
    over = 2 * gradient * share(mesh, "replica", "sequence")
    return (2 * narrow + 1) * whole * share(mesh, "devices") + over


def unit_messages(model: Model, mesh: Mesh, n_sequence: float, n_token: float) -> float:
    """Bytes that a device sends on a ring in an update, for the units."""
    return lm.exchanged_bytes(
        model, n_sequence, n_token, along=share(mesh, "sequence"), across=share(mesh, "tensor")
    )


def share(mesh: Mesh, *axes: str) -> float:
    """The part of an array that a device along these axes sends on each of its rings."""
    grid = np.arange(mesh.size).reshape(mesh.devices.shape)
    group = grid[tuple(slice(None) if axis in axes else 0 for axis in sharding.AXES)].ravel()
    return (1 - 1 / len(group)) / step.n_ring(mesh, tuple(group.tolist()))
