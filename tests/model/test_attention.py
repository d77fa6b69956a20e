"""Linear attention against dense softmax attention over quantised keys, from the paper's equations."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import stream
from tests.model.small import close
from tvq.model import attention, recurrence, vq
from tvq.model.attention import State

B, K, V, S = 2, 3, 4, 5


def dense(
    q_TK, k_TK, v_TV, z_T, c_SK, u_K, w_K, r_EK, state, start_X, *, block_len, agg_cache, grad_thru_cache
):
    """One sequence and head: one score for each pair of tokens, one softmax; O(T^2)."""
    L, T, M, S = block_len, len(q_TK), len(r_EK) - 1, len(c_SK)
    if not grad_thru_cache:
        state = lax.stop_gradient(state)
    z_X = jnp.concatenate([state.z_BHM, z_T])
    k_XK = jnp.concatenate([state.k_BHMK, k_TK])
    v_XV = jnp.concatenate([state.v_BHMV, v_TV])

    i = np.arange(T)[:, None]  # query
    j = np.arange(-M, T)[None, :]  # key; negative ones were carried in
    block_start = i // L * L
    distance = i - j
    window = (block_start - M <= j) & (j <= i)
    old = j < block_start - M
    own_block = (block_start <= j) & (j <= i)
    if not agg_cache:
        window, old = window & (distance <= M), np.zeros_like(old)
    own_TX = start_X[M + 1 :, None] == start_X[None, 1:]
    window, old = window & own_TX, old & own_TX

    def attach(pair_TX, x_X):
        """x for each pair of tokens; no gradient where one block reads an earlier one, if so configured."""
        through = own_block if not grad_thru_cache else np.ones_like(own_block)
        return jnp.where(through[..., None], x_X[None], lax.stop_gradient(x_X)[None]) * pair_TX[..., None]

    qu_TK, qw_TK = q_TK + u_K[None], q_TK + w_K[None]
    near_TX = (distance >= 0) & (distance <= M)
    r_TXK = r_EK[np.where(near_TX, distance, 0)] * near_TX[..., None]
    found_XK = lax.stop_gradient(c_SK[jnp.minimum(z_X, S - 1)])
    exact_TX = jnp.einsum("tk,txk->tx", qu_TK, attach(window, k_XK)) + jnp.einsum("tk,txk->tx", qw_TK, r_TXK)
    cached_TX = qu_TK @ found_XK.T
    score_TX = jnp.where(window, exact_TX, cached_TX)
    score_TX = jnp.where((window | old) & (z_X < S)[None, :], score_TX, -jnp.inf)

    # What was carried in as a cache: count_s keys of code s, whose values add up to sum_s.
    score_TS = qu_TK @ c_SK.T if agg_cache else jnp.full((T, S), -jnp.inf)
    score_TS = jnp.where(start_X[M + 1 :, None] == start_X[None, :1], score_TS, -jnp.inf)
    largest = jnp.maximum(score_TX.max(1), score_TS.max(1))[:, None]
    e_TX, e_TS = jnp.exp(score_TX - largest), jnp.exp(score_TS - largest)
    total_T1 = e_TX.sum(1, keepdims=True) + e_TS @ state.count_BHS[:, None]
    o_TV = (
        jnp.einsum("tx,txv->tv", e_TX, attach(np.ones_like(own_block), v_XV)) + e_TS @ state.sum_BHSV
    ) / total_T1

    # All but the last M tokens have left the memory; of those the cache holds the document of the last.
    hit_XS = (z_X[:T, None] == jnp.arange(S)[None, :]) & (start_X[1 : T + 1] == start_X[T])[:, None]
    kept = jnp.where(start_X[0] == start_X[T], 1.0, 0.0)
    after = State(
        z_X[T:],
        k_XK[T:],
        v_XV[T:],
        kept * state.count_BHS + hit_XS.sum(0),
        kept * state.sum_BHSV + hit_XS.T.astype(v_XV.dtype) @ v_XV[:T],
    )
    return o_TV, after if grad_thru_cache else lax.stop_gradient(after)


def dense_attend(q, k, v, z, c, u, w, r, state, *, start_BX=None, **options):
    if start_BX is None:
        start_BX = jnp.zeros((len(q), r.shape[2] + q.shape[2]), jnp.int32)
    heads = jax.vmap(functools.partial(dense, **options), in_axes=(*[0] * 9, None))
    sequences = jax.vmap(heads, in_axes=(0, 0, 0, 0, None, None, None, 0, 0, 0))
    return sequences(q, k, v, z, c, u, w, r, state, start_BX)


class Inputs(NamedTuple):
    q_BHTK: jax.Array
    k_BHTK: jax.Array
    v_BHTV: jax.Array
    z_BHT: jax.Array
    c_HSK: jax.Array
    u_HK: jax.Array
    w_HK: jax.Array
    r_BHEK: jax.Array
    state: State

    def tokens(self, start: int, stop: int) -> "Inputs":
        cut = {
            name: getattr(self, name)[:, :, start:stop] for name in ("q_BHTK", "k_BHTK", "v_BHTV", "z_BHT")
        }
        return self._replace(**cut)


def empty_state(H: int, M: int, dtype=jnp.float64) -> State:
    return attention.initial_state(B, H, M, S, K, V, dtype)


def inputs(H: int, T: int, M: int, n_memory: int = 0, n_cached: int = 0, on_codes: bool = False) -> Inputs:
    """Random tokens after `n_memory` <= M in memory and `n_cached` in each cache.

    Keys lie off their codewords, so that the window's own keys can be told from codewords; with `on_codes`
    they lie on them, as in the model between updates.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    codes = lambda *shape: jnp.asarray(rng.integers(0, S, shape), jnp.int32)
    c_HSK = normal(H, S, K)
    z_BHT, z_BHM = codes(B, H, T), codes(B, H, M).at[:, :, : M - n_memory].set(S)
    keys = lambda z: vq.lookup(z, c_HSK) if on_codes else vq.lookup(z, c_HSK) + 0.3 * normal(*z.shape, K)
    # Some codes stay unused: their count is 0.
    count_BHS = jnp.asarray(rng.multinomial(n_cached, [0.5, 0.3, 0.2, 0.0, 0.0], (B, H)), jnp.float64)
    state = State(
        z_BHM, keys(z_BHM), normal(B, H, M, V), count_BHS, count_BHS[..., None] * normal(B, H, S, V)
    )
    if n_memory == 0:
        state = empty_state(H, M)
    return Inputs(
        q_BHTK=normal(B, H, T, K), k_BHTK=keys(z_BHT), v_BHTV=normal(B, H, T, V), z_BHT=z_BHT, c_HSK=c_HSK,
        u_HK=normal(H, K), w_HK=normal(H, K), r_BHEK=normal(B, H, M + 1, K), state=state,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("attend", "block_len", "agg_cache", "grad_thru_cache", "n_parallel")
)
def value_and_grads(x: Inputs, toward: tuple, attend, **options) -> tuple:
    """Output and next state, and the gradients of their product with `toward`."""
    smooth = {"k_BHMK", "v_BHMV", "sum_BHSV"}

    def product(q, k, v, u, w, r, carried):
        state = x.state._replace(**carried)
        # The sum of no values is 0 and stays so.
        state = state._replace(sum_BHSV=jnp.where(state.count_BHS[..., None] > 0, state.sum_BHSV, 0.0))
        o, after = attend(q, k, v, x.z_BHT, x.c_HSK, u, w, r, state, **options)
        toward_o, toward_after = toward
        total = jnp.sum(o * toward_o)
        for name in smooth:
            total += jnp.sum(getattr(after, name) * getattr(toward_after, name))
        return total, (o, after)

    carried = {name: getattr(x.state, name) for name in sorted(smooth)}
    arguments = (x.q_BHTK, x.k_BHTK, x.v_BHTV, x.u_HK, x.w_HK, x.r_BHEK, carried)
    grads, values = jax.grad(product, argnums=range(7), has_aux=True)(*arguments)
    return values, dict(zip(("q", "k", "v", "u", "w", "r", "state"), grads, strict=True))


def toward(x: Inputs) -> tuple:
    rng = np.random.default_rng(1)
    random_like = lambda tree: jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), tree)
    return random_like(x.v_BHTV), random_like(x.state)


# (L, M, T, H): dividing either way or not, and each of 1.
SIZES = [(4, 4, 12, 1), (4, 8, 16, 3), (8, 4, 16, 3), (5, 3, 15, 1), (6, 4, 12, 1), (3, 5, 12, 3),
         (4, 1, 12, 3), (1, 4, 6, 1), (1, 1, 5, 3), (12, 5, 12, 1), (3, 14, 12, 1)]  # fmt: skip
# agg_cache, grad_thru_cache
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
CASES = [(*size, (True, True)) for size in SIZES]
CASES += [(*size, switches) for size in ((4, 6, 12, 1), (5, 3, 15, 3)) for switches in SWITCHES]


@pytest.mark.parametrize(("L", "M", "T", "H", "switches"), CASES, ids=str)
def test_equals_dense_attention(L, M, T, H, switches):
    options = {"block_len": L, "agg_cache": switches[0], "grad_thru_cache": switches[1]}
    with jax.enable_x64(True):
        # Nothing carried in, a memory not yet full, memory and cache.
        for n_memory, n_cached in ((0, 0), ((M + 1) // 2, 0), (M, 40)):
            x = inputs(H, T, M, n_memory, n_cached)
            got = value_and_grads(x, toward(x), attention.attend, **options)
            want = value_and_grads(x, toward(x), dense_attend, **options)
            close(got, want, 1e-9)


def starts(L: int, M: int, T: int) -> list[jax.Array]:
    """int32 `[B,M+1+T]` each: at edges of blocks and beside them; several in a block, and one longer than
    many windows; at the ends of the memory and before it; at random, often and seldom.
    """
    rng = np.random.default_rng(0)
    scattered = lambda rate: (np.arange(-M - 1, T)[rng.random(M + 1 + T) < rate]).tolist()
    begun = [
        ([0, L, 2 * L], [L - 1, 2 * L + 1]),
        ([1, 2, L - 1, L], [T - 1]),
        ([-M, -1, 1], [-M - 1]),
        ([-M - 1, -M], [T - M - 1, T - M]),
        ([], scattered(0.1)),
        (scattered(0.5), scattered(0.5)),
    ]
    last = lambda row, x: max([-M - 2] + [t for t in row if t <= x])
    return [jnp.asarray([[last(row, x) for x in range(-M - 1, T)] for row in rows]) for rows in begun]


# (L, M, T), (agg_cache, grad_thru_cache), blocks at once.
APART = [((4, 6, 16), switches, 0) for switches in SWITCHES] + [
    ((5, 3, 15), (True, True), 0), ((3, 8, 18), (True, True), 4), ((3, 8, 18), (True, False), 1),
    ((1, 1, 6), (True, True), 0),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "switches", "n_parallel"), APART, ids=str)
def test_equals_dense_attention_within_documents(sizes, switches, n_parallel):
    L, M, T = sizes
    options = {"block_len": L, "agg_cache": switches[0], "grad_thru_cache": switches[1]}
    with jax.enable_x64(True):
        for n_memory, n_cached in ((0, 0), (M, 40)):
            x = inputs(2, T, M, n_memory, n_cached)
            for start_BX in starts(L, M, T):
                got = value_and_grads(
                    x, toward(x), attention.attend, n_parallel=n_parallel, start_BX=start_BX, **options
                )
                want = value_and_grads(x, toward(x), dense_attend, start_BX=start_BX, **options)
                close(got, want, 1e-9)


@pytest.mark.parametrize(("n_parallel", "grad_thru_cache"), [(1, True), (1, False), (7, True)])
def test_blocks_in_turn_are_blocks_at_once(n_parallel, grad_thru_cache):
    """Of 4 blocks of each of two sequences 1 at a time, or 2: 3 at a time would leave one over."""
    options = {"block_len": 3, "agg_cache": True, "grad_thru_cache": grad_thru_cache}
    with jax.enable_x64(True):
        x = inputs(H=2, T=12, M=4, n_memory=4, n_cached=40)
        got = value_and_grads(x, toward(x), attention.attend, n_parallel=n_parallel, **options)
        close(got, value_and_grads(x, toward(x), dense_attend, **options), 1e-9)


def attend_in_two_calls(q, k, v, z, c, u, w, r, state, *, block_len, **switches):
    outputs = []
    for piece in (slice(0, block_len), slice(block_len, None)):
        tokens = (x[:, :, piece] for x in (q, k, v, z))
        o, state = attention.attend(*tokens, c, u, w, r, state, block_len=block_len, **switches)
        outputs.append(o)
    return jnp.concatenate(outputs, 2), state


@pytest.mark.parametrize("grad_thru_cache", [True, False])
def test_two_calls_are_one(grad_thru_cache):
    options = {"block_len": 4, "agg_cache": True, "grad_thru_cache": grad_thru_cache}
    with jax.enable_x64(True):
        x = inputs(H=2, T=12, M=6, n_memory=6, n_cached=40, on_codes=True)
        got = value_and_grads(x, toward(x), attend_in_two_calls, **options)
        close(got, value_and_grads(x, toward(x), attention.attend, **options), 1e-9)


attend = jax.jit(attention.attend, static_argnames=("block_len", "agg_cache", "grad_thru_cache"))


@pytest.mark.parametrize("agg_cache", [True, False])
def test_output_does_not_depend_on_block_len(agg_cache):
    with jax.enable_x64(True):
        x = inputs(H=2, T=12, M=5, n_memory=5, n_cached=40, on_codes=True)
        want = attend(*x, block_len=12, agg_cache=agg_cache)
        for block_len in (1, 2, 3, 6):
            close(attend(*x, block_len=block_len, agg_cache=agg_cache), want, 1e-9)


def rings_of(state: attention.State, position: int | jax.Array) -> recurrence.Rings:
    return recurrence.rings_from_state(jax.tree.map(lambda x: x[None], state), jnp.int32(position))


@functools.partial(jax.jit, static_argnames="agg_cache")
def attend_one_by_one(x: Inputs, ring: recurrence.Rings, position: jax.Array, agg_cache: bool) -> tuple:
    def step(carry, token):
        ring, position = carry
        o, ring = recurrence.attend_next(
            *token, x.c_HSK, x.u_HK, x.w_HK, x.r_BHEK[0], ring, 0, position, agg_cache=agg_cache
        )
        return (ring, position + 1), o

    tokens = [jnp.moveaxis(a, 2, 0) for a in (x.q_BHTK, x.v_BHTV, x.z_BHT)]
    (ring, _), o = lax.scan(step, (ring, position), tokens)
    return jnp.moveaxis(o, 0, 2), ring


@pytest.mark.parametrize(("M", "agg_cache"), [(1, True), (3, True), (5, True), (5, False)])
def test_one_token_at_a_time(M, agg_cache):
    with jax.enable_x64(True):
        x = inputs(H=2, T=20, M=M, on_codes=True)
        x = x._replace(r_BHEK=jnp.broadcast_to(x.r_BHEK[:1], x.r_BHEK.shape))
        want, after = attend(*x, block_len=4, agg_cache=agg_cache)
        first = rings_of(x.state, 0)
        got, _ = attend_one_by_one(x.tokens(0, 16), first, jnp.int32(0), agg_cache)
        close(got, want[:, :, :16], 1e-9)
        # After 4 tokens a memory of 5 is not yet full; the others have been round.
        middle = rings_of(attend(*x.tokens(0, 4), block_len=4, agg_cache=agg_cache)[1], 4)
        got, last = attend_one_by_one(x.tokens(4, 20), middle, jnp.int32(4), agg_cache)
        close(got, want[:, :, 4:], 1e-9)
        want = rings_of(after, 20)
        last = stream.settled(last, jnp.int32(20))
        close(last._replace(lost_NBHSV=want.lost_NBHSV), want, 1e-9)


def to_bfloat16(x: Inputs) -> Inputs:
    """As in the model: values and carried keys in bfloat16, scores' inputs and sums in float32."""
    x = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, x)
    state = x.state._replace(
        k_BHMK=x.state.k_BHMK.astype(jnp.bfloat16), v_BHMV=x.state.v_BHMV.astype(jnp.bfloat16)
    )
    return x._replace(v_BHTV=x.v_BHTV.astype(jnp.bfloat16), state=state)


def test_counts_stay_exact_in_bfloat16():
    """There counts stop at 256, and odd numbers above it do not exist."""
    T, M = 399, 2
    with jax.enable_x64(True):
        x = inputs(H=1, T=T, M=M)
        x = to_bfloat16(x._replace(z_BHT=jnp.zeros_like(x.z_BHT), v_BHTV=jnp.ones_like(x.v_BHTV)))
    state = empty_state(1, M, jnp.bfloat16)
    for _ in range(2):  # one block, then several
        state = attend(*x._replace(state=state), block_len=T)[1]
        state = attend(*x._replace(state=state), block_len=T // 3)[1]
    position = jnp.int32(4 * T)
    _, ring = attend_one_by_one(x, rings_of(state, position), position, agg_cache=True)
    ring = stream.settled(ring, position + T)
    memories = ((state.count_BHS, state.sum_BHSV, 4 * T), (ring.count_NBHS[0], ring.sum_NBHSV[0], 5 * T))
    for count_BHS, sum_BHSV, n_token in memories:
        assert count_BHS.dtype == sum_BHSV.dtype == jnp.float32
        np.testing.assert_array_equal(count_BHS[..., 0], n_token - M)
        np.testing.assert_array_equal(sum_BHSV[:, :, 0], n_token - M)


# In turn a float32 sum is rounded with every block.
LIMITS = {"blocks at once": 2e-7, "blocks in turn": 2e-6, "tokens": 2e-7}


@pytest.mark.parametrize("way", stream.WAYS)
def test_a_long_stream_in_bfloat16(way):
    """Eight million tokens on, as at the start: a float32 sum that large hardly feels a single value."""
    assert stream.error(way, n_token=4 * stream.PIECE, n_before=1 << 23) < LIMITS[way]


def test_bfloat16_output():
    """Rounding of queries and keys to eight bits moves a score of size |q| |k| by 2^-8 of that at most."""
    with jax.enable_x64(True):
        x = to_bfloat16(inputs(H=2, T=32, M=6, n_memory=6, n_cached=1000, on_codes=True))
        exact = jax.tree.map(
            lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, x
        )
        want = np.asarray(attend(*exact, block_len=8)[0])
    got, _ = attend(*x, block_len=8)
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error < 0.02
