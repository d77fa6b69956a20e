"""Everything that a run carries from step to step, and that a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tvq.config import Model
from tvq.model import transformer


class TrainState(NamedTuple):
    step: jax.Array  # int32, parameter updates done
    params: dict
    codebooks: dict
    opt_state: Any
    key: jax.Array  # never changes: random numbers are functions of it and the step


def init(config: Model, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update."""
    params_key, key = jax.random.split(jax.random.key(seed))
    params, codebooks = transformer.init(config, params_key)
    return TrainState(jnp.zeros((), jnp.int32), params, codebooks, optimizer.init(params), key)


def abstract(config: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without making one."""
    return jax.eval_shape(lambda: init(config, optimizer, 0))


def n_param(state: TrainState) -> int:
    """Parameters and codebook entries."""
    return sum(x.size for x in jax.tree.leaves((state.params, state.codebooks)))
