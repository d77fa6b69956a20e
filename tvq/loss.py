"""Token losses: sums and means on the device (SPEC.md "Losses of one update")."""

import jax
import jax.numpy as jnp

from tvq import dims


def token_nll(log_probs_BTC: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Nats `[B,T]` of each target; 0 where masked."""
    dims.check(log_probs_BTC=log_probs_BTC, targets_BT=targets_BT, mask_BT=mask_BT)
    nll_BT = -jnp.take_along_axis(log_probs_BTC, targets_BT[..., None], -1)[..., 0]
    return nll_BT * mask_BT.astype(nll_BT.dtype)
