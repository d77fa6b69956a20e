"""Adafactor (Shazeer and Stern, 2018), each unit by itself, as `optax.adafactor` does it."""

import optax

from tvq.schema import Model, Optimizer
from tvq.training import transforms


def direction(config: Optimizer, model: Model) -> optax.GradientTransformation:
    tx = transforms.named(
        factored=optax.scale_by_factored_rms(),
        clip=optax.clip_by_block_rms(1.0),
        scale=optax.scale_by_param_block_rms(),
    )
    return transforms.each_unit(tx, model)
