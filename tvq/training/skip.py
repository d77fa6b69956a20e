"""Updates that are left out, because their loss or gradient is far above those of the updates before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tvq.schema import Optimizer

STATE = "skip"  # in the state of the optimizer


class Recent(NamedTuple):
    """Of the last W updates, skipped or not: a level that stays is no longer far after a while."""

    loss_W: jax.Array
    norm_W: jax.Array
    n_update: jax.Array  # int32
    n_skipped: jax.Array  # int32


def window(config: Optimizer) -> optax.GradientTransformation:
    """Changes no gradient: its place in a chain keeps `Recent` in the state."""

    def init(params: Any) -> Recent:
        values, number = jnp.zeros(config.skip_window), jnp.zeros((), jnp.int32)
        return Recent(values, values, number, number)

    return optax.GradientTransformation(init, lambda updates, recent, params=None: (updates, recent))


def judge(recent: Recent, loss: jax.Array, norm: jax.Array, sigma: float) -> tuple[jax.Array, Recent]:
    """Whether to skip an update, and the window with it. None is skipped until the window is full."""
    size = len(recent.loss_W)
    far = lambda x, before_W: x > before_W.mean() + sigma * before_W.std()
    is_far = far(loss, recent.loss_W) | far(norm, recent.norm_W)
    is_skipped = is_far & (recent.n_update >= size)
    i = recent.n_update % size
    after = Recent(
        recent.loss_W.at[i].set(loss),
        recent.norm_W.at[i].set(norm),
        recent.n_update + 1,
        recent.n_skipped + is_skipped,
    )
    return is_skipped, after


def held_back(
    config: Optimizer, old: tuple[Any, dict], new: tuple[Any, dict], metrics: dict
) -> tuple[Any, dict]:
    """Weights and state of the optimizer after an update, or before it; the schedule continues either way."""
    loss = metrics["loss_lm_per_token_unscaled"] / jnp.maximum(metrics["loss_mask_per_token"], 1e-9)
    is_skipped, recent = judge(old[1][STATE], loss, metrics["grad_norm"], config.skip_sigma)
    weights, opt_state = jax.tree.map(lambda a, b: jnp.where(is_skipped, a, b), old, new)
    return weights, opt_state | {STATE: recent, "schedule": new[1]["schedule"]}
