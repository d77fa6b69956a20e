"""Lion (Chen et al., 2023): the sign of a momentum, kept in bfloat16."""

import jax.numpy as jnp
import optax

from tvq.schema import Model, Optimizer


def direction(config: Optimizer, model: Model) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=0.95, b2=0.98, mu_dtype=jnp.bfloat16)
