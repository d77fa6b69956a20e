"""Quadratic attention through cuDNN's flash kernel, on NVIDIA GPUs.

The kernel is causal softmax attention with values as wide as keys. Values are cut into slices of K, and the
M + 1 distances that have a position score are left to the window of linear attention: the query at i sees
the keys up to i - M - 1 through the kernel, which is causal once queries are shifted against keys. Window and
kernel form one softmax: outputs are weighted by their normalisers; and each backward pass, given the joint
output and normaliser, computes its part of the gradient exactly.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # the public API does not take a normaliser
from jax.ad_checkpoint import checkpoint_name

from tvq import dims
from tvq.model import window


class Kernel(NamedTuple):
    """Causal attention over queries and keys `[B,H,T,K]`, values `[B,H,T,V]`, in the dtype of the values.

    forward(q, k, v) -> output `[B,H,T,V]`, log of the normaliser `[B,H,T,1]`; backward(q, k, v, o, lse, do)
    -> (dq, dk, dv), where o and lse may be those of a softmax over more keys.
    """

    forward: Callable
    backward: Callable


def _options(q_BTXK: jax.Array) -> tuple[list, dict]:
    """The unused arguments, and the options."""
    unused = [jnp.zeros(0, q_BTXK.dtype)] * 7
    options = {
        "scale": 1.0, "seed": 0, "dropout_rate": 0.0, "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.CAUSAL, "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }  # fmt: skip
    if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters:  # from jax 0.12 on
        options["score_mod"] = None
    return unused, options


def _slices(x_BHTV: jax.Array, K: int) -> jax.Array:
    """Slices of the last dim, K wide and padded with zeros, side by side as heads: `[B,T,X,K]`."""
    B, _, T, V = x_BHTV.shape
    x_BTHV = jnp.pad(x_BHTV.swapaxes(1, 2), [(0, 0)] * 3 + [(0, -V % K)])
    return x_BTHV.reshape(B, T, -1, K)


def _whole(x_BTXK: jax.Array, like_BHTV: jax.Array) -> jax.Array:
    """The array that `_slices` cut."""
    B, H, T, V = like_BHTV.shape
    return x_BTXK.reshape(B, T, H, -1)[..., :V].swapaxes(1, 2)


def _beside(q_BHTK: jax.Array, v_BTXK: jax.Array) -> jax.Array:
    """Queries or keys, for each slice of the values."""
    return jnp.repeat(q_BHTK.swapaxes(1, 2), v_BTXK.shape[2] // q_BHTK.shape[1], axis=2)


def _forward(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    v_BTXK = _slices(v_BHTV, q_BHTK.shape[3])
    q_BTXK, k_BTXK = _beside(q_BHTK, v_BTXK), _beside(k_BHTK, v_BTXK)
    unused, options = _options(q_BTXK)
    o_BTXK, lse_BXT = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        q_BTXK, k_BTXK, v_BTXK, *unused, **options, is_training=True
    )
    n_slice = v_BTXK.shape[2] // q_BHTK.shape[1]
    return _whole(o_BTXK, v_BHTV), lse_BXT[:, ::n_slice, :, None]


def _backward(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTV: jax.Array,
    o_BHTV: jax.Array,
    lse_BHT1: jax.Array,
    do_BHTV: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    H, K = q_BHTK.shape[1], q_BHTK.shape[3]
    v_BTXK, o_BTXK, do_BTXK = (_slices(x, K) for x in (v_BHTV, o_BHTV, do_BHTV))
    n_slice = v_BTXK.shape[2] // H
    q_BTXK, k_BTXK = _beside(q_BHTK, v_BTXK), _beside(k_BHTK, v_BTXK)
    lse_BXT = jnp.repeat(lse_BHT1[..., 0], n_slice, axis=1)
    unused, options = _options(q_BTXK)
    dq_BTXK, dk_BTXK, dv_BTXK = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q_BTXK, k_BTXK, v_BTXK, *unused, lse_BXT, o_BTXK, do_BTXK, **options
    )

    def over_slices(x_BTXK: jax.Array) -> jax.Array:
        x_BTHXK = x_BTXK.reshape(*x_BTXK.shape[:2], H, n_slice, K)
        wide = jnp.promote_types(x_BTXK.dtype, jnp.float32)
        return x_BTHXK.sum(3, dtype=wide).astype(x_BTXK.dtype).swapaxes(1, 2)

    return over_slices(dq_BTXK), over_slices(dk_BTXK), _whole(dv_BTXK, v_BHTV)


CUDNN = Kernel(_forward, _backward)


def attend(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTV: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_BHEK: jax.Array,
    *,
    block_len: int,
    kernel: Kernel = CUDNN,
) -> jax.Array:
    """Output `[B,H,T,V]`, equal to that of `full.attend` for sequences of one document."""
    size = dims.check(q_BHTK=q_BHTK, k_BHTK=k_BHTK, v_BHTV=v_BHTV, u_HK=u_HK, w_HK=w_HK, r_BHEK=r_BHEK)
    B, H, T, M, L = size["B"], size["H"], size["T"], size["E"] - 1, block_len
    assert T % L == 0, f"{T} tokens in blocks of {L}"
    narrow = v_BHTV.dtype
    k_BHTK = k_BHTK.astype(narrow)
    qu_BHTK = (q_BHTK + u_HK[None, :, None]).astype(narrow)
    qw_BHTK = (q_BHTK + w_HK[None, :, None]).astype(narrow)
    blocks = lambda x: x.reshape(B, H, T // L, L, *x.shape[3:])

    windows = lambda x: window.pieces(jnp.pad(x, [(0, 0), (0, 0), (M, 0)] + [(0, 0)] * (x.ndim - 3)), L, M)
    near = window.Window(
        qu_BHRLK=blocks(qu_BHTK),
        qw_BHRLK=blocks(qw_BHTK),
        r_BHEK=r_BHEK[:, :, ::-1].astype(narrow),
        ks_BHRLK=windows(k_BHTK),
        vs_BHRLV=windows(v_BHTV),
        filled_BHRL=windows(jnp.ones((B, H, T), bool)),
    )
    return window_and_rest(
        near, (qu_BHTK[:, :, M + 1 :], k_BHTK[:, :, : -M - 1], v_BHTV[:, :, : -M - 1]), kernel
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def window_and_rest(near: window.Window, rest: tuple, kernel: Kernel) -> jax.Array:
    """The output `[B,H,T,V]` over keys in the window and before it.

    `rest` holds the queries that have keys before their window, and those keys and their values.
    """
    return _attend_forward(near, rest, kernel)[0]


def _attend_forward(near: window.Window, rest: tuple, kernel: Kernel) -> tuple[jax.Array, tuple]:
    o_BHRLV, (_, _, lse_BHRL1) = window.forward(near)
    B, H, R, L, V = o_BHRLV.shape
    o_BHTV, lse_BHT1 = o_BHRLV.reshape(B, H, R * L, V), lse_BHRL1.reshape(B, H, R * L, 1)
    n_rest = rest[0].shape[2]
    if n_rest:
        o_rest, lse_rest = kernel.forward(*rest)
        last = slice(R * L - n_rest, None)
        lse_both = jnp.logaddexp(lse_BHT1[:, :, last], lse_rest)
        part = lambda o, lse: jnp.exp(lse - lse_both) * o
        o_both = part(o_BHTV[:, :, last], lse_BHT1[:, :, last]) + part(o_rest, lse_rest)
        o_BHTV = jnp.concatenate([o_BHTV[:, :, :-n_rest], o_both.astype(o_BHTV.dtype)], 2)
        lse_BHT1 = jnp.concatenate([lse_BHT1[:, :, :-n_rest], lse_both], 2)
    o_BHTV, lse_BHT1 = (checkpoint_name(x, window.KEPT) for x in (o_BHTV, lse_BHT1))
    return o_BHTV, (near, rest, o_BHTV, lse_BHT1)


def _attend_backward(kernel: Kernel, kept: tuple, do_BHTV: jax.Array) -> tuple[window.Window, tuple]:
    near, rest, o_BHTV, lse_BHT1 = kept
    B, H, R, L, _ = near.qu_BHRLK.shape
    blocks = lambda x: x.reshape(B, H, R, L, -1)
    (dnear,) = window.backward((near, blocks(o_BHTV), blocks(lse_BHT1)), blocks(do_BHTV))
    n_rest = rest[0].shape[2]
    if not n_rest:
        return dnear, jax.tree.map(jnp.zeros_like, rest)
    last = slice(R * L - n_rest, None)
    drest = kernel.backward(*rest, o_BHTV[:, :, last], lse_BHT1[:, :, last], do_BHTV[:, :, last])
    return dnear, drest


window_and_rest.defvjp(_attend_forward, _attend_backward)
