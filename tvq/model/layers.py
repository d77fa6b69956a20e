"""Norm, positions, dropout, and the gated attention unit (paper section 3.4; SPEC.md "Layers")."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tvq import dims, mesh
from tvq.config import Model
from tvq.model import attention, full, parts, recurrence, vq
from tvq.model.attention import KEPT

NORM_EPS = 1e-6
KERNELS = ("q", "k", "v", "g", "out")  # of a gated unit: `dense` uses them, in the dtype of activations


class Draws(NamedTuple):
    """Where the random numbers of one update come from; they never depend on process, device or mesh."""

    ephemeral: jax.Array  # key, new each update
    timeless: jax.Array  # key, new each call of the step
    sequence_B: jax.Array  # index of each sequence in the global batch
    probe_X2: jax.Array | None = None  # sequence and position of the tokens whose keys are looked at


# One number for each thing drawn, folded into the key.
EMBEDDING, RESIDUAL, SINUSOID, LAYER, PROBE = range(5)
N_PROBE = 64


def draw_probe(ephemeral: jax.Array, n_sequence: int, n_token: int) -> jax.Array:
    """The sequence and token `[X,2]` of N_PROBE tokens of an update: one from each equal stretch of it."""
    total = n_sequence * n_token
    n_probe = min(N_PROBE, total)
    edges = jnp.asarray([total * i // n_probe for i in range(n_probe + 1)], jnp.int32)
    key = jax.random.fold_in(ephemeral, PROBE)
    index_X = jax.random.randint(key, (n_probe,), edges[:-1], edges[1:])
    return jnp.stack([index_X // n_token, index_X % n_token], -1)


def local_probe(draws: Draws, position: jax.Array, n_token: int) -> vq.Probe | None:
    """Where the probe lies in the sequences of this device, read from `position` on."""
    if draws.probe_X2 is None:
        return None
    same_XB = draws.probe_X2[:, :1] == draws.sequence_B[None]
    token_X = draws.probe_X2[:, 1] - position
    here_X = same_XB.any(1) & (token_X >= 0) & (token_X < n_token)
    return vq.Probe(same_XB.argmax(1), jnp.clip(token_X, 0, n_token - 1), here_X)


def sequence_keys(key: jax.Array, what: int, unit: jax.Array | int, sequence_B: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(key, what), unit)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(sequence_B)


@jax.named_scope("dropout")
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
    x_XLD = x_BTD
    if len(x_BTD) == 1:  # a CPU sums the gradients of gain and bias over two dims far faster than over one
        x_XLD = x_BTD.reshape(-1, math.gcd(x_BTD.shape[1], 64), x_BTD.shape[2])
    y_XLD = rms_norm(x_XLD) * params["gain"][None, None] + params["bias"][None, None]
    return y_XLD.astype(x_BTD.dtype).reshape(x_BTD.shape)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel in the dtype of x."""
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype))


def sinusoid(position: jax.Array, width: int, pe_lam: float, dtype: jnp.dtype) -> jax.Array:
    """Sines, then cosines, of each position at width/2 wavelengths: `[..., width]`."""
    exponent = jnp.arange(0, width, 2, dtype=dtype) / width
    angle = jnp.multiply.outer(position.astype(dtype), pe_lam**-exponent)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


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
    axes: mesh.Axes = mesh.UNCUT,
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
        xt_BTD = mesh.varying(xt_BTD, (axes.H,))
    q_BHTK, k_BHTK = queries_and_keys(params, xt_BTD, config)
    H = q_BHTK.shape[1]
    z_BHT = checkpoint_name(vq.nearest(lax.stop_gradient(k_BHTK), c_HSK), KEPT)
    kz_BHTK = vq.lookup(z_BHT, c_HSK)
    e2_BHT = vq.squared_error(k_BHTK, kz_BHTK)
    u_HK, w_HK = biases(params, config)
    attended_BHTK = k_BHTK if config.attention == "full" else vq.straight_through(k_BHTK, kz_BHTK)
    r_BHEK = checkpoint_name(position_keys(params, sinusoid_BED, H).astype(x_BTD.dtype), KEPT)
    y_BTD, state = _attend(
        params, xt_BTD, q_BHTK, attended_BHTK, z_BHT, c_HSK, u_HK, w_HK, r_BHEK, state, start_BX, config, axes
    )
    codebook_stats = vq.statistics(k_BHTK, z_BHT, mask_BT, config.n_code)
    if probe is not None:
        codebook_stats["probe"] = probe.statistics(k_BHTK, mask_BT)
    stats = {
        "commit": jnp.mean(jnp.sum(e2_BHT, 1) * mask_BT.astype(e2_BHT.dtype)),
        "codebook": codebook_stats,
        "metrics": vq.key_metrics(k_BHTK, kz_BHTK, e2_BHT, config.block_len),
    }
    return y_BTD, state, stats


def _attend(
    params: dict,
    xt_BTD: jax.Array,
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    z_BHT: jax.Array,
    c_HSK: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_BHEK: jax.Array,
    state: attention.State,
    start_BX: jax.Array | None,
    config: Model,
    axes: mesh.Axes,
) -> tuple[jax.Array, attention.State]:
    """Values, attention, gate and output projection: what is cut where V is."""
    before = state
    if axes.T:
        z_BHM, k_BHMK = parts.halo(state.z_BHM, z_BHT, axes.T), parts.halo(state.k_BHMK, k_BHTK, axes.T)
        before = state._replace(z_BHM=z_BHM, k_BHMK=k_BHMK)
    whole_BHMK, whole_BHTK = before.k_BHMK, k_BHTK
    if axes.V:
        # Each part of V uses these whole: the sum of their gradients over the parts is one reduction.
        xt_BTD, q_BHTK, k_BHTK, u_HK, w_HK, r_BHEK, memory_BHMK = mesh.varying(
            (xt_BTD, q_BHTK, k_BHTK, u_HK, w_HK, r_BHEK, whole_BHMK), (axes.V,)
        )
        before = before._replace(k_BHMK=memory_BHMK)
    v_BHTV, gate_BTX = values_and_gate(params, xt_BTD, q_BHTK.shape[1])
    if config.attention == "full":
        o_BHTV = full.attend(
            q_BHTK, k_BHTK, v_BHTV, u_HK, w_HK, r_BHEK,
            block_len=config.block_len, n_parallel=config.n_parallel, start_BX=start_BX,
        )  # fmt: skip
    else:
        if axes.T:
            before = parts.carried_in(before, z_BHT, v_BHTV, start_BX, config.block_len, axes.T)
            # Attention stops it too, but then zeros would be sent back to the parts before.
            before = before if config.grad_thru_cache else lax.stop_gradient(before)
        o_BHTV, after = attention.attend(
            q_BHTK,
            k_BHTK,
            v_BHTV,
            z_BHT,
            c_HSK,
            u_HK,
            w_HK,
            r_BHEK,
            before,
            block_len=config.block_len,
            n_parallel=config.n_parallel,
            agg_cache=config.agg_cache,
            grad_thru_cache=config.grad_thru_cache,
            start_BX=start_BX,
        )
        if axes.V:  # the same keys on all, and known to be
            after = after._replace(k_BHMK=attention.newest(whole_BHMK, whole_BHTK, config.grad_thru_cache))
        state = parts.carried_out(after, axes.T) if axes.T else after
    with jax.named_scope("output"):
        y_BTD = dense(merge_heads(o_BHTV) * gate_BTX, params["out"])
    return lax.psum(y_BTD, axes.tensor) if axes.tensor else y_BTD, state


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
    xt_BTD = norm(x_BTD, params["norm"])
    q_BHTK, k_BHTK = queries_and_keys(params, xt_BTD, config)
    v_BHTV, gate_BTX = values_and_gate(params, xt_BTD, config.n_head)
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
