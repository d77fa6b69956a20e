"""AdEMAMix (Pagliardini et al., 2024): Adam with a second, slow average of the gradient."""

import optax

from tvq.config import Model, Optimizer


def direction(config: Optimizer, model: Model) -> optax.GradientTransformation:
    return optax.contrib.scale_by_ademamix(b1=0.9, b2=0.98, b3=0.999, alpha=4.0, eps=1e-9)
