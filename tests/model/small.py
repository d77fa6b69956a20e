"""A small model that the tests share: two heads, two units, blocks that divide neither memory nor text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tvq import schema
from tvq.model import transformer
from tvq.model.parameters import Weights, init

MODEL = schema.Model(
    n_vocab=11, n_layer=1, n_head=2, d_model=16, d_k=8, d_v=8, n_code=16, block_len=4, mem_len=6,
    pe_lam=100.0, attend_across_documents=True,
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def parameters(model: schema.Model) -> Weights:
    """Random ones everywhere: as they start out, biases are 0 and the position's scale hides it."""
    key = jax.random.key(0)
    weights = init(model, key)
    leaves, structure = jax.tree.flatten(weights.params)
    keys = jax.random.split(key, len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return weights._replace(params=jax.tree.unflatten(structure, leaves))


def tokens(n_sequence: int, n_token: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, MODEL.n_vocab, (n_sequence, n_token)), jnp.int32)


def forward(
    weights: Weights, tokens_BT: jax.Array, state: transformer.State, model: schema.Model
) -> tuple[jax.Array, transformer.State]:
    """Log-probabilities `[B,T,C]` of evaluation, and the next state."""
    x_BTD, state, *_ = transformer.forward(weights, tokens_BT, jnp.ones_like(tokens_BT), state, model)
    return transformer.log_probs(weights, x_BTD, model), state


log_probs = jax.jit(forward, static_argnums=3)


def close(got: object, want: object, tolerance: float) -> None:
    """The largest deviation of each array is at most `tolerance` of its largest entry."""
    for (path, a), (_, b) in zip(*map(jax.tree.leaves_with_path, (got, want)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max(initial=0.0)
        limit = tolerance * np.abs(b).max(initial=0.0)
        assert error <= limit, f"{jax.tree_util.keystr(path)} off by {error:.2e}, {limit:.2e} allowed"
