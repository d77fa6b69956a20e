"""The peak rates of chips, from their vendors' data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device, in bytes and per second."""

    bfloat16: float  # FLOP/s, dense
    float32: float  # float32 products at default precision, which rounds their factors
    highest: float  # float32 products whose factors must not be rounded
    bandwidth: float  # of main memory
    memory: float  # what one process gets of it
    link: float  # out of a device, in an exchange along one dimension
    launch: float = 0.0  # seconds to start a kernel


GIB = 2.0**30
# The first whose name begins a device's kind. A GPU's process takes three quarters of its memory unless
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


def chip(device_kind: str) -> Chip | None:
    """The chip of a device, if it is known."""
    return next((spec for name, spec in CHIPS.items() if device_kind.startswith(name)), None)
