"""Analytic costs: products of a gated unit and of a train step, and bytes kept and exchanged."""

import jax.numpy as jnp

from tvq.model.parameters import n_unit
from tvq.schema import Model


def unit_flops(model: Model, sequence_len: int, *, backward: bool = False) -> dict[str, float]:
    """FLOPs of one gated unit per token, by part; a multiplication and an addition are two.

    Counts what this formulation needs (the window of a block in full, M + L columns), each score once:
    rematerialisation does not count. With `backward`, the sum of both passes.
    """
    D, H, K, V, S = model.d_model, model.n_head, model.d_k, model.d_v, model.n_code
    M, L, T = model.mem_len, model.block_len, sequence_len
    vq_only = model.carries_state
    seen = M + L if vq_only else (T + 1) / 2
    # (forward, factor for both passes): codes and their statistics have no gradient, and the gradient of code
    # sums is a gather.
    parts = {
        "projections": (2 * D * H * (2 * K + 2 * V), 3),
        "output": (2 * H * V * D, 3),
        "position keys": (2 * (M + 1) * D * H * K / T, 3),
        "codes": (2 * S * H * K, 1),
        "code statistics": (2 * S * H * K, 1),
        "scores": (2 * seen * H * K, 3),
        "relative scores": (2 * (M + 1) * H * K, 3),
        "weighted sum": (2 * seen * H * V, 3),
        "cache scores": (2 * S * H * K * (vq_only and model.agg_cache), 2),
        "cache weighted sum": (2 * S * H * V * (vq_only and model.agg_cache), 3),
        "cache sums": (2 * S * H * V * vq_only, 1),
    }
    return {name: float(forward * (n if backward else 1)) for name, (forward, n) in parts.items()}


def train_flops(model: Model, sequence_len: int) -> float:
    """FLOPs of a train step per token, without the optimizer: all units and the logits."""
    products = sum(unit_flops(model, sequence_len, backward=True).values())
    return n_unit(model) * products + 3 * 2 * model.d_model * model.n_vocab


def kept_bytes(model: Model) -> float:
    """Bytes per token that the backward pass needs of all units: `model.remat=all` keeps more."""
    D, H, K, V, S, L = model.d_model, model.n_head, model.d_k, model.d_v, model.n_code, model.block_len
    # The output of attention, and one mean per code and block.
    attended = V * (1 + model.agg_cache * S / L) if model.carries_state else 0
    width = D if model.remat == "nothing" else D + H * (2 * K + 2 * V + attended)
    return n_unit(model) * width * jnp.dtype(model.dtype).itemsize


def exchanged_bytes(model: Model, n_sequence: float, n_token: float, along: float, across: float) -> float:
    """Bytes that a device sends in an update, between parts of a sequence and of a unit, in a ring.

    `along` and `across` are the shares of an array that leave a device if the sequence or the units are cut.
    """
    H, K, V, S, M = model.n_head, model.d_k, model.d_v, model.n_code, model.mem_len
    width = jnp.dtype(model.dtype).itemsize
    halo = 2 * (K + V) * M * width * (along > 0)
    sums = 4 * (4 * V + 2) * S * along
    outputs = 2 * 2 * model.d_model * width * across
    return n_unit(model) * (n_sequence * H * (halo + sums) + n_token * outputs)
