"""The loss of each token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tvq import dims
from tvq import model as lm
from tvq.schema import Model

# Tokens whose logits are held at once, or a block of each sequence if that is more: small products are slow.
N_TOKEN = 2048


@jax.named_scope("loss")
def token_nll(
    weights: lm.Weights, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, config: Model
) -> jax.Array:
    """Nats `[B,T]` of each target given the last hidden states x; 0 where masked."""

    def block(x_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
        return -of_targets(lm.log_probs(weights, x_BLD, config), targets_BL)

    return by_blocks(block, x_BTD, targets_BT, mask_BT, config)


@jax.named_scope("loss")
def token_nll_and_z(
    weights: lm.Weights, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, config: Model
) -> tuple[jax.Array, jax.Array]:
    """The same, and the square of log Z, where Z is the sum of exp(logits)."""

    def block(x_BLD: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BLC = lm.logits(weights, x_BLD, config)
        log_z_BL = jax.nn.logsumexp(logits_BLC, -1)
        return log_z_BL - of_targets(logits_BLC, targets_BL), log_z_BL**2

    return by_blocks(block, x_BTD, targets_BT, mask_BT, config)


def of_targets(values_BLC: jax.Array, targets_BL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BLC, targets_BL[..., None], -1)[..., 0]


def by_blocks(
    block: Callable, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, config: Model
) -> Any:
    """What `block` gives for a few blocks of tokens at a time, `[B,T]`; 0 where masked.

    It is computed again in the backward pass: values `[B,T,C]` are never held.
    """
    B, T = dims.check(x_BTD=x_BTD, targets_BT=targets_BT, mask_BT=mask_BT)["B"], x_BTD.shape[1]
    at_once = dims.divisor(T // config.block_len, most=N_TOKEN // (B * config.block_len))
    blocks = lambda x: x.reshape(B, -1, at_once * config.block_len, *x.shape[2:]).swapaxes(0, 1)
    again = jax.checkpoint(lambda scanned: block(*scanned))
    each = jax.lax.map(again, (blocks(x_BTD), blocks(targets_BT)))
    whole = lambda x_RBL: x_RBL.swapaxes(0, 1).reshape(B, T) * mask_BT.astype(x_RBL.dtype)
    return jax.tree.map(whole, each)
