"""A small run in the place of `tvq train`: meets, sums over all devices, saves, stops, resumes.

    python -m tests.fakes.worker --workdir=DIR [--steps=N] [--every=N] [--pause=S] [--config.cluster.F=V ...]

It ends after N steps; the file DIR/steps has the last word, where it is there at the start. What is to befall
a run befalls an ENDLESS one, and the file lets the next start have an end.
TVQ_TEST_FAULT, a JSON object, makes one process misbehave: {"process": 1, "kind": "data", "step": 3},
or whoever is given it wait for the file DIR/go: {"kind": "wait", "step": 3}.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tvq import cluster, config, schema


def misbehave(fault: dict[str, Any], process: int, kind: str, step: int) -> None:
    if (fault.get("process"), fault.get("kind"), fault.get("step", step)) != (process, kind, step):
        return
    if kind == "raise":
        raise RuntimeError("a bug on one host")
    time.sleep(3600)


def work(
    arguments: argparse.Namespace, section: schema.Cluster, place: cluster.Place, log: cluster.Log
) -> int:
    fault = json.loads(os.environ.get("TVQ_TEST_FAULT", "{}"))
    # The digest of the code is a constant here: an editor may save a file while a test runs.
    items = {"tvq code": "as tested"} | json.loads(os.environ.get("TVQ_TEST_ITEMS", "{}"))
    workdir, me = Path(arguments.workdir), place.process_id
    processes = cluster.start(place, section, items, log.say)
    workdir.mkdir(parents=True, exist_ok=True)
    with cluster.Watchdog(processes, section, log) as watchdog:
        saved = workdir / "state.json"
        state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "sum": 0.0}
        processes.agree(
            "start", {"checkpoint step": state["step"], **json.loads(os.environ.get("TVQ_TEST_LATE", "{}"))}
        )
        mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec("devices")
        total = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x.sum(), "devices"),
                mesh=mesh,
                in_specs=spec,
                out_specs=PartitionSpec(),
            )
        )
        stopped = False
        file = workdir / "steps"
        steps = int(file.read_text()) if file.exists() else arguments.steps
        for step in range(state["step"], steps):
            watchdog.beat("data", step)
            misbehave(fault, me, "data", step)
            while fault == {"kind": "wait", "step": step} and not (workdir / "go").exists():
                time.sleep(0.01)
            batch = np.full((jax.local_device_count(), 2), step, np.float32)
            watchdog.beat("ready", step)
            processes.batch_ready()
            watchdog.beat("step", step, section.compile_timeout if step == state["step"] else None)
            misbehave(fault, me, "raise", step)
            x = jax.make_array_from_process_local_data(
                NamedSharding(mesh, spec), batch, (jax.device_count(), 2)
            )
            state = {"step": step + 1, "sum": state["sum"] + float(total(x))}
            time.sleep(arguments.pause)
            stopped = processes.stop_requested()
            if stopped or state["step"] == steps or state["step"] % arguments.every == 0:
                watchdog.beat("save", step)
                misbehave(fault, me, "save", step)
                if processes.is_main:
                    part = saved.with_suffix(".part")
                    part.write_text(json.dumps(state))
                    part.rename(saved)
                processes.barrier("save", arguments.barrier)
            if stopped:
                log.say(f"stopped and saved at step {state['step']}")
                break
        if not stopped:
            (workdir / f"done_{me}.json").write_text(
                json.dumps(state | {"devices": jax.device_count(), "processes": jax.process_count()})
            )
    processes.finish()
    return cluster.EXIT_STOPPED if stopped else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--barrier", type=float, default=60)
    arguments, rest = parser.parse_known_args()
    c = config.base()
    for option in rest:
        name, _, value = option.removeprefix("--config.cluster.").partition("=")
        c.cluster[name] = type(c.cluster[name])(value)
    section = config.build(c).cluster
    place = cluster.find(section, os.environ, cluster.tpu_metadata(os.environ))
    log = cluster.Log(cluster.log_folder(arguments.workdir), place)
    with cluster.guard(place, log.say):
        try:
            sys.exit(work(arguments, section, place, log))
        except ValueError as error:
            log.say(str(error))
            sys.exit(cluster.EXIT_INPUT)


if __name__ == "__main__":
    main()
