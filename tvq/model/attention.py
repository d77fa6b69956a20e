"""Causal softmax attention over quantised keys in linear time (paper sections 3.3 and 3.4).

The tokens of a call are cut into R blocks of L. A query attends to its window, the M tokens before its block
and the block up to itself, key by key; and to everything before the window through a cache of one count and
one sum of values a code, since keys of equal code have equal scores. All blocks are computed in parallel:
block sums, then one running sum over blocks, then one softmax over window and cache together.

Documents can be kept apart. A document is told by its start, the position of its first token. The cache then
holds but the document of the last token that left the memory: none that left before is of the queries' own.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tvq import dims
from tvq.model import cache

# Names what a rematerialised unit keeps: projections, position keys, codes, counts and means of the cache,
# output and normaliser.
KEPT = "kept"
# The score of a key that may not be seen: finite, so that no difference of two scores is NaN.
UNSEEN = -1e30


class State(NamedTuple):
    """What attention keeps between calls. Code S marks an empty slot of the memory.

    Counts and sums are float32 whatever the dtype of activations: bfloat16 counts stop at 256.
    """

    z_BHM: jax.Array
    k_BHMK: jax.Array
    v_BHMV: jax.Array
    count_BHS: jax.Array
    sum_BHSV: jax.Array


def initial_state(
    n_sequence: int, n_head: int, mem_len: int, n_code: int, d_k: int, d_v: int, dtype: jnp.dtype
) -> State:
    B, H, M, S = n_sequence, n_head, mem_len, n_code
    wide = jnp.promote_types(dtype, jnp.float32)
    return State(
        z_BHM=jnp.full((B, H, M), S, jnp.int32),
        k_BHMK=jnp.zeros((B, H, M, d_k), dtype),
        v_BHMV=jnp.zeros((B, H, M, d_v), dtype),
        count_BHS=jnp.zeros((B, H, S), wide),
        sum_BHSV=jnp.zeros((B, H, S, d_v), wide),
    )


def skew(a_BHRLE: jax.Array) -> jax.Array:
    """Moves column e of row i to column i + e: `[..., L, M+1]` to `[..., L, M+L]`, zero outside the band.

    Padding each row by L and reading the result in rows one shorter shifts row i by i places.
    """
    *lead, L, E = a_BHRLE.shape
    W = E - 1 + L
    padded = jnp.pad(a_BHRLE, [(0, 0)] * (a_BHRLE.ndim - 1) + [(0, L)])
    return padded.reshape(*lead, L * (W + 1))[..., : L * W].reshape(*lead, L, W)


def unskew(a_BHRLW: jax.Array, n_distance: int) -> jax.Array:
    """The transpose of `skew`: column i + e of row i to column e < n_distance."""
    *lead, L, W = a_BHRLW.shape
    flat = jnp.pad(a_BHRLW.reshape(*lead, L * W), [(0, 0)] * len(lead) + [(0, L)])
    return flat.reshape(*lead, L, W + 1)[..., :n_distance]


@jax.named_scope("attention")
def attend(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTV: jax.Array,
    z_BHT: jax.Array,
    c_HSK: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_BHEK: jax.Array,
    state: State,
    *,
    block_len: int,
    n_parallel: int = 0,
    agg_cache: bool = True,
    grad_thru_cache: bool = True,
    start_BX: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """Output `[B,H,T,V]` in the dtype of v, and the state after the T tokens.

    q and k (quantised, straight-through) are scaled by K^-1/4 already, as are u, w and r. z holds the codes
    of k, c the codewords. r is the position key of each distance 0 .. M. T must be a multiple of block_len.
    With agg_cache off a query sees the M tokens before it alone; with grad_thru_cache off no gradient passes
    from block to block. c gets no gradient. Documents are kept apart by start, that of the document of each
    of the M + 1 tokens before and the T of the call, int32 `[B,M+1+T]`; without it there is but one.

    All blocks are computed at once, or a part of them and then the next: n_parallel counts the blocks of all
    sequences together, and at least one of each is taken. The result is the same.
    """
    B, H, T, _ = q_BHTK.shape
    n_block = T // block_len
    at_once = dims.divisor(n_block, most=n_parallel // B) if n_parallel else n_block

    def chunk(state: State, tokens: tuple) -> tuple[State, jax.Array]:
        (q, k, v, z), start = tokens
        o_BHTV, state = attend_at_once(
            q, k, v, z, c_HSK, u_HK, w_HK, r_BHEK, state, start, block_len, agg_cache, grad_thru_cache
        )
        return state, o_BHTV

    tokens = (q_BHTK, k_BHTK, v_BHTV, z_BHT)
    if at_once == n_block:
        state, o_BHTV = chunk(state, (tokens, start_BX))
        return o_BHTV, state
    cut = lambda x: jnp.moveaxis(x.reshape(B, H, -1, at_once * block_len, *x.shape[3:]), 2, 0)
    if start_BX is not None:
        n_before, length = start_BX.shape[1] - T, at_once * block_len
        index_XX = jnp.arange(0, T, length)[:, None] + jnp.arange(n_before + length)[None]
        start_BX = jnp.moveaxis(start_BX[:, index_XX], 1, 0)
    state, o_XBHTV = lax.scan(chunk, state, (jax.tree.map(cut, tokens), start_BX))
    return jnp.moveaxis(o_XBHTV, 0, 2).reshape(v_BHTV.shape), state


def attend_at_once(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTV: jax.Array,
    z_BHT: jax.Array,
    c_HSK: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_BHEK: jax.Array,
    state: State,
    start_BX: jax.Array | None,
    block_len: int,
    agg_cache: bool,
    grad_thru_cache: bool,
) -> tuple[jax.Array, State]:
    """`attend` with all blocks in parallel."""
    size = dims.check(
        q_BHTK=q_BHTK, k_BHTK=k_BHTK, v_BHTV=v_BHTV, z_BHT=z_BHT, c_HSK=c_HSK,
        u_HK=u_HK, w_HK=w_HK, r_BHEK=r_BHEK, **state._asdict(),
    )  # fmt: skip
    B, H, T, S, M, L = size["B"], size["H"], size["T"], size["S"], size["M"], block_len
    assert size["E"] == M + 1, f"{size['E']} distances for a memory of {M}"
    assert T % L == 0, f"{T} tokens in blocks of {L}"
    assert start_BX is None or start_BX.shape == (B, M + 1 + T), f"starts {start_BX.shape}, T is {T}"
    R, narrow = T // L, state.k_BHMK.dtype
    past = (lambda x: x) if grad_thru_cache else lax.stop_gradient

    z_all = jnp.concatenate([state.z_BHM, z_BHT], 2)
    k_all = jnp.concatenate([state.k_BHMK, k_BHTK.astype(narrow)], 2)
    v_all = jnp.concatenate([state.v_BHMV, v_BHTV], 2)

    blocks = lambda x: x[:, :, :T].reshape(B, H, R, L, *x.shape[3:])
    count_BHRS, sum_BHRSV = cache.before_blocks(
        state.count_BHS, state.sum_BHSV, blocks(z_all), past(blocks(v_all)), start_BX
    )
    after = State(z_all[:, :, T:], k_all[:, :, T:], v_all[:, :, T:], count_BHRS[:, :, R], sum_BHRSV[:, :, R])
    after = jax.tree.map(past, after)
    count_BHRS, sum_BHRSV = checkpoint_name(count_BHRS[:, :, :R], KEPT), past(sum_BHRSV[:, :, :R])
    mean_BHRSV = (sum_BHRSV / jnp.maximum(count_BHRS, 1.0)[..., None]).astype(v_BHTV.dtype)
    mean_BHRSV = checkpoint_name(mean_BHRSV, KEPT)

    q_BHRLK = q_BHTK.reshape(B, H, R, L, -1)
    o_BHRLV = window_and_cache(
        (q_BHRLK + u_HK[None, :, None, None, :]).astype(narrow),
        (q_BHRLK + w_HK[None, :, None, None, :]).astype(narrow),
        r_BHEK[:, :, ::-1].astype(narrow),
        pieces(k_all, L, M, past),
        pieces(v_all, L, M, past),
        pieces(z_all, L, M, past, fill=S),
        None if start_BX is None else documents(start_BX, L, M),
        lax.stop_gradient(c_HSK).astype(narrow),
        mean_BHRSV,
        count_BHRS,
        agg_cache,
    )
    return o_BHRLV.reshape(B, H, T, -1), after


class Documents(NamedTuple):
    """The starts of the documents of each block's queries, of the keys of its window, and of its cache."""

    query_B1RL: jax.Array
    keys_B1RL: list[jax.Array]
    cache_B1R: jax.Array


def documents(start_BX: jax.Array, block_len: int, mem_len: int) -> Documents:
    keys = pieces(start_BX[:, None, 1:], block_len, mem_len, lambda x: x)
    # Before the memory lies the token that was the last to leave it.
    return Documents(keys[-1], keys, start_BX[:, None, : -mem_len - 1 : block_len])


def newest(memory_BHMX: jax.Array, x_BHTX: jax.Array, grad_thru_cache: bool) -> jax.Array:
    """The memory after the T tokens."""
    M = memory_BHMX.shape[2]
    after = jnp.concatenate([memory_BHMX, x_BHTX.astype(memory_BHMX.dtype)], 2)[:, :, -M:]
    return after if grad_thru_cache else lax.stop_gradient(after)


def pieces(x: jax.Array, block_len: int, mem_len: int, past: Callable, fill: int = 0) -> list[jax.Array]:
    """The window of every block, oldest first, in pieces `[B,H,R,L,...]` of a block each.

    x is `[B,H,M+T,...]`. If L does not divide M the oldest piece begins with `fill` or with tokens that have
    left the memory: those columns are not in the window.
    """
    n_before = -(-mem_len // block_len)
    n_pad = n_before * block_len - mem_len
    x = jnp.pad(x, [(0, 0), (0, 0), (n_pad, 0)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)
    T = x.shape[2] - n_before * block_len
    # Cut before it is reshaped: the newest piece is then seen to be the call's own tokens, and not copied.
    cut = [x[:, :, p * block_len : p * block_len + T] for p in range(n_before + 1)]
    blocks = [piece.reshape(*x.shape[:2], -1, block_len, *x.shape[3:]) for piece in cut]
    return [past(block) for block in blocks[:-1]] + blocks[-1:]


def _scores(
    qu_BHRLK: jax.Array,
    qw_BHRLK: jax.Array,
    r_BHEK: jax.Array,
    ks_BHRLK: list[jax.Array],
    zs_BHRL: list[jax.Array],
    apart: Documents | None,
    c_HSK: jax.Array,
    count_BHRS: jax.Array,
    agg_cache: bool,
) -> list[jax.Array]:
    """Scores of each piece of the window `[B,H,R,L,L]`, then, with agg_cache, of the codes `[B,H,R,L,S]`."""
    L, M, S = qu_BHRLK.shape[3], r_BHEK.shape[2] - 1, c_HSK.shape[1]
    n_pad = (len(ks_BHRLK) - 1) * L - M
    wide = count_BHRS.dtype
    # Column j of the window lies M + i - j behind query i: r counts the distances down from M.
    near_BHRLE = jnp.einsum("bhrlk,bhek->bhrle", qw_BHRLK, r_BHEK, preferred_element_type=wide)
    near_BHRLW = jnp.pad(skew(near_BHRLE), [(0, 0)] * 4 + [(n_pad, 0)])
    i, j = jnp.arange(L)[:, None], jnp.arange(-n_pad, M + L)[None, :]
    oldest = jnp.zeros_like(i) if agg_cache else i
    seen_LW = (j >= oldest) & (j <= i + M)
    scores = []
    for p, (k_BHRLK, z_BHRL) in enumerate(zip(ks_BHRLK, zs_BHRL, strict=True)):
        columns = slice(p * L, (p + 1) * L)
        score = jnp.einsum("bhrlk,bhrjk->bhrlj", qu_BHRLK, k_BHRLK, preferred_element_type=wide)
        visible = seen_LW[None, None, None, :, columns] & (z_BHRL < S)[:, :, :, None, :]
        if apart is not None:
            visible &= apart.query_B1RL[..., None] == apart.keys_B1RL[p][..., None, :]
        scores.append(jnp.where(visible, score + near_BHRLW[..., columns], UNSEEN))
    if agg_cache:
        score = jnp.einsum("bhrlk,hsk->bhrls", qu_BHRLK, c_HSK, preferred_element_type=wide)
        score += log_count(count_BHRS)[:, :, :, None, :]
        if apart is not None:
            own_B1RL = apart.query_B1RL == apart.cache_B1R[..., None]
            score = jnp.where(own_B1RL[..., None], score, UNSEEN)
        scores.append(score)
    return scores


def log_count(count: jax.Array) -> jax.Array:
    """What a code's score gains by standing for `count` keys."""
    return jnp.where(count > 0, jnp.log(jnp.maximum(count, 1.0)), UNSEEN)


@partial(jax.custom_vjp, nondiff_argnums=(10,))
def window_and_cache(
    qu_BHRLK: jax.Array,
    qw_BHRLK: jax.Array,
    r_BHEK: jax.Array,
    ks_BHRLK: list[jax.Array],
    vs_BHRLV: list[jax.Array],
    zs_BHRL: list[jax.Array],
    apart: Documents | None,
    c_HSK: jax.Array,
    mean_BHRSV: jax.Array,
    count_BHRS: jax.Array,
    agg_cache: bool,
) -> jax.Array:
    """The output `[B,H,R,L,V]`: values weighted by one softmax over window and cache.

    The backward pass computes the scores again, and keeps but inputs, output and normaliser. Gradients go
    to queries, position keys, window keys, values and cache means.
    """
    return attend_forward(
        qu_BHRLK,
        qw_BHRLK,
        r_BHEK,
        ks_BHRLK,
        vs_BHRLV,
        zs_BHRL,
        apart,
        c_HSK,
        mean_BHRSV,
        count_BHRS,
        agg_cache,
    )[0]


def attend_forward(
    qu_BHRLK: jax.Array,
    qw_BHRLK: jax.Array,
    r_BHEK: jax.Array,
    ks_BHRLK: list[jax.Array],
    vs_BHRLV: list[jax.Array],
    zs_BHRL: list[jax.Array],
    apart: Documents | None,
    c_HSK: jax.Array,
    mean_BHRSV: jax.Array,
    count_BHRS: jax.Array,
    agg_cache: bool,
) -> tuple:
    inputs = (qu_BHRLK, qw_BHRLK, r_BHEK, ks_BHRLK, vs_BHRLV, zs_BHRL, apart, c_HSK, mean_BHRSV, count_BHRS)
    scores = _scores(qu_BHRLK, qw_BHRLK, r_BHEK, ks_BHRLK, zs_BHRL, apart, c_HSK, count_BHRS, agg_cache)
    values = [*vs_BHRLV, mean_BHRSV] if agg_cache else vs_BHRLV
    o_BHRLV, lse_BHRL1 = softmax_sum(scores, values)
    o_BHRLV = checkpoint_name(o_BHRLV.astype(mean_BHRSV.dtype), KEPT)
    return o_BHRLV, (inputs, o_BHRLV, checkpoint_name(lse_BHRL1, KEPT))


def attend_backward(agg_cache: bool, kept: tuple, do_BHRLV: jax.Array) -> tuple:
    inputs, o_BHRLV, lse_BHRL1 = kept
    qu_BHRLK, qw_BHRLK, r_BHEK, ks_BHRLK, vs_BHRLV, zs_BHRL, apart, c_HSK, mean_BHRSV, count_BHRS = inputs
    wide, narrow = lse_BHRL1.dtype, qu_BHRLK.dtype
    product = partial(jnp.einsum, preferred_element_type=wide)
    scores = _scores(qu_BHRLK, qw_BHRLK, r_BHEK, ks_BHRLK, zs_BHRL, apart, c_HSK, count_BHRS, agg_cache)
    values = [*vs_BHRLV, mean_BHRSV] if agg_cache else vs_BHRLV
    do_o_BHRL1 = jnp.sum(do_BHRLV.astype(wide) * o_BHRLV.astype(wide), -1, keepdims=True)
    dscores, dvalues = [], []
    for score, value in zip(scores, values, strict=True):
        p = jnp.exp(score - lse_BHRL1)
        dp = product("bhrlv,bhrjv->bhrlj", do_BHRLV, value)
        dscores.append((p * (dp - do_o_BHRL1)).astype(narrow))
        dvalue = product("bhrlj,bhrlv->bhrjv", p.astype(do_BHRLV.dtype), do_BHRLV)
        dvalues.append(dvalue.astype(value.dtype))

    dqu_BHRLK = jnp.zeros(qu_BHRLK.shape, wide)
    dks = []
    for dscore, k_BHRLK in zip(dscores, ks_BHRLK, strict=False):
        dqu_BHRLK += product("bhrlj,bhrjk->bhrlk", dscore, k_BHRLK)
        dks.append(product("bhrlj,bhrlk->bhrjk", dscore, qu_BHRLK).astype(k_BHRLK.dtype))
    if agg_cache:
        # In this order: the CPU has no bfloat16 product for the other with several heads.
        dqu_BHRLK += product("hsk,bhrls->bhrlk", c_HSK, dscores[-1])
    n_piece, E = len(ks_BHRLK), r_BHEK.shape[2]
    n_pad = (n_piece - 1) * qu_BHRLK.shape[3] - (E - 1)
    dnear_BHRLE = unskew(jnp.concatenate(dscores[:n_piece], -1)[..., n_pad:], E)
    dqw_BHRLK = product("bhrle,bhek->bhrlk", dnear_BHRLE, r_BHEK)
    dr_BHEK = product("bhrle,bhrlk->bhek", dnear_BHRLE, qw_BHRLK)
    return (
        dqu_BHRLK.astype(narrow),
        dqw_BHRLK.astype(narrow),
        dr_BHEK.astype(narrow),
        dks,
        dvalues[:n_piece],
        [None] * n_piece,
        None,
        None,
        dvalues[-1] if agg_cache else jnp.zeros_like(mean_BHRSV),
        None,
    )


window_and_cache.defvjp(attend_forward, attend_backward)


def softmax_sum(scores: list[jax.Array], values: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Values `[...,J,V]` weighted by one softmax over all scores `[...,L,J]`, and the log of its normaliser.

    Both in the dtype of the scores.
    """
    largest = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        largest = jnp.maximum(largest, score.max(-1, keepdims=True))
    total, weighted = jnp.zeros_like(largest), jnp.zeros((), largest.dtype)
    for score, value in zip(scores, values, strict=True):
        weight = jnp.exp(score - largest)
        total += weight.sum(-1, keepdims=True)
        weight = weight.astype(value.dtype)
        # Each product leaves in the narrow dtype: wide ones would double the traffic, and widen the backward.
        weighted += jnp.einsum("...lj,...jv->...lv", weight, value).astype(largest.dtype)
    return weighted / total, largest + jnp.log(total)
