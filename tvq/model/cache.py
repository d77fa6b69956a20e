"""The compressive cache (paper section 3.4): count and sum of values of each code, over old tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# Up to this many sums are written out: compilers fuse them with their neighbours.
UNROLLED = 8


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def code_sums(z_BHRL: jax.Array, v_BHRLV: jax.Array, n_code: int, dtype: jnp.dtype) -> tuple:
    """Count `[B,H,R,S]` and sum of values `[B,H,R,S,V]` of each code in each block; code S counts nowhere."""
    # A matrix product, not a scatter: its order of summation is fixed, so runs repeat bitwise on a GPU.
    hit_BHRLS = jax.nn.one_hot(z_BHRL, n_code, dtype=v_BHRLV.dtype)
    sum_BHRSV = jnp.einsum("bhrls,bhrlv->bhrsv", hit_BHRLS, v_BHRLV, preferred_element_type=dtype)
    return jnp.sum(hit_BHRLS, 3, dtype=dtype), sum_BHRSV


def _code_sums_forward(z_BHRL: jax.Array, v_BHRLV: jax.Array, n_code: int, dtype: jnp.dtype) -> tuple:
    return code_sums(z_BHRL, v_BHRLV, n_code, dtype), (z_BHRL, v_BHRLV[:, :, :0])


def _code_sums_backward(n_code: int, dtype: jnp.dtype, kept: tuple, cotangents: tuple) -> tuple:
    z_BHRL, like = kept
    rows = jax.vmap(jax.vmap(jax.vmap(lambda g_SV, z_L: g_SV.at[z_L].get(mode="fill", fill_value=0))))
    return None, rows(cotangents[1].astype(like.dtype), z_BHRL)


code_sums.defvjp(_code_sums_forward, _code_sums_backward)


def running(x0_BHX: jax.Array, x_BHRX: jax.Array, kept_BR: jax.Array | None = None) -> jax.Array:
    """`x0 + x_0 + ... + x_{r-1}` for r = 0 .. R, along axis 2; where `kept` is false at r, the sum
    starts again from x_r. Nothing is subtracted, so what was dropped leaves no rounding behind.
    """
    # x0 grows with the tokens before: added once and last, it rounds least.
    if x_BHRX.shape[2] <= UNROLLED:
        totals, old_BHX, new_BHX = [x0_BHX], x0_BHX, jnp.zeros_like(x0_BHX)
        for r, x_BHX in enumerate(jnp.moveaxis(x_BHRX, 2, 0)):
            if kept_BR is not None:
                kept_BX = kept_BR[:, r].reshape(-1, *[1] * (x_BHX.ndim - 1))
                old_BHX, new_BHX = jnp.where(kept_BX, old_BHX, 0.0), jnp.where(kept_BX, new_BHX, 0.0)
            new_BHX = new_BHX + x_BHX
            totals.append(old_BHX + new_BHX)
        return jnp.stack(totals, 2)
    if kept_BR is None:
        return x0_BHX[:, :, None] + jnp.pad(
            jnp.cumsum(x_BHRX, 2), [(0, 0)] * 2 + [(1, 0)] + [(0, 0)] * (x_BHRX.ndim - 3)
        )
    x_BHRX = jnp.concatenate([x0_BHX[:, :, None], x_BHRX], 2)
    kept_BR = jnp.pad(kept_BR, [(0, 0), (1, 0)])
    kept_B1R1 = kept_BR.reshape(len(kept_BR), 1, -1, *[1] * (x_BHRX.ndim - 3))
    add = lambda a, b: (a[0] & b[0], jnp.where(b[0], a[1], 0.0) + b[1])
    return lax.associative_scan(add, (kept_B1R1, x_BHRX), axis=2)[1]


def before_blocks(
    count_BHS: jax.Array,
    sum_BHSV: jax.Array,
    z_BHRL: jax.Array,
    v_BHRLV: jax.Array,
    start_BX: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Counts `[B,H,R+1,S]` and sums of values `[B,H,R+1,S,V]` in the cache of each block, and those
    after the last block: what was carried in, and the first r blocks of z and v that leave the memory.

    With `start_BX`, the starts for the last token that left before and for those that leave, `[B,1+R*L]`
    or longer, they cover only the document of the last token that left.
    """
    (*_, R, L), S, kept_BR = z_BHRL.shape, count_BHS.shape[2], None
    if start_BX is not None:
        cache_BR = start_BX[:, : R * L + 1 : L]
        kept_BR = cache_BR[:, 1:] == cache_BR[:, :-1]
        start_BRL = start_BX[:, 1 : R * L + 1].reshape(-1, R, L)
        z_BHRL = jnp.where((start_BRL == cache_BR[:, 1:, None])[:, None], z_BHRL, S)
    count_BHRS, sum_BHRSV = code_sums(z_BHRL, v_BHRLV, S, sum_BHSV.dtype)
    return running(count_BHS, count_BHRS, kept_BR), running(sum_BHSV, sum_BHRSV, kept_BR)
