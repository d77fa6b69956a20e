"""Norm, positions and dropout."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tvq.model import vq

NORM_EPS = 1e-6


class Draws(NamedTuple):
    """Where the random numbers of one update come from; they never depend on process, device or mesh."""

    ephemeral: jax.Array  # key, new each update
    timeless: jax.Array  # key, new each call of the step
    sequence_B: jax.Array  # index of each sequence in the global batch
    probe_X2: jax.Array | None = None  # sequence and position of the tokens whose keys are probed


# One number for each kind of draw, folded into the key.
EMBEDDING, RESIDUAL, SINUSOID, LAYER, PROBE = range(5)
N_PROBE = 64


def draw_probe(ephemeral: jax.Array, n_sequence: int, n_token: int) -> jax.Array:
    """The sequence and position `[X,2]` of N_PROBE tokens of an update, one from each equal stretch of it."""
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
    """Dropout with a separate draw for each sequence and block; `position` is that of the first token."""
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
