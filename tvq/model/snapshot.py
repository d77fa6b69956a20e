"""The health of the codebooks, unit by unit and head by head. What the numbers mean: `tvq.run.health`."""

import jax
import jax.numpy as jnp

from tvq.model import vq
from tvq.model.parameters import Weights

DEAD, OVERUSED = 0.01, 10.0
# Their averages are in a row of metrics, prefixed `c_`; that of relative_error is there already.
IN_ROWS = ("perplexity", "dead", "overused", "churn", "norm_drift")


def _use(codebook: dict, initial: jax.Array | float) -> dict[str, jax.Array]:
    """What one unit's moving averages show by themselves.

    `initial` is what remains of the count of one that every code starts with, c_gamma^step: for hundreds of
    updates it would hide that a code was never chosen.
    """
    count_HS = jnp.maximum(codebook["count"] - initial, 0.0)
    p_HS = count_HS / jnp.maximum(jnp.sum(count_HS, -1, keepdims=True), 1e-30)
    usage_HS = p_HS * p_HS.shape[-1]
    entropy_H = -jnp.sum(jnp.where(p_HS > 0, p_HS * jnp.log(p_HS), 0.0), -1)
    return {
        "usage": usage_HS,
        "perplexity": jnp.exp(entropy_H),
        "dead": jnp.mean(usage_HS < DEAD, -1),
        "overused": jnp.mean(usage_HS > OVERUSED, -1),
    }


def _unit_snapshot(
    codebook: dict, probe: dict, before_HSK: jax.Array, initial: jax.Array | float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The health of one unit's codebook, and its codewords for the next snapshot."""
    c_HSK, k_BHTK = vq.codewords(codebook), probe["key"][None]
    z_BHT = vq.nearest(k_BHTK, c_HSK)
    error_HX = jnp.sqrt(vq.squared_error(k_BHTK, vq.lookup(z_BHT, c_HSK)))[0]
    size_HX = jnp.linalg.norm(probe["key"], axis=-1)
    weight_X = probe["mask"] / jnp.maximum(probe["mask"].sum(), 1)
    mean = lambda x_HX: jnp.sum(x_HX * weight_X[None], -1)
    used = _use(codebook, initial)
    p_HS = used["usage"] / c_HSK.shape[1]
    norm = lambda c_HSK: jnp.sum(p_HS * jnp.linalg.norm(c_HSK, axis=-1), -1)
    key_H = jnp.maximum(mean(size_HX), 1e-30)
    health = used | {
        "relative_error": mean(error_HX) / key_H,
        "churn": mean(z_BHT[0] != vq.nearest(k_BHTK, before_HSK)[0]),
        "norm": norm(c_HSK) / key_H,
        "norm_drift": norm(c_HSK) / norm(before_HSK) - 1.0,
    }
    return health, c_HSK


def use(weights: Weights, initial: jax.Array | float) -> dict[str, jax.Array]:
    """The part of a snapshot that needs only the weights, no probe."""
    return jax.vmap(_use, in_axes=(0, None))(weights.extra["codebooks"], initial)


def remember(weights: Weights) -> jax.Array:
    """What the next snapshot compares with: the codewords `[N,H,S,K]`."""
    return jax.vmap(vq.codewords)(weights.extra["codebooks"])


def snapshot(
    weights: Weights, probe: dict, before_NHSK: jax.Array, initial: jax.Array | float
) -> tuple[dict, dict, jax.Array]:
    """The health of all units, its averages for a row of metrics, and the codewords for the next snapshot."""
    each_unit = jax.vmap(_unit_snapshot, in_axes=(0, 0, 0, None))
    health, c_NHSK = each_unit(weights.extra["codebooks"], probe, before_NHSK, initial)
    return health, {f"c_{name}": health[name].mean() for name in IN_ROWS}, c_NHSK
