"""Everything that a run carries from step to step, and that a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import DictKey

from tvq import model as lm
from tvq import sharding
from tvq.schema import Config, Model
from tvq.training import transforms


class TrainState(NamedTuple):
    step: jax.Array  # int32, parameter updates done
    weights: lm.Weights
    opt_state: Any
    key: jax.Array  # never changes: random numbers are functions of it and the step


class Evaluated(NamedTuple):
    """What evaluation and sampling need: a TrainState without what only training uses."""

    weights: lm.Weights


def init(
    config: Model, tx: optax.GradientTransformation, seed: int, weights: lm.Weights | None = None
) -> TrainState:
    """The state before the first update, of new weights unless some are given."""
    params_key, key = jax.random.split(jax.random.key(seed))
    weights = lm.init(config, params_key) if weights is None else weights
    return TrainState(jnp.zeros((), jnp.int32), weights, tx.init(weights.params), key)


def abstract(config: Model, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without making one."""
    return jax.eval_shape(lambda: init(config, tx, 0))


def place(config: Config, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh."""
    like = abstract(config.model, tx)
    axes = sharding.axes(mesh, config.model, config.mesh.shard_params)
    return sharding.with_sharding(mesh, like, specs(like, config.model, axes))


def place_weights(config: Config, mesh: Mesh) -> Evaluated:
    """The same of the weights alone."""
    like = Evaluated(jax.eval_shape(lambda: lm.init(config.model, jax.random.key(0))))
    axes = sharding.axes(mesh, config.model, config.mesh.shard_params)
    return sharding.with_sharding(mesh, like, specs(like, config.model, axes))


def specs(like: Any, config: Model, axes: sharding.Axes) -> Any:
    """How each array of a state, or of weights, lies on the mesh: moments like their parameters."""
    declared = transforms.dims(config)

    def spec(path: tuple, x: jax.ShapeDtypeStruct) -> jax.sharding.PartitionSpec:
        # The path of a moment holds its parameter's names, with fields and indices of the optimizer between.
        names = [entry.key for entry in path if isinstance(entry, DictKey)]
        ends = ("/".join([path[0].name, *names][i:]) for i in range(len(names) + 1))
        dims = next((declared[end] for end in ends if end in declared), ())
        if len(dims) == x.ndim:
            dims = tuple("X" if size == 1 else dim for size, dim in zip(x.shape, dims, strict=True))
        else:  # means over rows or columns, or a placeholder
            wide = dims and x.ndim and x.shape[-1] == config.d_model
            dims = ("X",) * (x.ndim - 1) + ("D",) if wide else ()
        return sharding.spec(dims, axes)

    return jax.tree.map_with_path(spec, like)


def n_param(state: TrainState | Evaluated) -> int:
    """The number of parameters and other floating-point weights."""
    return sum(x.size for x in jax.tree.leaves(state.weights) if jnp.issubdtype(x.dtype, jnp.floating))
