"""Gradients of a batch that is read a part at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tvq import model as lm
from tvq import sharding


def over_parts(
    read: Callable, n: int, parts: tuple, state: lm.State, dims: lm.State, *, in_pairs: bool = False
) -> tuple:
    """`(sums, state)` of `read(*parts, state)` for all sequences, of which it reads an n-th at a time.

    `parts` are trees of arrays `[B,...]`; `dims` are the letters of the state's. Parts are added one by
    one, or in pairs, which `sums.in_pairs` continues over devices.
    """
    if n == 1:
        return read(*parts, state)
    cut = lambda x, dim: jnp.moveaxis(x.reshape(*x.shape[:dim], n, -1, *x.shape[dim + 1 :]), dim, 0)
    join = lambda x, dim: jnp.moveaxis(x, 0, dim).reshape(*x.shape[1 : dim + 1], -1, *x.shape[dim + 2 :])
    # What all sequences share is given to each part, and is the same after each.
    states = jax.tree.map(
        lambda letters, x: cut(x, letters.index("B")) if "B" in letters else jnp.stack([x] * n), dims, state
    )
    parts = (*jax.tree.map(lambda x: cut(x, 0), parts), states)
    sums, states = pairs(read, parts, n) if in_pairs else in_turn(read, parts)
    joined = lambda letters, x: join(x, letters.index("B")) if "B" in letters else x[0]
    return sums, jax.tree.map(joined, dims, states)


def in_turn(read: Callable, parts: tuple) -> tuple:
    """Sums of what `read` gives for the parts, added one by one, and the next states."""

    def add(total: Any, part: tuple) -> tuple:
        sums, state = read(*part)
        return jax.tree.map(jnp.add, total, sums), state

    like, _ = jax.eval_shape(read, *jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: sharding.varying(jnp.zeros(x.shape, x.dtype), sharding.varies(x)), like)
    return lax.scan(add, zero, parts)


def pairs(read: Callable, parts: tuple, n: int) -> tuple:
    """The same for n parts, added as `sums.in_pairs` does."""
    if n == 1:
        sums, state = read(*jax.tree.map(lambda x: x[0], parts))
        return sums, jax.tree.map(lambda x: x[None], state)
    n_outer = 2 if n % 2 == 0 else n
    parts = jax.tree.map(lambda x: x.reshape(n_outer, -1, *x.shape[1:]), parts)
    each, states = lax.map(lambda part: pairs(read, part, n // n_outer), parts)
    # Added outside the loop: inside, a product may be fused with the sum, and then rounds only once.
    return jax.tree.map(lambda x: x.sum(0), each), jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), states)
