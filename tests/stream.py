"""A stream of millions of tokens through the cache, against sums in float64: bfloat16 values, uneven codes.

python -m tests.stream 10000000
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tvq.model import attention, recurrence

K, V, S, M, L = 1, 6, 4, 16, 512
PIECE = 1 << 13  # tokens of a call
SHARES = (0.6, 0.3, 0.0999, 0.0001)


def values(rng: np.random.Generator, n_token: int) -> tuple[jax.Array, np.ndarray]:
    """Values bfloat16 `[1,1,T,V]`: always the same, nearly so, of both signs, positive, SiLU's; codes."""
    x = rng.normal(size=(n_token, V))
    x[:, 0], x[:, 1], x[:, 3] = 0.3, 1 + 0.01 * x[:, 1], np.abs(x[:, 3])
    x[:, 4:] /= 1 + np.exp(-x[:, 4:])
    return jnp.asarray(x[None, None], jnp.bfloat16), rng.choice(S, p=SHARES, size=(1, 1, n_token))


ZEROS = {"c": jnp.zeros((1, S, K)), "u": jnp.zeros((1, K))}


@functools.partial(jax.jit, static_argnames="n_parallel")
def read(state: attention.State, position: jax.Array, v: jax.Array, z: jax.Array, n_parallel: int) -> tuple:
    """Blocks at once, or one after another."""
    q, r = jnp.zeros((1, 1, v.shape[2], K)), jnp.zeros((1, 1, M + 1, K))
    arguments = (q, q, v, z, ZEROS["c"], ZEROS["u"], ZEROS["u"], r)
    _, state = attention.attend(*arguments, state, block_len=L, n_parallel=n_parallel)
    return state, position + v.shape[2]


@jax.jit
def write(ring: recurrence.Rings, position: jax.Array, v: jax.Array, z: jax.Array) -> tuple:
    """One token at a time."""
    q, r = jnp.zeros((1, 1, K)), jnp.zeros((1, M + 1, K))

    def step(carry: tuple, token: tuple) -> tuple:
        ring, position = carry
        arguments = (ZEROS["c"], ZEROS["u"], ZEROS["u"], r)
        _, ring = recurrence.attend_next(q, *token, *arguments, ring, 0, position)
        return (ring, position + 1), None

    return lax.scan(step, (ring, position), (jnp.moveaxis(v, 2, 0), jnp.moveaxis(z, 2, 0)))[0]


def settled(rings: recurrence.Rings, position: jax.Array) -> recurrence.Rings:
    """As `rings_from_state` has it: what only the next token would move to the cache is there."""
    S, X = rings.count_NBHS.shape[3], rings.z_NBHX.shape[3]
    for n in range(len(rings.z_NBHX)):
        rings = recurrence.to_cache(rings, n, (position + 1) % X)
    gone = jnp.isin(jnp.arange(X), jnp.stack([position % X, (position + 1) % X]))
    return rings._replace(
        z_NBHX=jnp.where(gone[None, None, None], S, rings.z_NBHX),
        v_NBHXV=jnp.where(gone[None, None, None, :, None], 0, rings.v_NBHXV),
    )


WAYS = {
    "blocks at once": functools.partial(read, n_parallel=0),
    "blocks in turn": functools.partial(read, n_parallel=1),
    "tokens": write,
}


def error(way: str, n_token: int, n_before: int = 0) -> float:
    """The largest deviation of a mean, relative to it, after `n_token` tokens; counts are seen to be equal.

    They come after `n_before` others, whose counts and sums are given as float32 holds them.
    """
    rng = np.random.default_rng(0)
    count_S = np.floor(n_before * np.asarray(SHARES))
    sum_SV = np.asarray(count_S[:, None] * np.linspace(0.3, 1.0, V), np.float32).astype(np.float64)
    state = attention.initial_state(1, 1, M, S, K, V, jnp.bfloat16)
    state = state._replace(
        count_BHS=jnp.asarray(count_S[None, None], jnp.float32),
        sum_BHSV=jnp.asarray(sum_SV[None, None], jnp.float32),
    )
    position = jnp.int32(0)
    one_unit = jax.tree.map(lambda x: x[None], state)
    now = recurrence.rings_from_state(one_unit, position) if way == "tokens" else state
    last_v, last_z = np.zeros((0, V)), np.zeros(0, int)  # in memory
    for _ in range(n_token // PIECE):
        v, z = values(rng, PIECE)
        now, position = WAYS[way](now, position, v, jnp.asarray(z, jnp.int32))
        old_v = np.concatenate([last_v, np.asarray(v[0, 0], np.float64)])
        old_z = np.concatenate([last_z, z[0, 0]])
        last_v, last_z, old_v, old_z = old_v[-M:], old_z[-M:], old_v[:-M], old_z[:-M]
        for s in range(S):
            count_S[s] += np.sum(old_z == s)
            sum_SV[s] += old_v[old_z == s].sum(0)
    now = settled(now, position) if way == "tokens" else now
    count, total = (now.count_NBHS[0], now.sum_NBHSV[0]) if way == "tokens" else (now.count_BHS, now.sum_BHSV)
    np.testing.assert_array_equal(count[0, 0], count_S)
    got, want = (x / np.maximum(count_S, 1)[:, None] for x in (np.asarray(total[0, 0]), sum_SV))
    return float(np.max(np.abs(got - want) / np.maximum(np.abs(want).max(1, keepdims=True), 1e-30)))


if __name__ == "__main__":
    for name in WAYS:
        began = time.monotonic()
        off = error(name, int(sys.argv[1]))
        print(
            f"{name:14}  means off by {off:.1e}, counts equal, {time.monotonic() - began:.0f} s", flush=True
        )
