"""One softmax over window and cache of each block, forward and backward: the place for a kernel."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Names what a rematerialised unit keeps: projections, position keys, codes, counts and means of the cache,
# output and normaliser.
KEPT = "kept"
# The score of a key that may not be seen: finite, so that no difference of two scores is NaN.
UNSEEN = -1e30


class Documents(NamedTuple):
    """The starts of the documents of each block's queries, of the keys of its window, and of its cache."""

    query_B1RL: jax.Array
    keys_B1RL: list[jax.Array]
    cache_B1R: jax.Array


class Cache(NamedTuple):
    """The codewords, and for each code the mean and the number of the values before the window."""

    c_HSK: jax.Array
    mean_BHRSV: jax.Array
    count_BHRS: jax.Array


class Window(NamedTuple):
    """What the queries of each block see. Window keys and values are lists of blocks, oldest first.

    Gradients go to queries, position keys, window keys, values and cache means.
    """

    qu_BHRLK: jax.Array  # queries with the content bias,
    qw_BHRLK: jax.Array  # and with the position bias
    r_BHEK: jax.Array  # position keys, the most distant first
    ks_BHRLK: list[jax.Array]
    vs_BHRLV: list[jax.Array]
    filled_BHRL: list[jax.Array]  # bool: false before the first token
    apart: Documents | None = None  # where documents are kept apart
    cache: Cache | None = None

    @property
    def values(self) -> list[jax.Array]:
        return self.vs_BHRLV if self.cache is None else [*self.vs_BHRLV, self.cache.mean_BHRSV]


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


def documents(start_BX: jax.Array, block_len: int, mem_len: int) -> Documents:
    keys = pieces(start_BX[:, None, 1:], block_len, mem_len)
    # The token before the memory is the last that left it.
    return Documents(keys[-1], keys, start_BX[:, None, : -mem_len - 1 : block_len])


def pieces(x: jax.Array, block_len: int, mem_len: int, past: Callable = lambda x: x) -> list[jax.Array]:
    """The window of every block, oldest first, in pieces `[B,H,R,L,...]` of a block each.

    x is `[B,H,M+T,...]`. If L does not divide M the oldest piece begins with zeros or with tokens that have
    left the memory: those columns are not in the window.
    """
    n_before = -(-mem_len // block_len)
    n_pad = n_before * block_len - mem_len
    x = jnp.pad(x, [(0, 0), (0, 0), (n_pad, 0)] + [(0, 0)] * (x.ndim - 3))
    T = x.shape[2] - n_before * block_len
    # Cut before it is reshaped: the newest piece is then seen to be the call's own tokens, and not copied.
    cut = [x[:, :, p * block_len : p * block_len + T] for p in range(n_before + 1)]
    blocks = [piece.reshape(*x.shape[:2], -1, block_len, *x.shape[3:]) for piece in cut]
    return [past(block) for block in blocks[:-1]] + blocks[-1:]


def scores(window: Window) -> list[jax.Array]:
    """Scores of each piece of the window `[B,H,R,L,L]`, then, with a cache, of the codes `[B,H,R,L,S]`."""
    qu_BHRLK, r_BHEK, apart, cache = window.qu_BHRLK, window.r_BHEK, window.apart, window.cache
    L, M = qu_BHRLK.shape[3], r_BHEK.shape[2] - 1
    n_pad = (len(window.ks_BHRLK) - 1) * L - M
    wide = jnp.promote_types(qu_BHRLK.dtype, jnp.float32)
    # Column j of the window lies M + i - j behind query i: r counts the distances down from M.
    near_BHRLE = jnp.einsum("bhrlk,bhek->bhrle", window.qw_BHRLK, r_BHEK, preferred_element_type=wide)
    near_BHRLW = jnp.pad(skew(near_BHRLE), [(0, 0)] * 4 + [(n_pad, 0)])
    i, j = jnp.arange(L)[:, None], jnp.arange(-n_pad, M + L)[None, :]
    oldest = i if cache is None else jnp.zeros_like(i)
    seen_LW = (j >= oldest) & (j <= i + M)
    pieces_and_codes = []
    for p, (k_BHRLK, filled_BHRL) in enumerate(zip(window.ks_BHRLK, window.filled_BHRL, strict=True)):
        columns = slice(p * L, (p + 1) * L)
        score = jnp.einsum("bhrlk,bhrjk->bhrlj", qu_BHRLK, k_BHRLK, preferred_element_type=wide)
        visible = seen_LW[None, None, None, :, columns] & filled_BHRL[:, :, :, None, :]
        if apart is not None:
            visible &= apart.query_B1RL[..., None] == apart.keys_B1RL[p][..., None, :]
        pieces_and_codes.append(jnp.where(visible, score + near_BHRLW[..., columns], UNSEEN))
    if cache is not None:
        score = jnp.einsum("bhrlk,hsk->bhrls", qu_BHRLK, cache.c_HSK, preferred_element_type=wide)
        score += log_count(cache.count_BHRS)[:, :, :, None, :]
        if apart is not None:
            own_B1RL = apart.query_B1RL == apart.cache_B1R[..., None]
            score = jnp.where(own_B1RL[..., None], score, UNSEEN)
        pieces_and_codes.append(score)
    return pieces_and_codes


def log_count(count: jax.Array) -> jax.Array:
    """What a code's score gains by standing for `count` keys."""
    return jnp.where(count > 0, jnp.log(jnp.maximum(count, 1.0)), UNSEEN)


@jax.custom_vjp
def attend(window: Window) -> jax.Array:
    """The output `[B,H,R,L,V]`: values weighted by one softmax over window and cache.

    The backward pass computes the scores again, and keeps only the window, output and normaliser.
    """
    return forward(window)[0]


def forward(window: Window) -> tuple:
    o_BHRLV, lse_BHRL1 = softmax_sum(scores(window), window.values)
    o_BHRLV = checkpoint_name(o_BHRLV.astype(window.vs_BHRLV[-1].dtype), KEPT)
    return o_BHRLV, (window, o_BHRLV, checkpoint_name(lse_BHRL1, KEPT))


def backward(kept: tuple, do_BHRLV: jax.Array) -> tuple[Window]:
    window, o_BHRLV, lse_BHRL1 = kept
    qu_BHRLK, qw_BHRLK, r_BHEK, cache = window.qu_BHRLK, window.qw_BHRLK, window.r_BHEK, window.cache
    wide, narrow = lse_BHRL1.dtype, qu_BHRLK.dtype
    product = partial(jnp.einsum, preferred_element_type=wide)
    do_o_BHRL1 = jnp.sum(do_BHRLV.astype(wide) * o_BHRLV.astype(wide), -1, keepdims=True)
    dscores, dvalues = [], []
    for score, value in zip(scores(window), window.values, strict=True):
        p = jnp.exp(score - lse_BHRL1)
        dp = product("bhrlv,bhrjv->bhrlj", do_BHRLV, value)
        dscores.append((p * (dp - do_o_BHRL1)).astype(narrow))
        dvalue = product("bhrlj,bhrlv->bhrjv", p.astype(do_BHRLV.dtype), do_BHRLV)
        dvalues.append(dvalue.astype(value.dtype))

    dqu_BHRLK = jnp.zeros(qu_BHRLK.shape, wide)
    dks = []
    for dscore, k_BHRLK in zip(dscores, window.ks_BHRLK, strict=False):
        dqu_BHRLK += product("bhrlj,bhrjk->bhrlk", dscore, k_BHRLK)
        dks.append(product("bhrlj,bhrlk->bhrjk", dscore, qu_BHRLK).astype(k_BHRLK.dtype))
    if cache is not None:
        # In this order: with several heads, the CPU has no bfloat16 product for the other.
        dqu_BHRLK += product("hsk,bhrls->bhrlk", cache.c_HSK, dscores[-1])
    n_piece, E = len(window.ks_BHRLK), r_BHEK.shape[2]
    n_pad = (n_piece - 1) * qu_BHRLK.shape[3] - (E - 1)
    dnear_BHRLE = unskew(jnp.concatenate(dscores[:n_piece], -1)[..., n_pad:], E)
    dqw_BHRLK = product("bhrle,bhek->bhrlk", dnear_BHRLE, r_BHEK)
    dr_BHEK = product("bhrle,bhrlk->bhek", dnear_BHRLE, qw_BHRLK)
    nothing: list = [None] * n_piece
    gradient = Window(
        qu_BHRLK=dqu_BHRLK.astype(narrow),
        qw_BHRLK=dqw_BHRLK.astype(narrow),
        r_BHEK=dr_BHEK.astype(narrow),
        ks_BHRLK=dks,
        vs_BHRLV=dvalues[:n_piece],
        filled_BHRL=nothing,
        cache=None if cache is None else Cache(None, dvalues[-1], None),  # type: ignore[arg-type]
    )
    return (gradient,)


attend.defvjp(forward, backward)


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
