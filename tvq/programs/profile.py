"""What a train step spends its time on: a few steps are traced, and their kernels summed part by part."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from tvq import cluster, sharding
from tvq.errors import InputError
from tvq.programs.plan.hlo import COLLECTIVES, Instruction
from tvq.programs.plan.program import Kernel, Program
from tvq.run import metrics, trace
from tvq.schema import Config
from tvq.training import optimizer, state, train_step

N_STEP, N_ROW = 2, 10
# A CUDA graph runs many kernels, but a trace names only the graph.
COMMAND_BUFFER = "command_buffer"
WITHOUT_COMMAND_BUFFERS: dict[str, str | bool] = {f"xla_gpu_enable_{COMMAND_BUFFER}": ""}
ENOUGH = 0.9  # of the devices' time must be in named kernels, or a warning is shown
EXCHANGE = "exchange"  # of devices, besides the sums of `reduce`
OTHER = "other"  # operations without a name of ours, and those that the compiler added


class Cost(NamedTuple):
    """The cost of one operation in one step on one device."""

    part: str  # of trace.PARTS, or EXCHANGE or OTHER
    way: str  # forward, again (computed a second time) or backward
    what: str  # the operation, as jax calls it
    seconds: float
    nbytes: float  # read and written
    n: float  # launches


def profile(config: Config, output: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Prints the largest costs of the train step on random tokens, and writes the trace to `output`.

    InputError: more than one process, or a device whose traces do not name their kernels.
    """
    place.check_alone("profile")
    console = metrics.Console()
    with cluster.writing("--output", output):
        output.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make(config.mesh, jax.devices(), config)
    B, T = config.train.global_batch_size, config.train.sequence_len
    sharding.check(mesh, config)
    sharding.check_batch(mesh, "train.global_batch_size", B, config.train.accumulate)
    tx = optimizer.make(config.optimizer, config.model)
    places = jax.tree.map(lambda x: x.sharding, state.place(config, tx, mesh))
    now = jax.jit(lambda: state.init(config.model, tx, config.train.seed), out_shardings=places)()
    tokens_BT = np.random.default_rng(0).integers(0, config.model.n_vocab, (B, T), np.int32)
    rows = dict.fromkeys(("inputs", "targets", "loss_mask"), np.ones_like(tokens_BT))
    batch = sharding.global_batch(mesh, rows | {"inputs": tokens_BT, "targets": tokens_BT[:, ::-1]}, B)
    console.say("compiling the train step")
    options = WITHOUT_COMMAND_BUFFERS if sharding.platform(mesh) == "gpu" else None
    update = train_step.make(config, mesh, tx).lower(now, batch).compile(options)
    now, _ = jax.block_until_ready(update(now, batch))  # the first call differs from the others
    with trace.written(Path(output)):
        for _ in range(N_STEP):
            now, _ = update(now, batch)
        jax.block_until_ready(now)
    n_run = N_STEP * mesh.size
    spent = {name: seconds / n_run for name, seconds in kernel_seconds(newest(Path(output))).items()}
    program = Program.read(update.as_text() or "")
    largest, rest = costs(program, spent), unattributed(program, spent)
    if not largest:
        where = mesh.devices.flat[0].device_kind
        raise InputError(f"{nameless(where, rest)}; open the trace instead: tensorboard --logdir {output}")
    console.say(table(largest, rest))
    console.say(f"the trace: tensorboard --logdir {output}")
    return 0


def nameless(device: str, rest: Mapping[str, float]) -> str:
    """Why a trace cannot be used."""
    if any(COMMAND_BUFFER in name for name in rest):
        return (
            f"the trace of a {device} names the CUDA graphs, `{COMMAND_BUFFER}`, not their kernels,"
            f" although the step was compiled without such graphs"
        )
    return f"the trace of a {device} does not name its kernels"


def newest(folder: Path) -> Path:
    """The last trace written to a folder."""
    return max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)


class Event(NamedTuple):
    plane: str  # a device, or the host
    name: str
    seconds: float
    stats: dict[str, object]


def events(path: Path) -> list[Event]:
    """The events of a trace."""
    with warnings.catch_warnings():
        # Python 3.12 warns about types that jaxlib makes; as an error this would end the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        return [
            Event(plane.name, event.name, event.duration_ns * 1e-9, dict(event.stats))
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
        ]


def kernel_seconds(path: Path) -> dict[str, float]:
    """Seconds by the name of the instruction, for all devices together; loops include what runs inside.

    What a GPU did outside of any program in the trace has its own name.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events(path):
        module = str(event.stats.get("hlo_module", ""))
        if module.startswith("jit_train_step"):
            seconds[str(event.stats.get("hlo_op", event.name))] += event.seconds
        elif not module and event.plane.startswith("/device:GPU"):
            seconds[event.name] += event.seconds
    return seconds


def costs(program: Program, seconds: Mapping[str, float]) -> list[Cost]:
    """The kernels of a program summed by operation, the largest cost first."""
    sums: dict[tuple[str, str, str], np.ndarray] = {}
    for kernel in program.kernels():
        name = kernel.instruction.name
        if name in seconds:
            row = sums.setdefault(named(program, kernel), np.zeros(3))
            row += (seconds[name], kernel.n * kernel.nbytes, kernel.n)
    rows = [Cost(*key, *row.tolist()) for key, row in sums.items()]
    return sorted(rows, key=lambda cost: -cost.seconds)


def unattributed(program: Program, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of what is not a kernel of the program, by name; loops and calls count by what runs inside."""
    known = {kernel.instruction.name for kernel in program.kernels()}
    for computation in program.computations.values():
        for one in computation.values():
            if one.op in ("while", "call") and COMMAND_BUFFER not in one.called:
                known.add(one.name)
    return {name: spent for name, spent in seconds.items() if name not in known}


def named(program: Program, kernel: Kernel) -> tuple[str, str, str]:
    """Part, way and operation, from a name like `jit(train_step)/transpose(jvp(loss))/dot_general`."""
    path = origin(program, kernel.instruction)
    parts = re.findall(rf"\b({'|'.join(trace.PARTS)})\b", path)
    way = "again" if "rematted" in path else "backward" if "transpose(" in path else "forward"
    exchanges = kernel.instruction.op.startswith(COLLECTIVES)
    part = parts[-1] if parts else EXCHANGE if exchanges else OTHER
    return part, way, path.rpartition("/")[2] or kernel.instruction.op


def origin(program: Program, one: Instruction) -> str:
    """The name that jax gave; where the compiler lost it, that of an operand."""
    scope = next(names for names in program.computations.values() if one.name in names)
    seen: set[str] = set()
    waiting = [one]
    while waiting:
        one = waiting.pop(0)
        inside = [part for _, part in program.inner(one)] if one.op == "fusion" else []
        for part in [one, *inside]:
            if path := part.attribute(r'op_name="([^";]*)'):
                return path
        waiting += [scope[name] for name in one.operands if name not in seen]
        seen |= set(one.operands)
    return ""


def table(spent: list[Cost], rest: Mapping[str, float]) -> str:
    """The N_ROW largest costs, and the time of each part; `rest` has no known part."""
    known = sum(cost.seconds for cost in spent)
    total = known + sum(rest.values())
    by_part = {
        part: sum(cost.seconds for cost in spent if cost.part == part)
        for part in (*trace.PARTS, EXCHANGE, OTHER)
    }
    if rest:
        largest = ", ".join(sorted(rest, key=lambda name: -rest[name])[:3])
        by_part[f"not attributed: {largest}{' ...' if len(rest) > 3 else ''}"] = total - known
    lines = [
        *rows(spent, total),
        "",
        f"by part, of {1e3 * total:,.1f} ms a step and device:",
        *(
            f"{seconds / total:6.1%}  {part}"
            for part, seconds in sorted(by_part.items(), key=lambda item: -item[1])
        ),
    ]
    if known < ENOUGH * total:
        lines.append(
            f"only {known / total:.1%} of this time is in kernels that both the trace and the program name"
        )
    return "\n".join(lines).replace("%", " %")


def rows(spent: list[Cost], total: float) -> Iterator[str]:
    yield f"{'share':>7}  {'ms':>9}  {'MB':>9}  {'GB/s':>7}  {'launches':>8}  what"
    for cost in spent[:N_ROW]:
        rate = cost.nbytes / cost.seconds / 1e9 if cost.seconds else 0.0
        yield (
            f"{cost.seconds / total:6.1%}  {1e3 * cost.seconds:9.2f}  {cost.nbytes / 1e6:9,.1f}  {rate:7.1f}"
            f"  {cost.n:8,.0f}  {cost.part}, {cost.way}: {cost.what}"
        )
