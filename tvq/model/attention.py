"""Causal softmax attention over quantised keys in linear time (paper sections 3.3 and 3.4).

The tokens of a call are cut into R blocks of L. A query attends to its window, the M tokens before its block
and the block up to itself, key by key; and to everything before the window through a cache of one count and
one sum of values a code, since keys of equal code have equal scores. All blocks are computed in parallel:
block sums, then one running sum over blocks, then one softmax over window and cache together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tvq import dims

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


def code_sums(z_BHRL: jax.Array, v_BHRLV: jax.Array, n_code: int, dtype: jnp.dtype) -> tuple:
    """Number `[B,H,R,S]` and sum of values `[B,H,R,S,V]` of each code in each block; code S adds to none."""
    hit_BHRLS = jax.nn.one_hot(z_BHRL, n_code, dtype=v_BHRLV.dtype)
    count_BHRS = jnp.sum(hit_BHRLS, 3, dtype=dtype)
    sum_BHRSV = jnp.einsum("bhrls,bhrlv->bhrsv", hit_BHRLS, v_BHRLV, preferred_element_type=dtype)
    return count_BHRS, sum_BHRSV


def running(x0_BHX: jax.Array, x_BHRX: jax.Array) -> jax.Array:
    """`x0 + x_0 + ... + x_{r-1}` for r = 0 .. R, along axis 2."""
    return jnp.cumsum(jnp.concatenate([x0_BHX[:, :, None], x_BHRX], 2), 2)


def skew(a_BHRLE: jax.Array) -> jax.Array:
    """Moves column e of row i to column i + e: `[..., L, M+1]` to `[..., L, M+L]`, zero outside the band.

    Padding each row by L and reading the result in rows one shorter shifts row i by i places.
    """
    *lead, L, E = a_BHRLE.shape
    W = E - 1 + L
    padded = jnp.pad(a_BHRLE, [(0, 0)] * (a_BHRLE.ndim - 1) + [(0, L)])
    return padded.reshape(*lead, L * (W + 1))[..., : L * W].reshape(*lead, L, W)


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
    agg_cache: bool = True,
    grad_thru_cache: bool = True,
) -> tuple[jax.Array, State]:
    """Output `[B,H,T,V]` in the dtype of v, and the state after the T tokens.

    q and k (quantised, straight-through) are scaled by K^-1/4 already, as are u, w and r. z holds the codes
    of k, c the codewords. r is the position key of each distance 0 .. M. T must be a multiple of block_len.
    With agg_cache off a query sees the M tokens before it alone; with grad_thru_cache off no gradient passes
    from block to block.
    """
    size = dims.check(
        q_BHTK=q_BHTK, k_BHTK=k_BHTK, v_BHTV=v_BHTV, z_BHT=z_BHT, c_HSK=c_HSK,
        u_HK=u_HK, w_HK=w_HK, r_BHEK=r_BHEK, **state._asdict(),
    )  # fmt: skip
    B, H, T, S, M, L = size["B"], size["H"], size["T"], size["S"], size["M"], block_len
    assert size["E"] == M + 1, f"{size['E']} distances for a memory of {M}"
    assert T % L == 0, f"{T} tokens in blocks of {L}"
    R, n_before = T // L, -(-M // L)
    wide = state.sum_BHSV.dtype
    past = (lambda x: x) if grad_thru_cache else lax.stop_gradient

    z_all = jnp.concatenate([state.z_BHM, z_BHT], 2)
    k_all = jnp.concatenate([state.k_BHMK, k_BHTK.astype(state.k_BHMK.dtype)], 2)
    v_all = jnp.concatenate([state.v_BHMV, v_BHTV], 2)

    # The cache that block r sees: what was carried in and the first r blocks to leave the memory.
    blocks = lambda x: x[:, :, :T].reshape(B, H, R, L, *x.shape[3:])
    count_BHRS, sum_BHRSV = code_sums(blocks(z_all), past(blocks(v_all)), S, wide)
    count_BHRS, sum_BHRSV = running(state.count_BHS, count_BHRS), running(state.sum_BHSV, sum_BHRSV)
    after = State(z_all[:, :, T:], k_all[:, :, T:], v_all[:, :, T:], count_BHRS[:, :, R], sum_BHRSV[:, :, R])
    count_BHRS, sum_BHRSV = count_BHRS[:, :, :R], past(sum_BHRSV[:, :, :R])

    # The window of block r: its own L tokens and, in pieces of L, those before. If L does not divide M the
    # oldest piece begins before the memory, and those columns are never seen.
    n_pad = n_before * L - M

    def pieces(x: jax.Array, fill: int = 0) -> list[jax.Array]:
        x = jnp.pad(x, [(0, 0), (0, 0), (n_pad, 0)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)
        x = x.reshape(B, H, n_before + R, L, *x.shape[3:])
        return [past(x[:, :, p : p + R]) for p in range(n_before)] + [x[:, :, n_before:]]

    q_BHRLK = q_BHTK.reshape(B, H, R, L, -1)
    qu_BHRLK = (q_BHRLK + u_HK[None, :, None, None, :]).astype(k_all.dtype)
    qw_BHRLK = (q_BHRLK + w_HK[None, :, None, None, :]).astype(k_all.dtype)

    # Column j of the window is M + i - j behind query i, so e = j - i counts down the distances from M.
    r_BHEK = r_BHEK[:, :, ::-1].astype(k_all.dtype)
    near_BHRLW = skew(jnp.einsum("bhrlk,bhek->bhrle", qw_BHRLK, r_BHEK, preferred_element_type=wide))
    i, j = jnp.arange(L)[:, None], jnp.arange(-n_pad, M + L)[None, :]
    oldest = jnp.zeros_like(i) if agg_cache else i
    seen = (j >= oldest) & (j <= i + M)
    near_BHRLW = jnp.pad(near_BHRLW, [(0, 0)] * 4 + [(n_pad, 0)])

    scores, values = [], pieces(v_all)
    for p, (k_BHRLK, z_BHRL) in enumerate(zip(pieces(k_all), pieces(z_all, fill=S), strict=True)):
        columns = slice(p * L, (p + 1) * L)
        score = jnp.einsum("bhrlk,bhrjk->bhrlj", qu_BHRLK, k_BHRLK, preferred_element_type=wide)
        score = score + near_BHRLW[..., columns]
        visible = seen[None, None, None, :, columns] & (z_BHRL < S)[:, :, :, None, :]
        scores.append(jnp.where(visible, score, UNSEEN))
    if agg_cache:
        score = jnp.einsum(
            "bhrlk,hsk->bhrls", qu_BHRLK, c_HSK.astype(k_all.dtype), preferred_element_type=wide
        )
        log_count = jnp.where(count_BHRS > 0, jnp.log(jnp.maximum(count_BHRS, 1.0)), UNSEEN)
        scores.append(score + log_count[:, :, :, None, :])
        mean_BHRSV = sum_BHRSV / jnp.maximum(count_BHRS, 1.0)[..., None]
        values.append(mean_BHRSV.astype(v_all.dtype))

    o_BHRLV = softmax_sum(scores, values)
    return o_BHRLV.astype(v_BHTV.dtype).reshape(B, H, T, -1), after


def softmax_sum(scores: list[jax.Array], values: list[jax.Array]) -> jax.Array:
    """Values `[...,J,V]` weighted by one softmax over all scores `[...,L,J]`, in the dtype of the scores."""
    largest = scores[0].max(-1, keepdims=True)
    for score in scores[1:]:
        largest = jnp.maximum(largest, score.max(-1, keepdims=True))
    largest = lax.stop_gradient(largest)
    weights = [jnp.exp(score - largest) for score in scores]
    total = jnp.sum(jnp.stack([weight.sum(-1) for weight in weights]), 0)[..., None]
    weighted = jnp.zeros((), total.dtype)
    for weight, value in zip(weights, values, strict=True):
        weight = weight.astype(value.dtype)
        weighted += jnp.einsum("...lj,...jv->...lv", weight, value, preferred_element_type=total.dtype)
    return weighted / total


class Ring(NamedTuple):
    """The state while decoding: token t of a sequence lies in slot t mod M until it joins the cache.

    Window scores are looked up among the code scores, so no keys are kept.
    """

    z_BHM: jax.Array
    v_BHMV: jax.Array
    count_BHS: jax.Array
    sum_BHSV: jax.Array


def ring_from_state(state: State, position: jax.Array) -> Ring:
    """The same memory, turned so that slot t mod M holds token t; `position` tokens have been seen."""
    turn = position % state.z_BHM.shape[2]
    return Ring(
        z_BHM=jnp.roll(state.z_BHM, turn, axis=2),
        v_BHMV=jnp.roll(state.v_BHMV, turn, axis=2),
        count_BHS=state.count_BHS,
        sum_BHSV=state.sum_BHSV,
    )


def attend_next(
    q_BHK: jax.Array,
    v_BHV: jax.Array,
    z_BH: jax.Array,
    c_HSK: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_HEK: jax.Array,
    ring: Ring,
    position: jax.Array,
    *,
    agg_cache: bool = True,
) -> tuple[jax.Array, Ring]:
    """Output `[B,H,V]` for token number `position` and the ring with that token in the place of the oldest.

    Equal to `attend` with codewords for keys, in O(S + M) work and memory.
    """
    size = dims.check(q_BHK=q_BHK, v_BHV=v_BHV, z_BH=z_BH, c_HSK=c_HSK, r_HEK=r_HEK, **ring._asdict())
    S, M, wide = size["S"], size["M"], ring.sum_BHSV.dtype
    qu_BHK, qw_BHK = q_BHK + u_HK[None], q_BHK + w_HK[None]
    content_BHS = jnp.einsum("bhk,hsk->bhs", qu_BHK, c_HSK, preferred_element_type=wide)
    near_BHE = jnp.einsum("bhk,hek->bhe", qw_BHK, r_HEK, preferred_element_type=wide)

    distance_M = (position - 1 - jnp.arange(M)) % M + 1
    full_BHM = ring.z_BHM < S
    window_BHM = jnp.take_along_axis(content_BHS, jnp.minimum(ring.z_BHM, S - 1), 2)
    window_BHM = jnp.where(full_BHM, window_BHM + near_BHE[:, :, distance_M], UNSEEN)
    self_BH1 = jnp.take_along_axis(content_BHS, z_BH[..., None], 2) + near_BHE[:, :, :1]
    scores, values = [window_BHM, self_BH1], [ring.v_BHMV, v_BHV[:, :, None]]
    if agg_cache:
        log_count = jnp.where(ring.count_BHS > 0, jnp.log(jnp.maximum(ring.count_BHS, 1.0)), UNSEEN)
        scores.append(content_BHS + log_count)
        values.append(ring.sum_BHSV / jnp.maximum(ring.count_BHS, 1.0)[..., None])
    o_BHV = softmax_sum([s[:, :, None] for s in scores], values)[:, :, 0]

    slot = position % M
    leaving_z, leaving_v = ring.z_BHM[:, :, slot], ring.v_BHMV[:, :, slot]
    fold = jax.vmap(jax.vmap(lambda total, z, x: total.at[z].add(x, mode="drop")))
    return o_BHV.astype(v_BHV.dtype), Ring(
        z_BHM=ring.z_BHM.at[:, :, slot].set(z_BH),
        v_BHMV=ring.v_BHMV.at[:, :, slot].set(v_BHV),
        count_BHS=fold(ring.count_BHS, leaving_z, jnp.ones_like(leaving_z, wide)),
        sum_BHSV=fold(ring.sum_BHSV, leaving_z, leaving_v.astype(wide)),
    )
