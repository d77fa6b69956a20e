"""Named arrays in a file: safetensors, with facts about them in its header."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import safe_open
from safetensors.numpy import save

from tvq import atomic
from tvq.errors import InputError


def named(tree: Any) -> dict[str, Any]:
    """The leaves by name: a file then outlives a change of the containers that hold them."""
    leaves = jax.tree.leaves_with_path(tree)
    by_name = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(by_name) == len(leaves), "two arrays have the same name"
    return by_name


def kind(x: Any) -> str:
    """`float32[3, 4]`."""
    return f"{x.dtype}{list(x.shape)}"


def differing(present: Mapping[str, str], wanted: Mapping[str, str], place: str) -> list[str]:
    """A line for each array of another kind than wanted, or on one side only; `present` are in `place`."""
    return [
        f"  {name}: {present.get(name, 'absent')} {place}, {wanted.get(name, 'absent')} wanted"
        for name in sorted(present.keys() | wanted.keys())
        if present.get(name) != wanted.get(name)
    ]


def fingerprint(tree: Any) -> str:
    """The same for the same names and bits alone."""
    digest = hashlib.sha256()
    for name, x in named(tree).items():
        digest.update(f"{name} {kind(x)} ".encode())
        digest.update(np.asarray(x, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def not_finite(tree: Any) -> list[str]:
    """The names of the arrays of floats, on the host or on devices, that hold a NaN or an infinity."""
    floats = {name: x for name, x in named(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    finite = jax.jit(lambda floats: {name: jnp.isfinite(x).all() for name, x in floats.items()})(floats)
    return [name for name, is_finite in finite.items() if not np.asarray(is_finite)]


def write(path: epath.Path, arrays: Mapping[str, Any], facts: dict[str, str]) -> int:
    """Writes the file, whole or not at all; returns its bytes."""
    data = save({name: np.asarray(x, order="C") for name, x in arrays.items()}, facts)
    return atomic.write(path, data)


def read(option: str, path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and facts of a local file. InputError, in the name of the `option` that asked for it."""
    if not path.is_file():
        raise InputError(f"{option}={path}: there is no such file")
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return file.get_tensors(), file.metadata() or {}
    except Exception as error:  # the library has no common word for what it cannot read
        raise InputError(f"{option}={path} is not a safetensors file, or is damaged: {error}") from error
