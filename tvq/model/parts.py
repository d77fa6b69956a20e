"""A sequence cut over devices: each reads a contiguous part of its tokens, all at the same time.

Attention is unaware of this. A part is given the state that it would have after the parts before it: their
last M tokens, sent from neighbour to neighbour, and a cache to which each of them has added one count and one
sum of values per code. What is sent does not grow with the sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tvq import sharding
from tvq.model import attention, cache, window


def shared(tree: Any, axes: sharding.Axes) -> Any:
    """What each part of the values reads whole: its gradients are summed over the parts in one reduction."""
    return sharding.varying(tree, (axes.V,)) if axes.V else tree


def with_neighbours(
    state: attention.State, z_BHT: jax.Array, k_BHTK: jax.Array, axes: sharding.Axes
) -> attention.State:
    """The state with the codes and keys of the M tokens before this part."""
    if not axes.T:
        return state
    z_BHM, k_BHMK = halo(state.z_BHM, z_BHT, axes.T), halo(state.k_BHMK, k_BHTK, axes.T)
    return state._replace(z_BHM=z_BHM, k_BHMK=k_BHMK)


def halo(memory: jax.Array, x: jax.Array, axis: str) -> jax.Array:
    """The M newest tokens before this part, along dim 2: from the parts of x before it, then from the memory.

    `memory` is `[B,H,M,...]`, that before the first part; x is `[B,H,T,...]`, the tokens of this part.
    """
    i, n_part, M, T = lax.axis_index(axis), lax.axis_size(axis), memory.shape[2], x.shape[2]
    sent = x[:, :, -M:].astype(memory.dtype)
    n_hop = min(-(-M // T), n_part - 1)
    hops = [
        lax.ppermute(sent, axis, [(j, j + hop) for j in range(n_part - hop)]) for hop in range(n_hop, 0, -1)
    ]
    newer = jnp.concatenate([jnp.zeros_like(memory), *hops], 2)[:, :, -M:]
    n_newer = jnp.minimum(i, n_hop) * sent.shape[2]  # no part comes before the first
    older = jnp.concatenate([memory, jnp.zeros_like(memory)], 2)
    older = lax.dynamic_slice_in_dim(sharding.varying(older, (axis,)), jnp.minimum(n_newer, M), M, axis=2)
    is_newer_M = jnp.arange(M) >= M - n_newer
    newest = jnp.where(is_newer_M.reshape(-1, *[1] * (x.ndim - 3)), newer, older)
    return checkpoint_name(newest, window.KEPT)  # otherwise the backward pass would send it again


def starts(memory_BE: jax.Array, begun_BT: jax.Array, axis: str) -> jax.Array:
    """The start of the document of each of the M + 1 tokens before this part and of its T: `[B,M+1+T]`.

    `memory_BE` are those before the first part; `begun_BT` is the position of a token that begins a document,
    else 0.
    """
    own_BT = lax.cummax(begun_BT, axis=1)
    last_XB = lax.all_gather(own_BT[:, -1], axis)
    is_earlier_X = jnp.arange(len(last_XB)) < lax.axis_index(axis)
    open_B = jnp.max(last_XB, 0, where=is_earlier_X[:, None], initial=0)
    start_BT = jnp.maximum(own_BT, jnp.maximum(open_B, memory_BE[:, -1])[:, None])
    return jnp.concatenate([halo(memory_BE[:, None], start_BT[:, None], axis)[:, 0], start_BT], 1)


def carried_in(
    state: attention.State,
    z_BHT: jax.Array,
    v_BHTV: jax.Array,
    start_BX: jax.Array | None,
    block_len: int,
    axis: str,
) -> attention.State:
    """The state before this part, from that before the first part, with codes and keys of `halo` already.

    Documents are kept apart by `starts`: the cache then holds that of the last token that left the memory.
    """
    B, H, T = z_BHT.shape
    n_part = lax.axis_size(axis)
    v_BHMV = halo(state.v_BHMV, v_BHTV, axis)
    # What leaves the memory while this part is read, in the blocks in which attention adds it up again.
    leaving = lambda old, new: jnp.concatenate([old, new], 2)[:, :, :T].reshape(
        B, H, -1, block_len, *new.shape[3:]
    )
    count_BHRS, sum_BHRSV = cache.before_blocks(
        jnp.zeros_like(state.count_BHS),
        jnp.zeros_like(state.sum_BHSV),
        leaving(state.z_BHM, z_BHT),
        leaving(v_BHMV, v_BHTV),
        start_BX,
    )
    # Part i has what the parts j before it have added, as far as it is of the last document added.
    own_XXB = jnp.broadcast_to(jnp.tril(jnp.ones((n_part, n_part), bool), -1)[..., None], (n_part, n_part, B))
    count_BHS, sum_BHSV = state.count_BHS, state.sum_BHSV
    if start_BX is not None:
        cache_XB = lax.all_gather(start_BX[:, 0], axis)
        added_XB = jnp.roll(
            cache_XB, -1, 0
        )  # the document that part j added last is the one that part j + 1 starts with
        own_XXB = own_XXB & (cache_XB[:, None] == added_XB[None])
        is_own_B = cache_XB[0] == start_BX[:, 0]
        count_BHS = jnp.where(is_own_B[:, None, None], count_BHS, 0.0)
        sum_BHSV = jnp.where(is_own_B[:, None, None, None], sum_BHSV, 0.0)
    count_BHS += earlier_sum(count_BHRS[:, :, -1, :, None], own_XXB, axis)[..., 0]
    sum_BHSV += earlier_sum(sum_BHRSV[:, :, -1], own_XXB, axis)
    count_BHS, sum_BHSV = checkpoint_name((count_BHS, sum_BHSV), window.KEPT)
    return state._replace(v_BHMV=v_BHMV, count_BHS=count_BHS, sum_BHSV=sum_BHSV)


def earlier_sum(x_BHSX: jax.Array, own_XXB: jax.Array, axis: str) -> jax.Array:
    """The sum of x over the parts j for which own[i,j] holds, for this part i.

    Each device adds up a slice of the codes for all parts: what it sends and receives is twice the size of x,
    however many parts there are.
    """
    n_part, S = lax.axis_size(axis), x_BHSX.shape[2]
    padded = jnp.pad(x_BHSX, [(0, 0), (0, 0), (0, -S % n_part), (0, 0)])
    B, H, _, X = padded.shape
    slices = jnp.moveaxis(padded.reshape(B, H, n_part, -1, X), 2, 0)
    slices = lax.all_to_all(slices, axis, 0, 0, tiled=True)  # now my slice of every part
    own_XXB = own_XXB.astype(x_BHSX.dtype)
    slices = jnp.einsum("ijb,jbhsx->ibhsx", own_XXB, slices, precision=lax.Precision.HIGHEST)
    slices = lax.all_to_all(slices, axis, 0, 0, tiled=True)
    return jnp.moveaxis(slices, 0, 2).reshape(B, H, -1, X)[:, :, :S]


def carried_out(tree: Any, axis: str) -> Any:
    """The values of the last part, on all devices."""
    is_last = lax.axis_index(axis) == lax.axis_size(axis) - 1
    return lax.psum(jax.tree.map(lambda x: jnp.where(is_last, x, jnp.zeros_like(x)), tree), axis)
