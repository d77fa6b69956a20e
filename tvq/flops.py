"""Analytic costs: the products of a gated unit and of a train step, and what a chip can do."""

from typing import NamedTuple

from tvq.config import Model
from tvq.model import transformer


class Chip(NamedTuple):
    """One device, from its vendor's data sheet, in bytes and a second."""

    bfloat16: float  # FLOP/s, dense
    float32: float  # of float32 products at default precision, which rounds their factors
    highest: float  # of those that must not be rounded
    bandwidth: float  # of main memory
    memory: float  # of it, what one process gets
    link: float  # that leave a device in an exchange along one dimension of the machine
    launch: float = 0.0  # seconds to start a kernel


GIB = 2.0**30
# The first whose name a device's kind begins with. A GPU's process takes three quarters of its memory unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    "NVIDIA A100": Chip(312e12, 156e12, 19.5e12, 2.039e12, 0.75 * 80 * GIB, 300e9, 2e-6),
    "NVIDIA H100 PCIe": Chip(756e12, 378e12, 51e12, 2.0e12, 0.75 * 80 * GIB, 300e9, 2e-6),
    "NVIDIA H100": Chip(989e12, 495e12, 67e12, 3.35e12, 0.75 * 80 * GIB, 450e9, 2e-6),
    "NVIDIA H200": Chip(989e12, 495e12, 67e12, 4.8e12, 0.75 * 141 * GIB, 450e9, 2e-6),
    "TPU v4": Chip(275e12, 275e12, 275e12 / 6, 1.228e12, 30.75 * GIB, 90e9),
    "TPU v5 lite": Chip(197e12, 197e12, 197e12 / 6, 0.819e12, 15.75 * GIB, 90e9),
    "TPU v5": Chip(459e12, 459e12, 459e12 / 6, 2.765e12, 95.74 * GIB, 180e9),
    "TPU v6 lite": Chip(918e12, 918e12, 918e12 / 6, 1.64e12, 31.25 * GIB, 180e9),
}


def unit(model: Model, sequence_len: int, *, backward: bool = False) -> dict[str, float]:
    """Products of one gated unit a token, by part; a multiplication and an addition are two.

    What the mathematics needs as we formulate it (the window of a block counts in full, M + L columns), no
    score twice: rematerialisation does not count. With `backward` the sum of both passes.
    """
    D, H, K, V, S = model.d_model, model.n_head, model.d_k, model.d_v, model.n_code
    M, L, T = model.mem_len, model.block_len, sequence_len
    vq_only = model.attention == "vq"
    seen = M + L if vq_only else (T + 1) / 2
    # (forward, passes as long as it with the backward): codes and their statistics have no gradient, code
    # sums are gathered back.
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


def train(model: Model, sequence_len: int) -> float:
    """FLOPs of a train step a token, without optimizer: all units and the logits."""
    products = sum(unit(model, sequence_len, backward=True).values())
    return transformer.n_unit(model) * products + 3 * 2 * model.d_model * model.n_vocab


def chip(device_kind: str) -> Chip | None:
    """What a device can do, if it is known."""
    return next((found for name, found in CHIPS.items() if device_kind.startswith(name)), None)
