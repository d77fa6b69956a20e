"""The devices: one mesh with named axes, how arrays lie on it, and host arrays made global.

`devices` is the data-parallel axis: it cuts the batch; parameters and optimizer state are whole on each.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tvq import config

AXES = ("devices",)
# Axes that cut sequences: gradients, metrics and codebook statistics are reduced over them.
DATA_AXES = ("devices",)
# A batch array [B, ...], and attention state [N, B, ...].
BATCH = PartitionSpec(DATA_AXES)
STATE = PartitionSpec(None, DATA_AXES)
WHOLE = PartitionSpec()


def make(shape: config.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh over all `devices`. ValueError if its shape does not take exactly these."""
    n_device = len(devices)
    wanted = n_device if shape.devices == -1 else shape.devices
    if wanted != n_device:
        kind = devices[0].platform
        hint = f", or pass --cpu_devices={wanted}" if kind == "cpu" else ""
        raise ValueError(
            f"config.mesh.devices is {wanted} but there are {n_device} {kind} devices;"
            f" use {n_device} or -1{hint}"
        )
    return Mesh(np.asarray(devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(mesh: Mesh, name: str, batch_size: int) -> None:
    """ValueError if a batch of this size cannot be cut over the mesh."""
    n_part = n_data(mesh)
    if batch_size % n_part:
        lower = batch_size // n_part * n_part
        options = f"{lower} or {lower + n_part}" if lower else str(n_part)
        raise ValueError(
            f"config.{name} {batch_size} is not divisible by mesh.devices {n_part}; use {options}"
        )


def n_data(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in DATA_AXES]))


def platform(mesh: Mesh) -> str:
    """cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(mesh, spec)


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process supplies."""
    indices = sharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    rows = [index[0].indices(batch_size) for index in indices if index is not None]
    start, stop = min(r[0] for r in rows), max(r[1] for r in rows)
    assert stop - start == len({i for r in rows for i in range(*r)}), "a process holds a gap in the batch"
    return slice(start, stop)


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Global arrays `[batch_size, ...]` from the rows that this process holds."""
    place = sharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(place, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def with_sharding(mesh: Mesh, tree: Any, spec: PartitionSpec = WHOLE) -> Any:
    """The shapes of `tree`, placed on the mesh."""
    place = sharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
