"""Muon (Jordan et al., 2024): a matrix moves by its momentum made orthogonal; all else moves as by AdamW.

A matrix is what the mathematics of a unit multiplies by: queries, keys, values and gates are four, and each
head has its own. An update has the root mean square of AdamW's, about 0.2 (Liu et al., 2025), and so takes
its learning rates and weight decay.

On a mesh, each of `devices` makes the matrices of some units orthogonal; for that they must be whole.
"""

import math

import jax
import optax
from jax.sharding import PartitionSpec
from optax.contrib import scale_by_muon

from tvq import sharding
from tvq.schema import Config, Model, Optimizer
from tvq.training import transforms
from tvq.training.optimizers import adamw

MOMENTUM, RMS = 0.95, 0.2


def direction(config: Optimizer, model: Model) -> optax.GradientTransformation:
    kernels = transforms.kernels(model)
    parts = {
        "kernels": transforms.named(
            momentum=optax.trace(MOMENTUM, nesterov=True),
            orthogonal=optax.stateless(lambda updates, _: orthogonal(updates, model)),
        ),
        "rest": adamw.direction(config, model),
    }
    return transforms.divided(parts, lambda path: "kernels" if path in kernels else "rest")


def orthogonal(tree: dict, model: Model) -> dict:
    """Stacks of kernels with each matrix made orthogonal, nearly, by Newton's and Schulz's iteration."""
    kernels = transforms.kernels(model)
    # Its own momentum would have the shape of matrices, not of parameters, and so another place on a mesh.
    tx = scale_by_muon(beta=0.0, nesterov=False)

    def one(path: tuple, x: jax.Array) -> jax.Array:
        dims = kernels[sharding.name(path)].dims
        x_NHXX = spread(by_head(x, dims, model.n_head))
        make = lambda x: tx.update(x, tx.init(x))[0]
        made = spread(jax.vmap(jax.vmap(make))(x_NHXX))
        return RMS * max(made.shape[2:]) ** 0.5 * from_heads(made, dims, x.shape)

    return jax.tree.map_with_path(one, tree)


def by_head(x: jax.Array, dims: tuple[str, ...], n_head: int) -> jax.Array:
    """A stack of kernels as matrices `[N,H,in,out]`; a dim of two letters, such as HK, is of all heads."""
    n_unit, n_in, n_out = x.shape
    if len(dims[1]) == 2:
        return x.reshape(n_unit, n_head, -1, n_out)
    if len(dims[2]) == 2:
        return x.reshape(n_unit, n_in, n_head, -1).swapaxes(1, 2)
    return x[:, None]


def from_heads(x_NHXX: jax.Array, dims: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `by_head`."""
    return (x_NHXX if len(dims[1]) == 2 else x_NHXX.swapaxes(1, 2)).reshape(shape)


def spread(x_NHXX: jax.Array) -> jax.Array:
    """Whole matrices, divided among `devices` by unit, and heads where they are."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_NHXX
    spec = PartitionSpec("devices", PartitionSpec.UNCONSTRAINED, None, None)
    return jax.lax.with_sharding_constraint(x_NHXX, spec)


def describe(config: Config, n_device: int) -> str:
    """What an update sends between devices."""
    if n_device == 1 or config.train.reproducible:
        return ""
    kernels = transforms.kernels(config.model).values()
    size = sum(math.prod(like.shape) * like.dtype.itemsize for like in kernels) / 2**20
    n_unit = max(like.shape[0] for like in kernels)
    return (
        f"{min(n_unit, n_device)} devices gather whole kernels of units, {size:,.1f} MiB in all, to make them"
        " orthogonal: every update sends these twice"
    )
