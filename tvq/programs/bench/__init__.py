"""Measurements, `tvq bench train|attention|decode|data`: fair, repeatable, and of programs that agree.

All cases of a command are compiled, run once and compared, and only then timed: interleaved, in a new random
order each round, so that a disturbance of the machine affects all alike.
"""

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
import sys
import time

import jax
from etils import epath

from tvq import atomic, cluster, sharding
from tvq.config import to_dict
from tvq.errors import InputError
from tvq.programs.bench import report
from tvq.programs.bench.cases import PREPARE
from tvq.programs.bench.session import Row, Session, measure
from tvq.run import metrics, records
from tvq.schema import BENCHES, Config

PACKAGES = ("tvq", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def bench(config: Config, output: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Prints a table and writes bench.json, bench.md and, if matplotlib is installed, bench.png.

    InputError: the input is wrong. DisagreementError: two programs that must agree do not; then nothing
    is written.
    """
    place.check_alone("bench")
    if config.bench.kind not in PREPARE:
        raise InputError(f"config.bench.kind must be one of {', '.join(BENCHES)}, not {config.bench.kind!r}")
    console = metrics.Console()
    s = Session(config, sharding.make(config.mesh, jax.devices(), config), log.say, time.monotonic())
    PREPARE[config.bench.kind](s)
    with cluster.writing("--output", output):  # now, not after everything is measured
        atomic.check(output)
    rows = report.rows(s, measure(s))
    if not rows:
        raise InputError("no case could be measured; see the notes above")
    facts = conditions(s)
    console.say(report.table(rows))
    text = {**facts, "notes": s.notes, "rows": rows, "config": to_dict(config)}
    atomic.write(output / "bench.json", records.to_json(text, indent=1) + "\n")
    atomic.write(output / "bench.md", document(facts, s.notes, rows))
    written = "bench.json, bench.md"
    if "T" in rows[0] or "context" in rows[0]:
        if report.plot(rows, output / "bench.png"):
            written += ", bench.png"
        else:
            console.say("no plot: matplotlib is not installed (pip install 'tvq[plots]')")
    console.say(f"{output}: {written}")
    return 0


def conditions(s: Session) -> Row:
    """What was measured, where and when: all that is needed to repeat it, besides the config."""
    first = s.mesh.devices.flat[0]
    memory = first.memory_stats()  # None on a CPU
    return {
        "kind": s.config.bench.kind,
        "command": shlex.join(sys.orig_argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{s.mesh.size} x {first.device_kind}",
        "versions": versions(),
        "peak_bytes_in_use": memory and memory.get("peak_bytes_in_use"),  # of all cases together
    }


def versions() -> dict[str, str]:
    """Of Python and of every package that is installed; tvq may run from its sources."""
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def document(facts: Row, notes: list[str], rows: list[Row]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = f"# tvq bench {facts['kind']}\n\n{facts['device']}, {facts['date']}; {known}.\n"
    lines = "".join(f"- {note}\n" for note in notes)
    return f"{head}\n    {facts['command']}\n\n{report.markdown(rows)}\n\n{lines}"
