"""The attention core alone, forward and backward, for benchmarks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tvq import sharding
from tvq.model import attention, unit, vq
from tvq.schema import Model


def inputs(model: Model, n_sequence: int, sequence_len: int) -> tuple:
    """Random arguments of `both_ways`; keys are codewords."""
    B, T, H, K, V, S = n_sequence, sequence_len, model.n_head, model.d_k, model.d_v, model.n_code
    E, dtype = model.mem_len + 1, jnp.dtype(model.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)

    @jax.jit
    def make() -> tuple:
        keys = iter(jax.random.split(jax.random.key(0), 8))
        scaled = lambda *shape: K**-0.25 * jax.random.normal(next(keys), shape, wide)
        c_HSK, z_BHT = scaled(H, S, K), jax.random.randint(next(keys), (B, H, T), 0, S)
        v_BHTV, do_BHTV = (jax.random.normal(next(keys), (B, H, T, V), dtype) for _ in range(2))
        fixed = (z_BHT, c_HSK, scaled(H, K), scaled(H, K), scaled(B, H, E, K))
        return scaled(B, H, T, K), vq.lookup(z_BHT, c_HSK), v_BHTV, fixed, do_BHTV

    return make()


def both_ways(model: Model) -> Callable[..., tuple]:
    """The attention core, forward and backward: `(q, k, v, fixed, do) -> (o, dq, dk, dv)`."""

    def attend(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTV: jax.Array, fixed: tuple) -> jax.Array:
        z_BHT, c_HSK, u_HK, w_HK, r_BHEK = fixed
        B, H, T, K, V, M, S = *q_BHTK.shape[:3], model.d_k, model.d_v, model.mem_len, model.n_code
        start_BX = None if model.attend_across_documents else jnp.zeros((B, M + 1 + T), jnp.int32)
        empty = attention.initial_state(B, H, M, S, K, V, v_BHTV.dtype)
        keys = unit.Keys(q_BHTK, k_BHTK, z_BHT, c_HSK, u_HK, w_HK, r_BHEK)
        return unit.attend(keys, v_BHTV, empty, start_BX, model, sharding.UNCUT)[0]

    def both(q_BHTK: jax.Array, k_BHTK: jax.Array, v_BHTV: jax.Array, fixed: tuple, do: jax.Array) -> tuple:
        o_BHTV, back = jax.vjp(lambda q, k, v: attend(q, k, v, fixed), q_BHTK, k_BHTK, v_BHTV)
        return o_BHTV, *back(do)

    return both
