"""The loss of each token."""

import jax
import jax.numpy as jnp

from tvq import dims
from tvq import model as lm
from tvq.config import Model

# Tokens whose logits are held at once, or a block of each sequence if that is more: small products are slow.
N_TOKEN = 2048


@jax.named_scope("loss")
def token_nll(
    weights: lm.Weights, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, config: Model
) -> jax.Array:
    """Nats `[B,T]` of each target given the last hidden states x; 0 where masked.

    A few blocks of tokens at a time, computed again in the backward pass: log-probabilities `[B,T,C]` are
    never held.
    """
    B, T = dims.check(x_BTD=x_BTD, targets_BT=targets_BT, mask_BT=mask_BT)["B"], x_BTD.shape[1]
    at_once = dims.divisor(T // config.block_len, most=N_TOKEN // (B * config.block_len))
    blocks = lambda x: x.reshape(B, -1, at_once * config.block_len, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def block(scanned: tuple) -> jax.Array:
        x_BLD, targets_BL = scanned
        log_probs_BLC = lm.log_probs(weights, x_BLD, config)
        return -jnp.take_along_axis(log_probs_BLC, targets_BL[..., None], -1)[..., 0]

    nll_RBL = jax.lax.map(block, (blocks(x_BTD), blocks(targets_BT)))
    nll_BT = nll_RBL.swapaxes(0, 1).reshape(B, T)
    return nll_BT * mask_BT.astype(nll_BT.dtype)
