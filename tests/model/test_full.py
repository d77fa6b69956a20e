"""Quadratic attention: a plain softmax over all keys, and linear attention whose window holds all."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq.model import attention, flash, full

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
            lambda *x: full.attend(*x, block_len=L, start_BX=jnp.pad(start, [(0, 0), (M + 1, 0)])),
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


def causal(q, k):
    score = jnp.einsum("bhik,bhjk->bhij", q, k)
    return jnp.where(jnp.tril(jnp.ones(score.shape[2:], bool)), score, -jnp.inf)


def kernel_forward(q, k, v):
    lse = jax.nn.logsumexp(causal(q, k), -1, keepdims=True)
    return jnp.exp(causal(q, k) - lse) @ v, lse


def kernel_backward(q, k, v, o, lse, do):
    p = jnp.exp(causal(q, k) - lse)
    ds = p * (do @ v.swapaxes(2, 3) - (do * o).sum(-1, keepdims=True))
    return ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ do


PLAIN = flash.Kernel(kernel_forward, kernel_backward)


@pytest.mark.parametrize(("T", "L", "M"), [(12, 4, 7), (10, 5, 1), (40, 2, 3), (8, 4, 7), (8, 4, 9)])
def test_a_causal_kernel_and_a_window_are_one_softmax(T, L, M):
    with jax.enable_x64(True):
        same(lambda *x: flash.attend(*x, block_len=L, kernel=PLAIN), plain, inputs(T, M))


def test_the_kernel_takes_wide_values_in_slices(monkeypatch):
    """V 6 in slices of K 4: two, the second padded."""
    swap = lambda x: x.swapaxes(1, 2)

    def forward(q, k, v, *unused, **options):
        o, lse = kernel_forward(swap(q), swap(k), swap(v))
        return swap(o), lse[..., 0]

    def backward(q, k, v, *more, **options):
        *_, lse, o, do = more
        return [swap(x) for x in kernel_backward(*map(swap, (q, k, v, o)), lse[..., None], swap(do))]

    for name, f in (("fwd", forward), ("bwd", backward)):
        kernel = types.SimpleNamespace(bind=f)
        monkeypatch.setattr(flash.cudnn, f"_dot_product_attention_{name}_p_wrapper", kernel)
    with jax.enable_x64(True):
        same(lambda *x: flash.attend(*x, block_len=4), plain, inputs(12, 3))


def test_the_kernel_is_that_of_cudnn():
    T, M = 16, 3
    shapes = ((1, 2, T, 8), (1, 2, T, 8), (1, 2, T, 24), (2, 8), (2, 8), (1, 2, M + 1, 8))
    like = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    loss = lambda *x: flash.attend(*x, block_len=4).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss, range(6))).trace(*like).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
