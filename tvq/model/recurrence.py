"""Attention while decoding: one token at a time, at a cost that does not grow with the context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from tvq import dims
from tvq.model.attention import State
from tvq.model.window import UNSEEN, log_count


class Rings(NamedTuple):
    """The state of all units while decoding. Token t lies in slot t mod X, X = M + 2.

    One slot more than a token sees: the token that joins the cache can be read after the newest is written.
    Window scores are looked up among the code scores, so no keys are kept. A sum whose count is 0 is void.
    `lost` is what the sums lost in rounding, to be added with the next value: otherwise small values, added
    one by one, would soon no longer change a float32 sum.
    """

    z_NBHX: jax.Array
    v_NBHXV: jax.Array
    count_NBHS: jax.Array
    sum_NBHSV: jax.Array
    lost_NBHSV: jax.Array


def rings_from_state(units: State, position: jax.Array) -> Rings:
    """The same memory; `position` tokens have been seen. Every array of `units` has a leading N."""
    S, X = units.count_BHS.shape[3], units.z_BHM.shape[3] + 2
    two = [(0, 0)] * 3 + [(2, 0)]
    turned = lambda x: jnp.roll(x, position % X, axis=3)
    return Rings(
        z_NBHX=turned(jnp.pad(units.z_BHM, two, constant_values=S)),
        v_NBHXV=turned(jnp.pad(units.v_BHMV, [*two, (0, 0)])),
        count_NBHS=units.count_BHS,
        sum_NBHSV=units.sum_BHSV,
        lost_NBHSV=jnp.zeros(units.sum_BHSV.shape, units.v_BHMV.dtype),
    )


def emptied(rings: Rings, ended_B: jax.Array) -> Rings:
    """The rings, emptied for sequences whose document has ended. Their sums, most of the memory, are void."""
    ended_1B11 = ended_B[None, :, None, None]
    return rings._replace(
        z_NBHX=jnp.where(ended_1B11, rings.count_NBHS.shape[3], rings.z_NBHX),
        count_NBHS=jnp.where(ended_1B11, 0.0, rings.count_NBHS),
    )


def attend_next(
    q_BHK: jax.Array,
    v_BHV: jax.Array,
    z_BH: jax.Array,
    c_HSK: jax.Array,
    u_HK: jax.Array,
    w_HK: jax.Array,
    r_HEK: jax.Array,
    rings: Rings,
    n: jax.Array,
    position: jax.Array,
    *,
    agg_cache: bool = True,
) -> tuple[jax.Array, Rings]:
    """Output `[B,H,V]` of unit n for token number `position`, and the rings with that token.

    Equal to `attend` with codewords for keys, in O(S + M) work and memory.
    """
    size = dims.check(q_BHK=q_BHK, v_BHV=v_BHV, z_BH=z_BH, c_HSK=c_HSK, r_HEK=r_HEK, **rings._asdict())
    S, E, X, wide = size["S"], size["E"], size["X"], rings.sum_NBHSV.dtype
    # All is first written, then read: a loop over units and tokens then changes the rings in place.
    newest = (n, slice(None), slice(None), position % X)
    rings = rings._replace(
        z_NBHX=rings.z_NBHX.at[newest].set(z_BH), v_NBHXV=rings.v_NBHXV.at[newest].set(v_BHV)
    )
    rings = to_cache(rings, n, (position - E) % X)
    of_unit = lambda x: lax.dynamic_index_in_dim(x, n, keepdims=False)
    z_BHX, v_BHXV, count_BHS, sum_BHSV = map(of_unit, rings[:4])
    product = lambda letters, *x: jnp.einsum(letters, *x, preferred_element_type=wide)
    content_BHS = product("bhk,hsk->bhs", q_BHK + u_HK[None], c_HSK)
    near_BHE = product("bhk,hek->bhe", q_BHK + w_HK[None], r_HEK)

    distance_X = (position - jnp.arange(X)) % X
    score_BHX = jnp.take_along_axis(content_BHS, jnp.minimum(z_BHX, S - 1), 2)
    score_BHX += near_BHE[:, :, jnp.minimum(distance_X, E - 1)]
    score_BHX = jnp.where((z_BHX < S) & (distance_X < E)[None, None], score_BHX, UNSEEN)
    codes_BHS = content_BHS + log_count(count_BHS) if agg_cache else jnp.full_like(content_BHS, UNSEEN)
    weight_BHX, weight_BHS = jnp.split(jax.nn.softmax(jnp.concatenate([score_BHX, codes_BHS], 2)), [X], 2)
    o_BHV = product("bhx,bhxv->bhv", weight_BHX.astype(v_BHXV.dtype), v_BHXV)
    if agg_cache:
        # The weights are divided, not the sums, which are most of what is read.
        weight_BHS /= jnp.maximum(count_BHS, 1.0)
        # Where they lie: on a GPU, XLA would otherwise turn the sums of all units, for each unit.
        sum_BHSV = with_layout_constraint(sum_BHSV, Layout(major_to_minor=(0, 1, 2, 3)))
        o_BHV += product("bhs,bhsv->bhv", weight_BHS, sum_BHSV)
    return o_BHV.astype(v_BHV.dtype), rings


def to_cache(rings: Rings, n: jax.Array, slot: jax.Array) -> Rings:
    """The token in a slot of unit n joins the cache, by compensated summation (Kahan 1965)."""
    z_BH, v_BHV = rings.z_NBHX[n, :, :, slot], rings.v_NBHXV[n, :, :, slot]
    B, H = z_BH.shape
    code = (n, jnp.arange(B)[:, None], jnp.arange(H)[None], z_BH)  # code S, an empty slot, counts nowhere
    count_BH, old_BHV, lost_BHV = (x.at[code].get(mode="clip") for x in rings[2:])
    used_BH1 = count_BH[..., None] > 0
    old_BHV, lost_BHV = jnp.where(used_BH1, old_BHV, 0), jnp.where(used_BH1, lost_BHV, 0)
    more_BHV = v_BHV.astype(old_BHV.dtype) + lost_BHV
    new_BHV = old_BHV + more_BHV
    lost_BHV = (more_BHV - (new_BHV - old_BHV)).astype(lost_BHV.dtype)
    return rings._replace(
        count_NBHS=rings.count_NBHS.at[code].set(count_BH + 1, mode="drop"),
        sum_NBHSV=rings.sum_NBHSV.at[code].set(new_BHV, mode="drop"),
        lost_NBHSV=rings.lost_NBHSV.at[code].set(lost_BHV, mode="drop"),
    )
