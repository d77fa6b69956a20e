"""Vector quantisation of keys (paper section 3.2): codewords, nearest codes, their moving average.

A codebook is `{"sum": [H,S,K], "count": [H,S]}`, the moving averages of the keys that chose a code and of
their number. It is not a parameter: the forward pass returns `statistics`, the step applies `moving_average`.
Where unused codes are revived it also has `"idle": [H,S]` int32, the updates since a key chose the code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tvq import dims

COUNT_FLOOR = 0.01
# Of `key_metrics`, in this order.
KEY_METRICS = (
    "vec_norm_mean",
    "vec_hat_norm_mean",
    "relative_err_mean",
    "relative_err_min",
    "relative_err_max",
)


def codewords(codebook: dict) -> jax.Array:
    """The codewords `[H,S,K]`: mean key of each code, without gradient."""
    count_HS = jnp.maximum(codebook["count"], COUNT_FLOOR)
    return lax.stop_gradient(codebook["sum"] / count_HS[..., None])


@jax.named_scope("vq")
def nearest(k_BHTK: jax.Array, c_HSK: jax.Array) -> jax.Array:
    """The code `[B,H,T]` int32 whose codeword is nearest to each key; the lowest among equals."""
    dims.check(k_BHTK=k_BHTK, c_HSK=c_HSK)
    # |k - c|^2 less |k|^2, halved and negated. Full precision: the codes decide everything after them.
    score_BHTS = jnp.einsum("bhtk,hsk->bhts", k_BHTK, c_HSK, precision=lax.Precision.HIGHEST)
    score_BHTS = score_BHTS - jnp.sum(0.5 * c_HSK**2, -1)[None, :, None, :]
    return jnp.argmax(score_BHTS, -1).astype(jnp.int32)


@jax.named_scope("vq")
def lookup(z_BHT: jax.Array, c_HSK: jax.Array) -> jax.Array:
    """The codewords `[B,H,T,K]` of codes below S; an empty slot (code S) gets zeros."""
    per_head = jax.vmap(lambda z, c: c.at[z].get(mode="fill", fill_value=0), in_axes=(1, 0), out_axes=1)
    return per_head(z_BHT, c_HSK)


def straight_through(k_BHTK: jax.Array, kz_BHTK: jax.Array) -> jax.Array:
    """The value of the codeword with the gradient of the key."""
    return lax.stop_gradient(kz_BHTK) + (k_BHTK - lax.stop_gradient(k_BHTK))


def squared_error(k_BHTK: jax.Array, kz_BHTK: jax.Array) -> jax.Array:
    """|k - c_z|^2 `[B,H,T]`, with gradient to k alone."""
    return jnp.sum((k_BHTK - lax.stop_gradient(kz_BHTK)) ** 2, -1)


@jax.named_scope("vq")
def statistics(k_BHTK: jax.Array, z_BHT: jax.Array, mask_BT: jax.Array, n_code: int) -> dict:
    """Sums over the unmasked tokens: keys of each code `[H,S,K]` and their number `[H,S]`, no gradient."""
    k_BHTK = lax.stop_gradient(k_BHTK)
    # A matrix product, not a scatter: its order of summation is fixed, so runs repeat bitwise on a GPU.
    hit_BHTS = jax.nn.one_hot(z_BHT, n_code, dtype=k_BHTK.dtype)
    hit_BHTS = hit_BHTS * mask_BT.astype(k_BHTK.dtype)[:, None, :, None]
    total_HSK = jnp.einsum("bhts,bhtk->hsk", hit_BHTS, k_BHTK, precision=lax.Precision.HIGHEST)
    return {"sum": total_HSK, "count": jnp.sum(hit_BHTS, (0, 2))}


@jax.named_scope("vq")
def moving_average(codebook: dict, stats: dict, gamma: float) -> dict:
    """`gamma old + (1 - gamma) new`, for sums and counts alike."""
    return {name: gamma * codebook[name] + (1.0 - gamma) * stats[name] for name in ("sum", "count")}


class Probe(NamedTuple):
    """A few tokens of an update, drawn from the whole batch: where they lie on this device.

    What lies elsewhere is read as zeros, so that the sum over devices and segments is exactly the key.
    """

    sequence_X: jax.Array
    token_X: jax.Array
    here_X: jax.Array  # bool

    def statistics(self, k_BHTK: jax.Array, mask_BT: jax.Array) -> dict:
        """Of the tokens, the keys `[H,X,K]`, no gradient, and the mask `[X]`."""
        k_XHK = lax.stop_gradient(k_BHTK)[self.sequence_X, :, self.token_X]
        k_XHK = jnp.where(self.here_X[:, None, None], k_XHK, 0.0)
        mask_X = jnp.where(self.here_X, mask_BT[self.sequence_X, self.token_X], 0)
        return {"key": k_XHK.swapaxes(0, 1), "mask": mask_X}


@jax.named_scope("vq")
def revive(codebook: dict, averaged: dict, stats: dict, n_update: int) -> dict:
    """The codebook after an update, with codes that no key chose for n_update updates reseeded.

    `averaged` is the moving average of `codebook` and `stats`, which hold those of a probe as "probe". The
    longest idle code takes the first key of the probe, and so on; a masked token seeds none. A seeded code
    starts as all codes do, with the count of one key.

    n_update is at least the updates of one sequence (`rules.validate`), so no code changes its meaning
    while memory and cache hold values under it: such a code has been chosen more recently.
    """
    probe = stats["probe"]
    n_seed = min(probe["key"].shape[1], averaged["count"].shape[1])
    counted_X = probe["mask"][:n_seed] > 0

    def head(count_S: jax.Array, average: dict, idle_S: jax.Array, keys_XK: jax.Array) -> dict:
        idle_S = jnp.where(count_S > 0, 0, idle_S + 1)
        idle_X, code_X = lax.top_k(idle_S, n_seed)
        code_X = jnp.where((idle_X >= n_update) & counted_X, code_X, idle_S.size)  # beyond the last: dropped
        return {
            "sum": average["sum"].at[code_X].set(keys_XK[:n_seed], mode="drop"),
            "count": average["count"].at[code_X].set(1.0, mode="drop"),
            "idle": idle_S.at[code_X].set(0, mode="drop"),
        }

    return jax.vmap(head)(stats["count"], averaged, codebook["idle"], probe["key"])


@jax.named_scope("metrics")
def codebook_metrics(codebook: dict) -> dict[str, jax.Array]:
    """Norms, similarity, distance, use and entropy of one codebook, averaged over heads."""
    count_HS = jnp.maximum(codebook["count"], COUNT_FLOOR)
    c_HSK = codewords(codebook)
    norm_HS = jnp.linalg.norm(c_HSK, axis=-1)
    n_code = norm_HS.shape[-1]
    dot_HSS = jnp.einsum("hsk,htk->hst", c_HSK, c_HSK, precision=lax.Precision.HIGHEST)
    sim_HSS = dot_HSS / jnp.maximum(norm_HS[:, :, None] * norm_HS[:, None, :], 1e-30)
    square_HS = norm_HS**2
    dist_HSS = jnp.sqrt(jnp.maximum(square_HS[:, :, None] + square_HS[:, None, :] - 2.0 * dot_HSS, 0.0))
    p_HS = count_HS / jnp.sum(count_HS, -1, keepdims=True)

    other = ~jnp.eye(n_code, dtype=bool)[None]
    n_pair = max(n_code * (n_code - 1), 1)

    def pairs(name: str, x_HSS: jax.Array) -> dict:
        return {
            f"{name}_min": jnp.min(x_HSS, (1, 2), where=other, initial=jnp.inf).mean(),
            f"{name}_mean": (jnp.sum(x_HSS, (1, 2), where=other) / n_pair).mean(),
            f"{name}_max": jnp.max(x_HSS, (1, 2), where=other, initial=-jnp.inf).mean(),
        }

    def codes(name: str, x_HS: jax.Array) -> dict:
        return {
            f"{name}_min": x_HS.min(-1).mean(),
            f"{name}_mean": x_HS.mean(),
            f"{name}_max": x_HS.max(-1).mean(),
        }

    return {
        **codes("c_norm", norm_HS),
        **codes("c_usage", count_HS),
        **pairs("c_sim", sim_HSS),
        **pairs("c_dist", dist_HSS),
        "c_entropy": -jnp.sum(p_HS * jnp.log(p_HS), -1).mean(),
        "c_thresh_oob": jnp.sum((count_HS < 1.0) | (count_HS > 1e6), -1).astype(count_HS.dtype).mean(),
    }


@jax.named_scope("metrics")
def key_metrics(
    k_BHTK: jax.Array, kz_BHTK: jax.Array, e2_BHT: jax.Array, block_len: int
) -> dict[str, jax.Array]:
    """Norms and relative quantisation error of the keys; extremes are those of a block."""
    norm_BHT, hat_norm_BHT = jnp.linalg.norm(k_BHTK, axis=-1), jnp.linalg.norm(kz_BHTK, axis=-1)
    relative_BHT = jnp.sqrt(e2_BHT) / norm_BHT
    x_3BHRL = jnp.stack([norm_BHT, hat_norm_BHT, relative_BHT]).reshape(3, *e2_BHT.shape[:2], -1, block_len)
    x_5BHR = jnp.stack([*x_3BHRL.mean(-1), x_3BHRL[2].min(-1), x_3BHRL[2].max(-1)])
    return dict(zip(KEY_METRICS, lax.stop_gradient(x_5BHR.mean((1, 2, 3))), strict=True))
