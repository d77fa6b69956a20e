"""What a run will cost, `tvq plan`: its train step, compiled for a machine that is not there.

Nothing is computed: the machine's own compiler says what memory the step needs, and its program is read for
products, memory traffic and messages between devices. Times are of a machine that reaches its data sheet:
bounds to compare shapes by, not predictions to rely on.
"""

import dataclasses
from collections.abc import Iterator

import jax
from etils import epath

from tvq import cluster, config, mesh, metrics
from tvq.config import Config
from tvq.plan import report, step, targets
from tvq.plan.step import Estimate, TooLargeError

DOES_NOT_FIT = 1  # the exit code


def plan(c: Config, output: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Prints what the train step costs, or with plan.sweep a table of mesh shapes; 1 if nothing fits."""
    if place.n_process > 1:
        raise ValueError(f"tvq plan is for one process, but {place}; start it by itself")
    console = metrics.Console()
    devices = targets.devices(c.plan.topology)
    if not c.plan.sweep:
        try:
            found = step.estimate(c, mesh.make(c.mesh, devices))
        except TooLargeError as error:
            console.say(report.too_large(error))
            return DOES_NOT_FIT
        console.say(report.page(c, found))
        return 0 if found.fits else DOES_NOT_FIT
    rows: list[tuple[str, Estimate | str]] = []
    for name, trial in shapes(c, len(devices)):
        console.say(f"compiling for {name}")
        rows.append((name, attempt(trial, devices)))
    console.say(report.ranking(c, rows))
    return 0 if any(isinstance(found, Estimate) and found.fits for _, found in rows) else DOES_NOT_FIT


def shapes(c: Config, n_device: int) -> Iterator[tuple[str, Config]]:
    """Every shape of the mesh over so many devices of one machine, with its config."""
    for devices, sequence, tensor in factors(n_device, 3):
        for shard_params in (False, True) if devices > 1 else (False,):
            shape = config.Mesh(devices=devices, sequence=sequence, tensor=tensor, shard_params=shard_params)
            sizes = {"devices": devices, "sequence": sequence, "tensor": tensor}
            names = [f"{axis}={n}" for axis, n in sizes.items() if n > 1 or axis == "devices"]
            name = " ".join([*names, "shard_params"] if shard_params else names)
            yield name, dataclasses.replace(c, mesh=shape)


def factors(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of k numbers, the order counts."""
    if k == 1:
        yield (n,)
        return
    for first in range(n, 0, -1):
        if n % first == 0:
            for rest in factors(n // first, k - 1):
                yield (first, *rest)


def attempt(trial: Config, devices: list[jax.Device]) -> Estimate | str:
    """The estimate, or why there is none."""
    try:
        config.validate(trial)
        return step.estimate(trial, mesh.make(trial.mesh, devices))
    except TooLargeError as error:
        return report.too_large(error)
    except ValueError as error:
        return str(error).splitlines()[0]
