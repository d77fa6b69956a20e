"""The devices: one mesh with named axes, how arrays lie on it, and host arrays made global.

replica    whole copies, on slices joined by a slow network: cuts the batch
devices    cuts the batch; with shard_params also the stored parameters and optimizer state
sequence   cuts the tokens of an update into contiguous parts
tensor     cuts the heads, or the value width of a single head
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tvq import rules, schema
from tvq.errors import InputError

AXES = ("replica", "devices", "sequence", "tensor")
# What each does.
ROLES = {
    "replica": "cuts the batch, whole copies on slices",
    "devices": "cuts the batch",
    "sequence": "cuts the tokens of an update",
    "tensor": "cuts heads or values",
}
# Axes that cut a batch.
DATA_AXES = ("replica", "devices")
# A batch array [B, ...].
BATCH = PartitionSpec(DATA_AXES)
WHOLE = PartitionSpec()


class Axes(NamedTuple):
    """The mesh axis that cuts each dim of the model's arrays inside `shard_map`; None: nothing cuts it."""

    D: str | None = None  # of stored kernels and tables alone: `whole` is how they are used
    H: str | None = None
    V: str | None = None
    T: str | None = None

    @property
    def tensor(self) -> str | None:
        """The axis that cuts heads or their values: what each unit sums its output over."""
        return self.H or self.V

    @property
    def cut_tokens(self) -> tuple[str, ...]:
        """The axes that cut tokens: gradients, metrics and codebook statistics are reduced over them."""
        return ((self.T,) if self.T else ()) + DATA_AXES


UNCUT = Axes()


def make(shape: schema.Mesh, devices: Sequence[jax.Device], for_config: schema.Config | None = None) -> Mesh:
    """The mesh over all `devices`. InputError if its shape does not use exactly these.

    With `for_config`, the shape that the message advises also obeys the other rules of that config.
    """
    n_device, kind = len(devices), devices[0].platform
    sizes = {axis: getattr(shape, axis) for axis in AXES}
    rest = math.prod(size for size in sizes.values() if size != -1)
    free = next((axis for axis, size in sizes.items() if size == -1), "devices")
    if n_device % rest or (-1 not in sizes.values() and rest != n_device):
        others = math.prod(size for axis, size in sizes.items() if axis != free)
        wanted = f"config.mesh.devices is {rest}" if sizes["devices"] == rest else _product(sizes)
        ways = [f"use {n_device // others} or -1"] if others == 1 else []
        if others > 1 and n_device % others == 0:
            ways = [f"use config.mesh.{free}={n_device // others}"]
        elif others > 1:
            ways = [f"use {_fitting(sizes, free, n_device)}"]
        best = "" if for_config is None else rules.fitting(for_config, n_device)
        if best not in ("", f"config.mesh.{free}={n_device // others}"):
            ways = [f"use {best}"]
        if kind == "cpu":
            ways.append(f"pass --cpu_devices={rest}")
        raise InputError(f"{wanted} but there are {n_device} {kind} devices; {', or '.join(ways)}")
    sizes = {axis: n_device // rest if size == -1 else size for axis, size in sizes.items()}
    ordered = order(tuple(sizes.values()), devices)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _product(sizes: dict[str, int]) -> str:
    return "config.mesh is " + " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)


def _fitting(sizes: dict[str, int], free: str, n_device: int) -> str:
    """The nearest smaller shape, as options: every axis as large as possible that divides what is left."""
    fitting, left = {}, n_device
    for axis, size in sizes.items():
        if axis != free:
            fitting[axis] = math.gcd(size, left)
            left //= fitting[axis]
    return " ".join(f"config.mesh.{axis}={size}" for axis, size in (fitting | {free: left}).items())


def order(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the order of the mesh: on TPUs neighbours on an axis are neighbours in the machine."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    n_slice = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slice == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # The slow network joins the slices: each holds a copy, or else a part of the batch.
    outer = next((i for i, size in enumerate(shape[: len(DATA_AXES)]) if size % n_slice == 0), None)
    if outer is None:
        raise InputError(
            f"config.mesh.replica {shape[0]} and config.mesh.devices {shape[1]} are not multiples of the"
            f" {n_slice} slices; use config.mesh.replica={n_slice}"
        )
    slices = tuple(n_slice if i == outer else 1 for i in range(len(shape)))
    inside = tuple(size // n for size, n in zip(shape, slices, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inside, slices, devices, allow_split_physical_axes=True)


def axes(mesh: Mesh, model: schema.Model, shard_params: bool) -> Axes:
    """What the axes of a mesh cut of this model."""
    one = lambda axis: axis if mesh.shape[axis] > 1 else None
    heads = one("tensor") if model.cuts_heads(mesh.shape["tensor"]) else None
    return Axes(
        D=one("devices") if shard_params else None,
        H=heads,
        V=None if heads else one("tensor"),
        T=one("sequence"),
    )


def check(mesh: Mesh, c: schema.Config) -> None:
    """InputError if the model or an update cannot be cut over the mesh, or its kernel does not run there."""
    check_platform(mesh, c.model)
    _refuse(rules.misfits(c, dict(mesh.shape)))


def check_platform(mesh: Mesh, model: schema.Model) -> None:
    """InputError if the devices lack a kernel that the model needs."""
    if model.attention == "flash" and platform(mesh) != "gpu":
        raise InputError(
            f"config.model.attention=flash needs an NVIDIA GPU, not a {platform(mesh)}; use full"
        )


def check_batch(mesh: Mesh, name: str, batch_size: int, accumulate: int = 1) -> None:
    """InputError if a batch of this size cannot be cut over the mesh."""
    _refuse(rules.batch_misfit(name, batch_size, dict(mesh.shape), accumulate))


def _refuse(errors: list[str]) -> None:
    if errors:
        raise InputError("\n".join(errors))


def n_data(mesh: Mesh) -> int:
    """The number of parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def platform(mesh: Mesh) -> str:
    """cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform


def device_memory(name: str) -> int | None:
    """The largest value of this memory statistic, in bytes, over this process's devices; None on a CPU."""
    values = [stats[name] for d in jax.local_devices() if (stats := d.memory_stats()) and name in stats]
    return max(values, default=None)


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(mesh, spec)


def spec(dims: Iterable[str], axes: Axes) -> PartitionSpec:
    """How an array of these dims lies on the mesh."""
    cut = {
        "B": DATA_AXES,
        "D": axes.D,
        "H": axes.H,
        "V": axes.V,
        "HK": axes.H,
        "HV": axes.tensor,
        "T": axes.T,
    }
    names = [cut.get(dim) for dim in dims]
    return PartitionSpec(*names) if any(names) else WHOLE


def name(path: tuple) -> str:
    """`params/units/q`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def whole(x: jax.Array, axes: Axes, dim: int, dtype: Any) -> jax.Array:
    """All parts of x along dim, cast. Gradients are summed in the dtype of x, as if the cast came after."""
    if x.shape[dim] % 16 == 8:  # a TPU gathers tiles of 8 rows, in bfloat16 of 16, and else sums with zeros
        dtype = x.dtype

    @jax.custom_vjp
    def send(x: jax.Array) -> jax.Array:
        return lax.all_gather(x.astype(dtype), axes.D, axis=dim, tiled=True)

    def back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (lax.psum_scatter(gradient.astype(x.dtype), axes.D, scatter_dimension=dim, tiled=True),)

    send.defvjp(lambda x: (send(x), None), back)
    return send(x)


def varies(like: Any) -> frozenset[str]:
    """The axes along which an array of this type may vary."""
    return like.manual_axis_type.varying


def varying(tree: Any, axes: Iterable[str]) -> Any:
    """Inside `shard_map`, a tree marked as varying along the axes: each device then has its own gradient."""

    def one(x: jax.Array) -> jax.Array:
        new = tuple(axis for axis in axes if axis not in varies(jax.typeof(x)))
        return lax.pcast(x, new, to="varying") if new else x

    return jax.tree.map(one, tree)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process supplies; others may supply the same."""
    indices = sharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index for row in range(*index[0].indices(batch_size))})


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Global arrays `[batch_size, ...]` from the rows that this process holds."""
    rows, place = local_rows(mesh, batch_size), sharding(mesh, BATCH)

    def placed(held: np.ndarray) -> jax.Array:
        if len(held) != len(rows):
            raise InputError(f"{len(held)} rows of {batch_size}, but this process must supply {len(rows)}")

        def part(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(batch_size)
            start = rows.index(first)  # on a torus a process may hold gaps, a device never
            return held[start : start + stop - first]

        return jax.make_array_from_callback((batch_size, *held.shape[1:]), place, part)

    return {name: placed(held) for name, held in batch.items()}


def split_over_sequence(mesh: Mesh, batch: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """Arrays `[B,T]` with their tokens reordered by the part of the sequence that reads them.

    Tokens are read `length` at a time, and of these each part reads a contiguous share.
    """
    n_part = mesh.shape["sequence"]
    if n_part == 1:
        return batch
    cut = lambda x: x.reshape(x.shape[0], -1, n_part, length // n_part)
    return jax.tree.map(lambda x: cut(x).swapaxes(1, 2).reshape(x.shape), batch)


def with_sharding(mesh: Mesh, tree: Any, specs: Any = WHOLE) -> Any:
    """The shapes of `tree`, placed on the mesh by one spec or a tree of them."""
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, spec))
    return jax.tree.map(place, tree, specs)
