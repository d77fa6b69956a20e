"""AdamW (Loshchilov and Hutter, 2019), with the constants of the paper's recipes."""

import optax

from tvq.schema import Model, Optimizer


def direction(config: Optimizer, model: Model) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9)
