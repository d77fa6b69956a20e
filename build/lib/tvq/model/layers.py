"""Norm, positions, dropout, and the gated attention unit (paper section 3.4; SPEC.md "Layers")."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tvq import dims
from tvq.config import Model
from tvq.model import attention, full, recurrence, vq
from tvq.model.attention import KEPT

NORM_EPS = 1e-6


class Draws(NamedTuple):
    """Where the random numbers of one update come from; they never depend on process, device or mesh."""

    ephemeral: jax.Array  # key, new each update
    timeless: jax.Array  # key, new each call of the step
    sequence_B: jax.Array  # index of each sequence in the global batch


# One number for each thing drawn, folded into the key.
EMBEDDING, RESIDUAL, SINUSOID, LAYER = range(4)


def sequence_keys(key: jax.Array, what: int, unit: jax.Array | int, sequence_B: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(key, what), unit)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(sequence_B)


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the others; `keys` cover the leading dims of x."""
    if rate == 0.0:
        return x
    draw = lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[keys.ndim :])
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return jnp.where(draw(keys), x / (1.0 - rate), jnp.zeros((), x.dtype))


def token_dropout(
    x_BTD: jax.Array, rate: float, keys_B: jax.Array, block_len: int, position: jax.Array | int = 0
) -> jax.Array:
    """Dropout with a draw of its own for each sequence and block; `position` is that of the first token."""
    if rate == 0.0:
        return x_BTD
    B, T, D = x_BTD.shape
    block_R = position // block_len + jnp.arange(T // block_len)
    keys_BR = jax.vmap(lambda key: jax.vmap(lambda r: jax.random.fold_in(key, r))(block_R))(keys_B)
    return dropout(x_BTD.reshape(B, -1, block_len, D), rate, keys_BR).reshape(B, T, D)


def rms_norm(x: jax.Array) -> jax.Array:
    """x over its root mean square along the last dim, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(NORM_EPS + jnp.mean(x**2, -1, keepdims=True))


def norm(x_BTD: jax.Array, params: dict) -> jax.Array:
    """RMS norm with gain and bias, in the dtype of x."""
    y_BTD = rms_norm(x_BTD) * params["gain"][None, None] + params["bias"][None, None]
    return y_BTD.astype(x_BTD.dtype)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel in the dtype of x."""
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype))


def sinusoid(position: jax.Array, width: int, pe_lam: float, dtype: jnp.dtype) -> jax.Array:
    """Sines, then cosines, of each position at width/2 wavelengths: `[..., width]`."""
    exponent = jnp.arange(0, width, 2, dtype=dtype) / width
    angle = jnp.multiply.outer(position.astype(dtype), pe_lam**-exponent)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def position_keys(params: dict, sinusoid_BED: jax.Array, n_head: int) -> jax.Array:
    """The key `[B,H,E,K]` of each distance 0 .. M."""
    r_BEX = jnp.einsum("bed,dx->bex", sinusoid_BED, params["r"].astype(sinusoid_BED.dtype))
    B, E, _ = r_BEX.shape
    r_BEHK = r_BEX.reshape(B, E, n_head, -1)
    return r_BEHK.transpose(0, 2, 1, 3) * r_BEHK.shape[-1] ** -0.25


class Projected(NamedTuple):
    q_BHTK: jax.Array
    k_BHTK: jax.Array
    v_BHTV: jax.Array
    gate_BTX: jax.Array  # heads concatenated


def project(params: dict, x_BTD: jax.Array, config: Model) -> Projected:
    """Scaled queries and keys (float32 at least), values and gates (dtype of x) of a gated unit."""
    B, T, _ = x_BTD.shape
    H, K, V = config.n_head, config.d_k, config.d_v
    heads = lambda x: x.reshape(B, T, H, -1).transpose(0, 2, 1, 3)
    xt_BTD = norm(x_BTD, params["norm"])
    # One parameter, three products: splitting the weights is cheaper than splitting the result.
    w_k, w_v, w_g = jnp.split(params["kvg"], [H * K, H * (K + V)], axis=1)
    product = lambda w: checkpoint_name(dense(xt_BTD, w), KEPT)
    q_BHTK = rms_norm(heads(product(params["q"]))) * K**-0.25
    k_BHTK = rms_norm(heads(product(w_k))) * K**-0.25
    v_BHTV = heads(jax.nn.silu(product(w_v)))
    return Projected(q_BHTK, k_BHTK, v_BHTV, jax.nn.silu(product(w_g)))


def biases(params: dict, config: Model) -> tuple[jax.Array, jax.Array]:
    """Content and position bias u, w `[H,K]`, scaled."""
    shape, scale = (config.n_head, config.d_k), config.d_k**-0.25
    return params["u"].reshape(shape) * scale, params["w"].reshape(shape) * scale


def merge_heads(o_BHTV: jax.Array) -> jax.Array:
    B, H, T, V = o_BHTV.shape
    return o_BHTV.transpose(0, 2, 1, 3).reshape(B, T, H * V)


def gated_unit(
    params: dict,
    codebook: dict,
    x_BTD: jax.Array,
    mask_BT: jax.Array,
    sinusoid_BED: jax.Array,
    state: attention.State,
    config: Model,
    start_BX: jax.Array | None = None,
) -> tuple[jax.Array, attention.State, dict]:
    """The unit's output `[B,T,D]` (no residual), its next state, and what the losses and codebook need.

    The last is `{"commit", "codebook": {"sum", "count"}, "metrics"}`: the mean over B and T of the masked
    squared error summed over heads, the statistics of the moving average, and means of key metrics.
    Documents are kept apart by start `[B,M+1+T]`, as for `attention.attend`.
    """
    dims.check(x_BTD=x_BTD, mask_BT=mask_BT, sinusoid_BED=sinusoid_BED, z_BHM=state.z_BHM)
    c_HSK = vq.codewords(codebook)
    q_BHTK, k_BHTK, v_BHTV, gate_BTX = project(params, x_BTD, config)
    z_BHT = checkpoint_name(vq.nearest(lax.stop_gradient(k_BHTK), c_HSK), KEPT)
    kz_BHTK = vq.lookup(z_BHT, c_HSK)
    e2_BHT = vq.squared_error(k_BHTK, kz_BHTK)
    u_HK, w_HK = biases(params, config)
    r_BHEK = position_keys(params, sinusoid_BED, config.n_head)

    if config.attention == "full":
        start_BT = None if start_BX is None else start_BX[:, -x_BTD.shape[1] :]
        o_BHTV = full.attend(
            q_BHTK, k_BHTK, v_BHTV, u_HK, w_HK, r_BHEK, block_len=config.block_len, start_BT=start_BT
        )
    else:
        o_BHTV, state = attention.attend(
            q_BHTK,
            vq.straight_through(k_BHTK, kz_BHTK),
            v_BHTV,
            z_BHT,
            c_HSK,
            u_HK,
            w_HK,
            r_BHEK,
            state,
            block_len=config.block_len,
            n_parallel=config.n_parallel,
            agg_cache=config.agg_cache,
            grad_thru_cache=config.grad_thru_cache,
            start_BX=start_BX,
        )
    y_BTD = dense(merge_heads(o_BHTV) * gate_BTX, params["out"])
    stats = {
        "commit": jnp.mean(jnp.sum(e2_BHT, 1) * mask_BT.astype(e2_BHT.dtype)),
        "codebook": vq.statistics(k_BHTK, z_BHT, mask_BT, config.n_code),
        "metrics": vq.key_metrics(k_BHTK, kz_BHTK, e2_BHT, config.block_len),
    }
    return y_BTD, state, stats


def gated_unit_next(
    params: dict,
    c_HSK: jax.Array,
    r_HEK: jax.Array,
    x_BTD: jax.Array,
    ring: recurrence.Ring,
    position: jax.Array,
    config: Model,
) -> tuple[jax.Array, recurrence.Ring]:
    """`gated_unit` for one more token (T = 1) while decoding, in work and memory independent of context."""
    q_BHTK, k_BHTK, v_BHTV, gate_BTX = project(params, x_BTD, config)
    z_BHT = vq.nearest(k_BHTK, c_HSK)
    u_HK, w_HK = biases(params, config)
    o_BHV, ring = recurrence.attend_next(
        q_BHTK[:, :, 0],
        v_BHTV[:, :, 0],
        z_BHT[:, :, 0],
        c_HSK,
        u_HK,
        w_HK,
        r_HEK,
        ring,
        position,
        agg_cache=config.agg_cache,
    )
    return dense(merge_heads(o_BHV[:, :, None]) * gate_BTX, params["out"]), ring
