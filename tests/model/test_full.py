"""Quadratic attention: a plain softmax over all keys, and linear attention whose window holds all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq.model import attention, full

B, H, K, V, S = 2, 2, 4, 6, 5


def inputs(T: int, M: int) -> tuple:
    shapes = [(B, H, T, K), (B, H, T, K), (B, H, T, V), (H, K), (H, K), (B, H, M + 1, K)]
    keys = jax.random.split(jax.random.key(T + M), len(shapes))
    return tuple(jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes, strict=True))


def plain(q, k, v, u, w, r, start_BT=None):
    T, M = q.shape[2], r.shape[2] - 1
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    content = jnp.einsum("bhik,bhjk->bhij", q + u[None, :, None], k)
    near = jnp.einsum("bhik,bhek->bhie", q + w[None, :, None], r)
    index = jnp.broadcast_to(jnp.clip(distance, 0, M)[None, None], content.shape)
    near = jnp.where((distance >= 0) & (distance <= M), jnp.take_along_axis(near, index, 3), 0.0)
    scores = jnp.where(distance >= 0, content + near, -jnp.inf)
    if start_BT is not None:
        scores = jnp.where((start_BT[:, :, None] == start_BT[:, None])[:, None], scores, -jnp.inf)
    return jnp.einsum("bhij,bhjv->bhiv", jax.nn.softmax(scores), v)


def same(f, g, x) -> None:
    """Equal outputs and gradients of all inputs."""

    @jax.jit
    def both(x, toward):
        return [(o, pull(toward)) for o, pull in (jax.vjp(f, *x), jax.vjp(g, *x))]

    toward = jax.random.normal(jax.random.key(7), jax.eval_shape(f, *x).shape, jnp.float64)
    for a, b in zip(*map(jax.tree.leaves, both(x, toward)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


@pytest.mark.parametrize(("T", "L", "M"), [(12, 4, 7), (10, 5, 1), (40, 2, 3)])
def test_is_a_plain_softmax(T, L, M):
    with jax.enable_x64(True):
        same(lambda *x: full.attend(*x, block_len=L), plain, inputs(T, M))


def test_keeps_documents_apart():
    T, L, M = 8, 4, 3
    begun = np.zeros((B, T), np.int32)
    begun[0, [1, 5]], begun[1, 7] = [1, 5], 7
    start = jnp.asarray(np.maximum.accumulate(begun, 1))
    with jax.enable_x64(True):
        same(
            lambda *x: full.attend(*x, block_len=L, start_BT=start),
            lambda *x: plain(*x, start),
            inputs(T, M),
        )


def test_is_linear_attention_whose_window_holds_all():
    T, L, M = 12, 4, 12

    def linear(q, k, v, u, w, r):
        state = attention.initial_state(B, H, M, S, K, V, jnp.float64)
        z, c = jnp.zeros((B, H, T), jnp.int32), jnp.ones((H, S, K), jnp.float64)
        return attention.attend(q, k, v, z, c, u, w, r, state, block_len=L)[0]

    with jax.enable_x64(True):
        same(lambda *x: full.attend(*x, block_len=L), linear, inputs(T, M))
