"""Attention while decoding: one token at a time, at a cost that does not grow with the context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq import dims
from tvq.model.attention import State
from tvq.model.window import UNSEEN, log_count, softmax_sum


class Ring(NamedTuple):
    """The state while decoding: token t of a sequence lies in slot t mod M until it joins the cache.

    Window scores are looked up among the code scores, so no keys are kept. A sum whose count is 0 is void.
    `lost` is what the sums lost in rounding, to be added with the next value: otherwise small values, added
    one by one, would soon no longer change a float32 sum.
    """

    z_BHM: jax.Array
    v_BHMV: jax.Array
    count_BHS: jax.Array
    sum_BHSV: jax.Array
    lost_BHSV: jax.Array


def ring_from_state(state: State, position: jax.Array) -> Ring:
    """The same memory, turned so that slot t mod M holds token t; `position` tokens have been seen."""
    turn = position % state.z_BHM.shape[2]
    return Ring(
        z_BHM=jnp.roll(state.z_BHM, turn, axis=2),
        v_BHMV=jnp.roll(state.v_BHMV, turn, axis=2),
        count_BHS=state.count_BHS,
        sum_BHSV=state.sum_BHSV,
        lost_BHSV=jnp.zeros(state.sum_BHSV.shape, state.v_BHMV.dtype),
    )


def emptied(ring: Ring, ended_B: jax.Array) -> Ring:
    """The ring, emptied for sequences whose document has ended. Their sums, most of its memory, are void."""
    return ring._replace(
        z_BHM=jnp.where(ended_B[:, None, None], ring.count_BHS.shape[2], ring.z_BHM),
        count_BHS=jnp.where(ended_B[:, None, None], 0.0, ring.count_BHS),
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
        scores.append(content_BHS + log_count(ring.count_BHS))
        values.append(ring.sum_BHSV / jnp.maximum(ring.count_BHS, 1.0)[..., None])
    o_BH1V, _ = softmax_sum([s[:, :, None] for s in scores], values)
    o_BHV = o_BH1V[:, :, 0]

    slot = position % M
    leaving_z, leaving_v = ring.z_BHM[:, :, slot], ring.v_BHMV[:, :, slot]
    fold = jax.vmap(jax.vmap(_fold))
    caches = fold(ring.count_BHS, ring.sum_BHSV, ring.lost_BHSV, leaving_z, leaving_v.astype(wide))
    return o_BHV.astype(v_BHV.dtype), Ring(
        ring.z_BHM.at[:, :, slot].set(z_BH), ring.v_BHMV.at[:, :, slot].set(v_BHV), *caches
    )


def _fold(count_S: jax.Array, sum_SV: jax.Array, lost_SV: jax.Array, z: jax.Array, v_V: jax.Array) -> tuple:
    """Adds a value to code z, by compensated summation (Kahan 1965); code S counts nowhere."""
    used = count_S.at[z].get(mode="fill", fill_value=0) > 0
    old_V, lost_V = (jnp.where(used, x.at[z].get(mode="clip"), 0) for x in (sum_SV, lost_SV))
    more_V = v_V + lost_V
    new_V = old_V + more_V
    lost_V = (more_V - (new_V - old_V)).astype(lost_SV.dtype)
    return (
        count_S.at[z].add(1, mode="drop"),
        sum_SV.at[z].set(new_V, mode="drop"),
        lost_SV.at[z].set(lost_V, mode="drop"),
    )
