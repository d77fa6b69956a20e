"""Quadratic attention, for comparison: the same unit with exact softmax over all earlier keys.

Parameters, position scores within M tokens and gates are the same; keys are not quantised, and every query
scores every key before it.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from tvq import dims
from tvq.model.window import UNSEEN, skew, softmax_sum

# Queries are taken in groups that read the keys up to the group's end: of the half of all scores that the
# causal mask removes, all but an eighth are never computed.
N_GROUP = 8


@jax.named_scope("attention")
def attend(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTV: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_BHEK: jax.Array,
    *,
    block_len: int,
    start_BX: jax.Array | None = None,
) -> jax.Array:
    """Output `[B,H,T,V]` in the dtype of v, for a whole sequence from its first token on.

    Arguments as for `attention.attend`, with the keys themselves. One block of queries at a time, whose
    scores are computed again in the backward pass, so memory grows linearly with T.
    """
    size = dims.check(q_BHTK=q_BHTK, k_BHTK=k_BHTK, v_BHTV=v_BHTV, u_HK=u_HK, w_HK=w_HK, r_BHEK=r_BHEK)
    B, H, T, M, L = size["B"], size["H"], size["T"], size["E"] - 1, block_len
    assert T % L == 0, f"{T} tokens in blocks of {L}"
    wide, narrow = jnp.promote_types(v_BHTV.dtype, jnp.float32), v_BHTV.dtype
    r_BHEK = r_BHEK[:, :, ::-1].astype(narrow)
    # M empty keys in front: the window of every block then begins at its own first column.
    front = lambda x: jnp.pad(x.astype(narrow), [(0, 0), (0, 0), (M, 0), (0, 0)])
    k_all, v_all = front(k_BHTK), front(v_BHTV)
    start_BX = None if start_BX is None else start_BX[:, 1:]
    q_RBHLK = jnp.moveaxis(q_BHTK.reshape(B, H, -1, L, q_BHTK.shape[-1]), 2, 0)

    def group(first: int, last: int) -> jax.Array:
        """Blocks first .. last - 1: `[R,B,H,L,V]`."""
        k, v = k_all[:, :, : M + last * L], v_all[:, :, : M + last * L]
        column_X = jnp.arange(k.shape[2])

        @jax.checkpoint
        def block(scanned: tuple) -> jax.Array:
            q_BHLK, r = scanned
            qu_BHLK = (q_BHLK + u_HK[None, :, None]).astype(narrow)
            qw_BHLK = (q_BHLK + w_HK[None, :, None]).astype(narrow)
            score = jnp.einsum("bhlk,bhxk->bhlx", qu_BHLK, k, preferred_element_type=wide)
            near = skew(jnp.einsum("bhlk,bhek->bhle", qw_BHLK, r_BHEK, preferred_element_type=wide))
            window = lax.dynamic_slice_in_dim(score, r * L, M + L, axis=3) + near
            score = lax.dynamic_update_slice_in_dim(score, window, r * L, axis=3)
            last_LX = (M + r * L + jnp.arange(L))[:, None]
            seen_BHLX = ((column_X[None] >= M) & (column_X[None] <= last_LX))[None, None]
            if start_BX is not None:
                start_BL = lax.dynamic_slice_in_dim(start_BX, M + r * L, L, axis=1)
                seen_BHLX &= (start_BL[:, :, None] == start_BX[:, None, : k.shape[2]])[:, None]
            o_BHLV, _ = softmax_sum([jnp.where(seen_BHLX, score, UNSEEN)], [v])
            return o_BHLV.astype(narrow)

        return lax.map(block, (q_RBHLK[first:last], jnp.arange(first, last)))

    R = T // L
    n_group = min(N_GROUP, R)
    edges = [g * R // n_group for g in range(n_group + 1)]
    o_RBHLV = jnp.concatenate([group(a, b) for a, b in itertools.pairwise(edges)])
    return jnp.moveaxis(o_RBHLV, 0, 2).reshape(v_BHTV.shape)
