"""Causal softmax attention over quantised keys in linear time (paper sections 3.3 and 3.4).

The tokens of a call are cut into R blocks of L. A query attends to its window, the M tokens before its block
and the block up to itself, key by key; and to everything before the window through a cache of one count and
one sum of values a code, since keys of equal code have equal scores. All blocks are computed in parallel:
block sums, then one running sum over blocks, then one softmax over window and cache together.

Documents can be kept apart. A document is identified by its start, the position of its first token. The cache
then holds only the document of the last token that left the memory: no query belongs to an earlier one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tvq import dims
from tvq.model import cache, window


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
    With agg_cache off a query sees only the M tokens before it; with grad_thru_cache off no gradient passes
    from block to block. c gets no gradient. Documents are kept apart by start, that of the document of each
    of the M + 1 tokens before and the T of the call, int32 `[B,M+1+T]`; without it there is only one.

    All blocks are computed at once, or some of them and then the next: n_parallel counts the blocks of all
    sequences together, and at least one of each is computed. The result is the same.
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
    count_BHRS, sum_BHRSV = checkpoint_name(count_BHRS[:, :, :R], window.KEPT), past(sum_BHRSV[:, :, :R])
    mean_BHRSV = (sum_BHRSV / jnp.maximum(count_BHRS, 1.0)[..., None]).astype(v_BHTV.dtype)
    mean_BHRSV = checkpoint_name(mean_BHRSV, window.KEPT)

    q_BHRLK = q_BHTK.reshape(B, H, R, L, -1)
    o_BHRLV = window.attend(
        window.Window(
            qu_BHRLK=(q_BHRLK + u_HK[None, :, None, None, :]).astype(narrow),
            qw_BHRLK=(q_BHRLK + w_HK[None, :, None, None, :]).astype(narrow),
            r_BHEK=r_BHEK[:, :, ::-1].astype(narrow),
            ks_BHRLK=window.pieces(k_all, L, M, past),
            vs_BHRLV=window.pieces(v_all, L, M, past),
            filled_BHRL=window.pieces(z_all < S, L, M),
            apart=None if start_BX is None else window.documents(start_BX, L, M),
            cache=window.Cache(lax.stop_gradient(c_HSK).astype(narrow), mean_BHRSV, count_BHRS)
            if agg_cache
            else None,
        )
    )
    return o_BHRLV.reshape(B, H, T, -1), after


def newest(memory_BHMX: jax.Array, x_BHTX: jax.Array, grad_thru_cache: bool) -> jax.Array:
    """The memory after the T tokens."""
    M = memory_BHMX.shape[2]
    after = jnp.concatenate([memory_BHMX, x_BHTX.astype(memory_BHMX.dtype)], 2)[:, :, -M:]
    return after if grad_thru_cache else lax.stop_gradient(after)
