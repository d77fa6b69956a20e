"""Shapes of the mesh side by side: the most promising are compiled, those that cannot fit are not."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent import futures

import jax

from tvq import schema, sharding
from tvq.errors import InputError
from tvq.programs.plan import report, step
from tvq.programs.plan.bound import Bound, bound
from tvq.programs.plan.step import Estimate, TooLargeError
from tvq.rules import validate
from tvq.run import metrics
from tvq.schema import Config

N_AT_ONCE = 2  # a compiler keeps little more than one core busy


def sweep(config: Config, devices: list[jax.Device], console: metrics.Console) -> bool:
    """Prints a row as each shape is compiled, then, or at Ctrl-C, a table of all. True: one fits."""
    trials = dict(shapes(config, len(devices)))
    rows: dict[str, Estimate | Bound | str] = {name: least(trial, devices) for name, trial in trials.items()}
    may_fit = {name: row for name, row in rows.items() if isinstance(row, Bound) and row.fits}
    chosen = sorted(may_fit, key=lambda name: may_fit[name].step_seconds)[: config.plan.n_compile]
    console.say(
        f"{len(trials)} shapes, of which {len(may_fit)} may fit; compiling {len(chosen)} (--n_compile),"
        " the most promising first"
    )
    pool, began = futures.ThreadPoolExecutor(N_AT_ONCE), time.monotonic()  # a compiler ignores Ctrl-C
    compiling = {name: pool.submit(attempt, trials[name], devices) for name in chosen}
    try:
        for i, name in enumerate(chosen, 1):
            rows[name] = compiling[name].result()
            left = (time.monotonic() - began) / i * (len(chosen) - i)
            console.say(
                f"{i} of {len(chosen)}, {metrics.duration(left)} left: {report.row(name, rows[name])}"
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        console.say(report.ranking(rows))
    return any(isinstance(row, Estimate) and row.fits for row in rows.values())


def least(trial: Config, devices: list[jax.Device]) -> Bound | str:
    """What the shape needs at least, or why it is impossible."""
    try:
        validate(trial)
        return bound(trial, sharding.make(trial.mesh, devices))
    except InputError as error:
        return f"no: {str(error).splitlines()[0]}"


def attempt(trial: Config, devices: list[jax.Device]) -> Estimate | str:
    """The estimate, or why there is none."""
    try:
        return step.estimate(trial, sharding.make(trial.mesh, devices))
    except TooLargeError as error:
        return f"no: {report.lacking(*error.args)}"


def shapes(config: Config, n_device: int) -> Iterator[tuple[str, Config]]:
    """Every shape of the mesh over n_device devices of one machine, with its config."""
    for devices, sequence, tensor in factors(n_device, 3):
        for shard_params in (False, True) if devices > 1 else (False,):
            shape = schema.Mesh(devices=devices, sequence=sequence, tensor=tensor, shard_params=shard_params)
            sizes = {"devices": devices, "sequence": sequence, "tensor": tensor}
            names = [f"{axis}={n}" for axis, n in sizes.items() if n > 1 or axis == "devices"]
            name = " ".join([*names, "shard_params"] if shard_params else names)
            yield name, dataclasses.replace(config, mesh=shape)


def factors(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as an ordered product of k numbers."""
    if k == 1:
        yield (n,)
        return
    for first in range(n, 0, -1):
        if n % first == 0:
            for rest in factors(n // first, k - 1):
                yield (first, *rest)
