"""Sums over the devices of a mesh, inside `shard_map`: in any order and few messages, or in a fixed order."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tvq import sharding


def total(tree: Any, specs: Any, axes: tuple[str, ...], fixed_order: bool = False) -> Any:
    """Inside `shard_map`, each array summed over those axes that do not cut it, in few reductions.

    With `fixed_order`, by `in_pairs`.
    """
    leaves, structure = jax.tree.flatten(tree)
    cut_by = [set(jax.tree.leaves(tuple(spec))) for spec in jax.tree.leaves(specs)]
    over = [tuple(axis for axis in axes if axis not in cut) for cut in cut_by]
    add = in_pairs if fixed_order else _total
    for group in set(over):
        members = [i for i, name in enumerate(over) if name == group]
        for i, x in zip(members, add([leaves[i] for i in members], group), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def _total(arrays: list[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """Sums. Over several replicas, the slow network carries to each device only its part of them."""
    if not set(sharding.DATA_AXES) <= set(axes) or lax.axis_size("replica") == 1:
        return lax.psum(arrays, axes)
    n_part = lax.axis_size("devices")
    flat = jax.tree.map(lambda x: jnp.pad(x.reshape(-1), (0, -x.size % n_part)), arrays)
    rest = tuple(axis for axis in axes if axis != "devices")
    parts = lax.psum(lax.psum_scatter(flat, "devices", tiled=True), rest)
    flat = lax.all_gather(parts, "devices", tiled=True, to="invarying")
    return [x[: like.size].reshape(like.shape) for x, like in zip(flat, arrays, strict=True)]


def in_pairs(tree: Any, axes: tuple[str, ...]) -> Any:
    """Inside `shard_map`, arrays summed over the axes: two neighbours, two such sums, and so on.

    For powers of two; an odd number of terms is added one by one. A device adds up a part of each array, and
    sends as many bytes as for a sum in any order.
    """
    n_part = lax.axis_size(axes)

    def one(x: jax.Array) -> jax.Array:
        part = jnp.pad(x.reshape(-1), (0, -x.size % n_part))
        for axis in reversed(axes):
            terms = lax.all_to_all(part.reshape(lax.axis_size(axis), -1), axis, 0, 0, tiled=True)
            while len(terms) % 2 == 0:
                terms = terms[0::2] + terms[1::2]
            part = terms.sum(0)
        for axis in axes:
            part = lax.all_gather(part, axis, tiled=True, to="invarying")
        return part[: x.size].reshape(x.shape)

    return jax.tree.map(one, tree)
