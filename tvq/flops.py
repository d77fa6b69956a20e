"""Analytic costs: the products of a gated unit and of a train step, and what a chip can do."""

from tvq.config import Model
from tvq.model import transformer

# bfloat16 FLOP/s of a chip, dense, from the vendors' data sheets; the first name that fits counts.
PEAK = {
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12,
}  # fmt: skip


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


def peak(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a chip, if it is known."""
    return next((found for name, found in PEAK.items() if device_kind.startswith(name)), None)
