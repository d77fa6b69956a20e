"""All processes of a run as one thing: started once, with named barriers, agreement, and one common stop."""

import contextlib
import glob
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # jax's key-value store and barriers have no public name
from jax.experimental import multihost_utils

from tvq import numerics, schema, words
from tvq.cluster.meeting import code_version, differences, meet, names, wait_for_others
from tvq.cluster.place import Place
from tvq.errors import EXIT_FAILED, ClusterError, InputError

TPU_LOCK = Path("/tmp/libtpu_lockfile")


class Processes:
    """What the processes of a run do together. With one process every method returns at once.

    All processes must call `barrier`, `gather`, `agree`, `batch_ready` in the same order.
    """

    def __init__(self, place: Place, hosts: tuple[str, ...], timeout: float):
        self.place, self.hosts, self.timeout = place, hosts, timeout
        self.client = distributed.global_state.client if place.n_process > 1 else None
        self._stop = threading.Event()
        self._n_asked = 0

    @property
    def is_main(self) -> bool:
        """True in the one process that writes to the terminal and to outside services."""
        return self.place.is_main

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Returns when all processes are here. ClusterError names those absent after `timeout` seconds."""
        if self.client is None:
            return
        timeout = self.timeout if timeout is None else timeout
        start = time.monotonic()
        try:
            self.client.wait_at_barrier(f"tvq/{name}", round(1000 * timeout))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ClusterError(f"barrier {name!r}: a process is gone: {_first_line(error)}") from error
            # All who waited were released together; each signs, and the missing signatures are the absent.
            self.client.key_value_set(f"tvq/waited/{name}/{self.place.process_id}", "", allow_overwrite=True)
            time.sleep(1)
            waited = {
                int(key.rpartition("/")[2]) for key, _ in self.client.key_value_dir_get(f"tvq/waited/{name}/")
            }
            absent = [i for i in range(self.place.n_process) if i not in waited]
            raise ClusterError(
                f"barrier {name!r}: after {time.monotonic() - start:.0f} s still absent:"
                f" {names(absent, self.hosts)}; see the log of each for what it was doing"
            ) from error

    def gather(self, name: str, value: Any) -> list[Any]:
        """The JSON value of every process, in order. `name` serves once a run."""
        if self.client is None:
            return [value]
        folder = f"tvq/gather/{name}/"
        self.client.key_value_set(f"{folder}{self.place.process_id}", json.dumps(value))
        self.barrier(f"gather {name}")
        values = {int(k.rpartition("/")[2]): v for k, v in self.client.key_value_dir_get(folder)}
        return [json.loads(values[i]) for i in range(self.place.n_process)]

    def agree(self, name: str, items: Mapping[str, Any]) -> None:
        """InputError in every process, naming each differing item and who has what, unless all are equal."""
        unequal = differences(dict(enumerate(self.gather(name, dict(items)))), self.hosts)
        if unequal:
            raise InputError("the processes of this run differ:\n  " + "\n  ".join(unequal))

    def batch_ready(self) -> None:
        """Waits until every process holds its part of the next batch.

        A host that reads slowly is then waited for here, where the watchdog can name it, and not inside a
        device collective that dies of it. About 1 ms, beside the step that the devices still run.
        """
        self.barrier("batch", self.timeout + 30)  # the watchdog, which says more, is to end the wait

    def stop_requested(self) -> bool:
        """True at the same call in all processes, once any of them got SIGTERM, SIGHUP or SIGINT.

        Call it at every step: one process answers at once, several need it to settle on a step.
        """
        if self.client is None:
            return self._stop.is_set()
        # From 1, not from the step that a run resumes from: a signal before the first call would settle on
        # call 1, which jax then takes to be missed, and the stop would be lost.
        self._n_asked += 1
        return multihost_utils.reached_preemption_sync_point(self._n_asked)

    def ask_to_stop(self) -> None:
        """What SIGTERM to this process does."""
        if self.client is None:
            self._stop.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # jax's own notice, which reaches all processes

    def finish(self) -> None:
        """The common end: waits for all at jax's own barrier."""
        if self.client is not None:
            jax.distributed.shutdown()

    def _catch_signals(self) -> None:
        """SIGTERM, SIGHUP and the first Ctrl-C ask for a stop; the second Ctrl-C ends the process.

        A SIGHUP that is ignored at the start, as under nohup, stays ignored.
        """
        terminal = words.guarded(sys.stderr)

        def on_interrupt(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.ask_to_stop()
            terminal.write_now("\nstopping once this step is done and saved; Ctrl-C again ends at once\n")

        signal.signal(signal.SIGINT, on_interrupt)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda number, frame: self.ask_to_stop())
        if self.client is None:
            signal.signal(signal.SIGTERM, lambda number, frame: self.ask_to_stop())


def start(
    place: Place,
    section: schema.Cluster,
    items: Mapping[str, Any],
    say: Callable[[str], None],
    stoppable: bool = True,
) -> Processes:
    """Brings the processes together: rendezvous, jax.distributed, signals, devices. Once, before jax.

    Args:
        place: from `find`.
        section: config.cluster.
        items: what must be equal on all processes besides the code and jax's settings: `config.common(...)`.
        say: takes a line for people.
        stoppable: SIGTERM and Ctrl-C ask for a stop, which the caller polls with `stop_requested`; else they
            end the process.
    Raises:
        ClusterError: processes are missing, the port is taken, an accelerator is held by another process.
        InputError: the processes differ, or found another number of devices than they were given.
    """
    if glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
        clear_stale_lock(TPU_LOCK, say)
    hosts = place.hosts
    if place.n_process > 1:
        began = time.monotonic()
        hosts = meet(place, {**code_version(), **numerics.common(), **items}, section.start_timeout, say)
        jax.config.update("jax_enable_preemption_service", stoppable)
        jax.distributed.initialize(
            place.coordinator,
            place.n_process,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=60,  # all have just been seen
            # A backstop: our own watchdog looks at half this time, and says more.
            heartbeat_timeout_seconds=round(2 * section.silence_timeout) + 10,
            shutdown_timeout_seconds=round(section.silence_timeout) + 10,
        )
        say(f"all {place.n_process} processes are here after {time.monotonic() - began:.1f} s")
    processes = Processes(place, hosts, section.step_timeout)
    if stoppable:
        processes._catch_signals()
    _check_devices(processes, place.local_devices)
    return processes


def _check_devices(processes: Processes, granted: int) -> None:
    devices = jax.local_devices()
    kind = devices[0].platform
    wrong = f"found {len(devices)} {kind} devices of {granted}" if granted not in (0, len(devices)) else ""
    devices_of = processes.gather("devices", [wrong, f"{len(devices)} {kind}"])
    errors = [f"{names([i], processes.hosts)} {text}" for i, (text, _) in enumerate(devices_of) if text]
    if errors:
        raise InputError(
            "; ".join(errors) + ": the scheduler's binding hides them, or the jax installed is for another"
            " platform; otherwise set config.cluster.local_devices to the number meant"
        )
    unequal = differences(
        {i: {"local devices": count} for i, (_, count) in enumerate(devices_of)}, processes.hosts
    )
    if unequal:
        raise InputError("the processes see different devices:\n  " + "\n  ".join(unequal))


def clear_stale_lock(lock: Path, say: Callable[[str], None], proc: Path = Path("/proc")) -> None:
    """Removes an accelerator's lock file that no process holds; ClusterError names a living holder."""
    if not lock.exists():
        return
    hidden = 0
    for folder in proc.glob("[0-9]*"):
        try:
            held = any(os.path.realpath(link) == str(lock.resolve()) for link in (folder / "fd").iterdir())
            text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except PermissionError:
            hidden += 1
            continue
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        if held and int(folder.name) != os.getpid():
            raise ClusterError(
                f"the accelerator is in use by process {folder.name} ({text[:200]}), which holds {lock};"
                f" stop it first: kill {folder.name}"
            )
    owner = lock.stat().st_uid
    if hidden and owner != os.getuid():
        raise ClusterError(
            f"{lock} belongs to user {owner}, whose processes cannot be seen from here;"
            f" if none of them uses the accelerator: sudo rm {lock}"
        )
    lock.unlink(missing_ok=True)
    say(f"removed {lock}, left behind by a process that is gone")


@contextlib.contextmanager
def guard(place: Place, say: Callable[[str], None]) -> Iterator[None]:
    """Around the whole program: a process that fails ends at once instead of holding up the others.

    With several processes an ordinary exit waits for all of them at jax's shutdown barrier, minutes
    long; so here an error is logged and the process is gone. With one process nothing is changed.
    """
    try:
        yield
    except BaseException as error:  # the edge of the process: whatever it was, the others must see us go
        leaving = isinstance(error, SystemExit)
        if place.n_process == 1 or (leaving and not jax.distributed.is_initialized()):
            raise
        code: Any = (error.code or 0) if isinstance(error, SystemExit) else EXIT_FAILED
        if not leaving:
            known = isinstance(error, ClusterError)
            say(str(error) if known else "".join(traceback.format_exception(error)).rstrip())
        words.settle()
        if place.is_main:
            wait_for_others(place)
        os._exit(code if isinstance(code, int) else EXIT_FAILED)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
