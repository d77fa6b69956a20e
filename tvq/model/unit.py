"""The gated attention unit (paper section 3.4): over a call's tokens, and over one more while decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tvq import dims, sharding
from tvq.model import attention, flash, full, parts, recurrence, vq
from tvq.model.layers import dense, norm, rms_norm
from tvq.model.window import KEPT
from tvq.schema import Model


@jax.named_scope("position")
def position_keys(params: dict, sinusoid_BED: jax.Array, n_head: int) -> jax.Array:
    """The key `[B,H,E,K]` of each distance 0 .. M."""
    r_BEX = jnp.einsum("bed,dx->bex", sinusoid_BED, params["r"].astype(sinusoid_BED.dtype))
    B, E, _ = r_BEX.shape
    r_BEHK = r_BEX.reshape(B, E, n_head, -1)
    return r_BEHK.transpose(0, 2, 1, 3) * r_BEHK.shape[-1] ** -0.25


def split_heads(x_BTX: jax.Array, n_head: int) -> jax.Array:
    B, T, _ = x_BTX.shape
    return x_BTX.reshape(B, T, n_head, -1).transpose(0, 2, 1, 3)


@jax.named_scope("project")
def queries_and_keys(params: dict, xt_BTD: jax.Array, config: Model) -> tuple[jax.Array, jax.Array]:
    """Scaled queries and keys `[B,H,T,K]`, float32 at least, of a gated unit's normed input."""
    qk_DX = jnp.concatenate([params["q"], params["k"]], 1)
    qk_BTX = checkpoint_name(dense(xt_BTD, qk_DX), KEPT)
    qk_BHTK = rms_norm(split_heads(qk_BTX, qk_BTX.shape[-1] // config.d_k)) * config.d_k**-0.25
    q_BHTK, k_BHTK = jnp.split(qk_BHTK, 2, 1)
    return q_BHTK, k_BHTK


@jax.named_scope("project")
def values_and_gate(params: dict, xt_BTD: jax.Array, n_head: int) -> tuple[jax.Array, jax.Array]:
    """Values `[B,H,T,V]`, and the gate `[B,T,X]` with heads side by side, in the dtype of the input."""
    one = lambda name: jax.nn.silu(checkpoint_name(dense(xt_BTD, params[name]), KEPT))
    return split_heads(one("v"), n_head), one("g")


def biases(params: dict, config: Model) -> tuple[jax.Array, jax.Array]:
    """Content and position bias u, w `[H,K]`, scaled."""
    shape, scale = (-1, config.d_k), config.d_k**-0.25
    return params["u"].reshape(shape) * scale, params["w"].reshape(shape) * scale


def merge_heads(o_BHTV: jax.Array) -> jax.Array:
    B, H, T, V = o_BHTV.shape
    return o_BHTV.transpose(0, 2, 1, 3).reshape(B, T, H * V)


class Keys(NamedTuple):
    """What attention reads of the tokens of a call besides their values. Where z is used, k are codewords."""

    q_BHTK: jax.Array
    k_BHTK: jax.Array
    z_BHT: jax.Array
    c_HSK: jax.Array
    u_HK: jax.Array
    w_HK: jax.Array
    r_BHEK: jax.Array


def linear(
    keys: Keys, v_BHTV: jax.Array, state: attention.State, start_BX: jax.Array | None, config: Model
) -> tuple[jax.Array, attention.State]:
    return attention.attend(
        keys.q_BHTK,
        keys.k_BHTK,
        v_BHTV,
        keys.z_BHT,
        keys.c_HSK,
        keys.u_HK,
        keys.w_HK,
        keys.r_BHEK,
        state,
        block_len=config.block_len,
        n_parallel=config.n_parallel,
        agg_cache=config.agg_cache,
        grad_thru_cache=config.grad_thru_cache,
        start_BX=start_BX,
    )


def quadratic(
    keys: Keys, v_BHTV: jax.Array, state: attention.State, start_BX: jax.Array | None, config: Model
) -> tuple[jax.Array, attention.State]:
    inputs = (keys.q_BHTK, keys.k_BHTK, v_BHTV, keys.u_HK, keys.w_HK, keys.r_BHEK)
    if config.attention == "flash":
        return flash.attend(*inputs, block_len=config.block_len), state
    return full.attend(*inputs, block_len=config.block_len, start_BX=start_BX), state


def attend(
    keys: Keys,
    v_BHTV: jax.Array,
    state: attention.State,
    start_BX: jax.Array | None,
    config: Model,
    axes: sharding.Axes,
) -> tuple[jax.Array, attention.State]:
    """Output `[B,H,T,V]`, and the state after the tokens; this device may hold a part of each array."""
    whole = keys
    # Codes and codewords have no gradient, and what depends only on them is the same on all devices.
    with_gradient = {name: x for name, x in keys._asdict().items() if name not in ("z_BHT", "c_HSK")}
    keys = keys._replace(**parts.shared(with_gradient, axes))
    if not config.carries_state:
        return quadratic(keys, v_BHTV, state, start_BX, config)
    before = parts.with_neighbours(state, whole.z_BHT, whole.k_BHTK, axes)
    mine = before._replace(k_BHMK=parts.shared(before.k_BHMK, axes))
    if axes.T:
        mine = parts.carried_in(mine, keys.z_BHT, v_BHTV, start_BX, config.block_len, axes.T)
        # Attention also stops the gradient, but zeros would still be sent back to the parts before.
        mine = mine if config.grad_thru_cache else lax.stop_gradient(mine)
    o_BHTV, after = linear(keys, v_BHTV, mine, start_BX, config)
    if axes.V:  # computed so that JAX knows that they are the same on all
        newest_BHMK = attention.newest(before.k_BHMK, whole.k_BHTK, config.grad_thru_cache)
        after = after._replace(k_BHMK=newest_BHMK)
    return o_BHTV, parts.carried_out(after, axes.T) if axes.T else after


def gated_unit(
    params: dict,
    codebook: dict,
    x_BTD: jax.Array,
    mask_BT: jax.Array,
    sinusoid_BED: jax.Array,
    state: attention.State,
    config: Model,
    start_BX: jax.Array | None = None,
    probe: vq.Probe | None = None,
    axes: sharding.Axes = sharding.UNCUT,
) -> tuple[jax.Array, attention.State, dict]:
    """The unit's output `[B,T,D]` (no residual), its next state, and what the losses and codebook need.

    The last is `{"commit", "codebook": {"sum", "count"}, "metrics"}`: the mean over B and T of the masked
    squared error summed over heads, the statistics of the moving average, and means of key metrics. Those of
    a probe join the statistics as "probe". Documents are kept apart by start `[B,M+1+T]`, as for
    `attention.attend`.
    """
    dims.check(x_BTD=x_BTD, mask_BT=mask_BT, sinusoid_BED=sinusoid_BED, z_BHM=state.z_BHM)
    c_HSK = vq.codewords(codebook)
    xt_BTD = norm(x_BTD, params["norm"])
    if axes.H:
        xt_BTD = sharding.varying(xt_BTD, (axes.H,))
    q_BHTK, k_BHTK = queries_and_keys(params, xt_BTD, config)
    H = q_BHTK.shape[1]
    z_BHT = checkpoint_name(vq.nearest(lax.stop_gradient(k_BHTK), c_HSK), KEPT)
    kz_BHTK = vq.lookup(z_BHT, c_HSK)
    e2_BHT = vq.squared_error(k_BHTK, kz_BHTK)
    u_HK, w_HK = biases(params, config)
    attended_BHTK = vq.straight_through(k_BHTK, kz_BHTK) if config.carries_state else k_BHTK
    r_BHEK = checkpoint_name(position_keys(params, sinusoid_BED, H).astype(x_BTD.dtype), KEPT)
    keys = Keys(q_BHTK, attended_BHTK, z_BHT, c_HSK, u_HK, w_HK, r_BHEK)
    v_BHTV, gate_BTX = values_and_gate(params, parts.shared(xt_BTD, axes), H)
    o_BHTV, state = attend(keys, v_BHTV, state, start_BX, config, axes)
    with jax.named_scope("output"):
        y_BTD = dense(merge_heads(o_BHTV) * gate_BTX, params["out"])
    if axes.tensor:
        y_BTD = lax.psum(y_BTD, axes.tensor)
    codebook_stats = vq.statistics(k_BHTK, z_BHT, mask_BT, config.n_code)
    if probe is not None:
        codebook_stats["probe"] = probe.statistics(k_BHTK, mask_BT)
    stats = {
        "commit": jnp.mean(jnp.sum(e2_BHT, 1) * mask_BT.astype(e2_BHT.dtype)),
        "codebook": codebook_stats,
        "metrics": vq.key_metrics(k_BHTK, kz_BHTK, e2_BHT, config.block_len),
    }
    return y_BTD, state, stats


def gated_unit_next(
    params: dict,
    c_HSK: jax.Array,
    r_HEK: jax.Array,
    x_BTD: jax.Array,
    rings: recurrence.Rings,
    n: jax.Array,
    position: jax.Array,
    config: Model,
) -> tuple[jax.Array, recurrence.Rings]:
    """`gated_unit` number n for one more token (T = 1) while decoding, at a cost independent of context."""
    xt_BTD = norm(x_BTD, params["norm"])
    q_BHTK, k_BHTK = queries_and_keys(params, xt_BTD, config)
    v_BHTV, gate_BTX = values_and_gate(params, xt_BTD, config.n_head)
    z_BHT = vq.nearest(k_BHTK, c_HSK)
    u_HK, w_HK = biases(params, config)
    o_BHV, rings = recurrence.attend_next(
        q_BHTK[:, :, 0],
        v_BHTV[:, :, 0],
        z_BHT[:, :, 0],
        c_HSK,
        u_HK,
        w_HK,
        r_HEK,
        rings,
        n,
        position,
        agg_cache=config.agg_cache,
    )
    return dense(merge_heads(o_BHV[:, :, None]) * gate_BTX, params["out"]), rings
