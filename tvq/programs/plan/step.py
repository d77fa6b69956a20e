"""What one train step costs on a machine, from the program that the machine's compiler makes."""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tvq import chips, sharding
from tvq import model as lm
from tvq.programs.plan.hlo import Array
from tvq.programs.plan.program import Collective, Kernel, Program
from tvq.schema import Config
from tvq.training import optimizer, state, train_step

N_LARGEST = 5


class TooLargeError(Exception):
    """The program does not fit in memory; args are the GiB needed and the GiB available, as text."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Everything is for one device and one call of the step, unless stated otherwise."""

    shape: dict[str, int]  # of the mesh
    chip: chips.Chip
    n_token: int  # of the whole batch
    n_param: int  # of the whole model
    memory: dict[str, int]  # bytes by what they hold
    largest: list[tuple[Array, int]]  # arrays of the program, and how many there are
    analytic: float  # FLOPs that the mathematics needs
    compiled: float  # FLOPs that the program does
    traffic: float  # bytes that it moves to and from main memory
    n_kernel: int
    links: dict[tuple[str, str], tuple[int, float]]  # (kind, axes): messages, bytes sent
    seconds: dict[str, float]  # by what bounds them
    compile_seconds: float

    @property
    def bytes_needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes_needed <= self.chip.memory

    @property
    def step_seconds(self) -> float:
        """At best: each kernel at the peak of what bounds it, no exchange hidden behind others."""
        return sum(self.seconds.values())


def estimate(config: Config, mesh: Mesh) -> Estimate:
    """TooLargeError: the compiler itself rejects the program as too large."""
    chip = chips.chip(mesh.devices.flat[0].device_kind)
    assert chip is not None, "every target has its chip"
    B, T, n_device = config.train.global_batch_size, config.train.sequence_len, mesh.size
    sharding.check(mesh, config)
    sharding.check_batch(mesh, "train.global_batch_size", B, config.train.accumulate)
    tx = optimizer.make(config.optimizer, config.model)
    carried = state.place(config, tx, mesh)
    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding.sharding(mesh, sharding.BATCH))
    batch = dict.fromkeys(("inputs", "targets", "loss_mask"), tokens_BT)
    began = time.monotonic()
    made = compiled(train_step.make(config, mesh, tx).lower(carried, batch))
    compile_seconds = time.monotonic() - began

    program = Program.read(made.as_text() or "")
    kernels, exchanges = list(program.kernels()), list(program.collectives(mesh.size))
    axes = sharding.axes(mesh, config.model, config.mesh.shard_params)
    empty = jax.eval_shape(lambda: lm.start(config.model, B))
    attention = sharding.with_sharding(mesh, empty, lm.state_specs(config.model, axes))
    used = made.memory_analysis()
    assert used is not None, "every target's compiler counts memory"
    memory = {
        "parameters": device_bytes(carried.weights.params),
        "optimizer state": device_bytes(carried.opt_state),
        "codebooks": device_bytes(carried.weights.extra),
        "attention state": device_bytes(attention),
        "batch": device_bytes(batch),
    }
    work = temporaries(used, sharding.platform(mesh)) - memory["attention state"]
    memory["gradients, activations, work space"] = work
    memory["metrics"] = used.output_size_in_bytes - used.alias_size_in_bytes
    return Estimate(
        shape=dict(mesh.shape),
        chip=chip,
        n_token=B * T,
        n_param=state.n_param(carried),
        memory=memory,
        largest=largest(program),
        analytic=lm.train_flops(config.model, config.train.update_len) * B * T / n_device,
        compiled=sum(kernel.n * kernel.flops for kernel in kernels),
        traffic=sum(kernel.n * kernel.nbytes for kernel in kernels),
        n_kernel=sum(kernel.n for kernel in kernels),
        links=links(exchanges, mesh),
        seconds=roofline(kernels, exchanges, mesh, chip),
        compile_seconds=compile_seconds,
    )


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(r"\(?([\d.]+G)\)? (?:exceeds available HBM \(|of )([\d.]+G)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise
        raise TooLargeError(*sizes.groups()) from error


def temporaries(used: Any, platform: str) -> int:
    """Bytes of the program's temporaries, from the compiler's account of its memory.

    On a TPU they share memory, so that their sum may exceed what there is: its peak is right.
    """
    if platform != "tpu":
        return used.temp_size_in_bytes + used.generated_code_size_in_bytes
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    return used.peak_memory_in_bytes - used.argument_size_in_bytes - new


def device_bytes(tree: Any) -> int:
    """The bytes of each array's part on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


def largest(program: Program) -> list[tuple[Array, int]]:
    """The largest arrays that a loop carries, with the largest number that one loop has of them."""
    carried: Counter[Array] = Counter()
    for computation in program.computations.values():
        for one in computation.values():
            if one.op == "while":
                carried |= Counter(one.arrays)
    order = sorted(carried.items(), key=lambda item: -item[0].nbytes * item[1])
    return order[:N_LARGEST]


def links(exchanges: Iterable[Collective], mesh: Mesh) -> dict[tuple[str, str], tuple[int, float]]:
    """Messages and bytes that a device sends, by kind and by the axes of the mesh that they run along."""
    total: dict[tuple[str, str], tuple[int, float]] = {}
    for one in exchanges:
        places = np.array(np.unravel_index(one.groups[0], mesh.devices.shape))
        varying = (places != places[:, :1]).any(1)
        axes = ", ".join(name for name, along in zip(mesh.axis_names, varying, strict=True) if along)
        if axes:  # else each device exchanges with itself
            n, sent = total.get((one.kind, axes), (0, 0.0))
            total[one.kind, axes] = n + one.n, sent + one.n * one.sent
    return total


def roofline(
    kernels: list[Kernel], exchanges: list[Collective], mesh: Mesh, chip: chips.Chip
) -> dict[str, float]:
    """Seconds by what bounds each kernel; an exchange has a ring along each dimension that it spans."""
    seconds = {"products": 0.0, "memory": 0.0}
    for kernel in kernels:
        working = kernel.flops / getattr(chip, kernel.precision)
        moving = kernel.nbytes / chip.bandwidth
        seconds["products" if working > moving else "memory"] += kernel.n * max(working, moving)
    seconds["launches"] = chip.launch * sum(kernel.n for kernel in kernels)
    seconds["links"] = sum(one.n * one.sent / n_ring(mesh, one.groups[0]) for one in exchanges) / chip.link
    return seconds


def n_ring(mesh: Mesh, group: tuple[int, ...]) -> int:
    """The number of dimensions of a TPU slice that a group of devices spans; elsewhere one."""
    places = [getattr(mesh.devices.flat[i], "coords", (i,)) for i in group]
    return max(1, sum(len(set(along)) > 1 for along in zip(*places, strict=True)))
