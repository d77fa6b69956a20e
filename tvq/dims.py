"""The alphabet of dimensions, and the shape check that uses it.

A tensor carries its shape in its name, `q_BHLK`, and an einsum uses the same letters in lower case.

    B sequences      T tokens of the call      R blocks             L block length
    M memory length  W window, M + L           E distances, M + 1   D model width
    H heads          K key width               V value width        S codes
    C vocabulary     U update length           N gated units       X any other

Inside `jax.shard_map`, B, T, H and V are sizes on one device, and D is the part of a parameter it keeps.
"""

from typing import Any

ALPHABET = frozenset("BTRLMWEDHKVSCUNX")


def check(**tensors: Any) -> dict[str, int]:
    """Asserts that tensors named `x_BTD=...` agree on every letter; returns the size of each letter."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        letters = name.rpartition("_")[2]
        assert set(letters) <= ALPHABET, f"{name}: letters outside the alphabet"
        assert len(letters) == tensor.ndim, f"{name}: {len(letters)} letters, shape {tensor.shape}"
        for letter, size in zip(letters, tensor.shape, strict=True):
            assert sizes.setdefault(letter, size) == size, (
                f"{name}: {letter} is {size} here and {sizes[letter]} before; shape {tensor.shape}"
            )
    return sizes


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, or 1."""
    return max((m for m in range(1, min(most, n) + 1) if n % m == 0), default=1)
