"""Signals at random moments to the processes of a supervised run, which must end like an unbroken one.

    python -m tests.chaos --seed=0 --events=20 --processes=4     (about ten minutes on two cores)

Every event is SIGKILL, SIGTERM or SIGSTOP to one process or to all, at a point of the run: in one of the
phases that processes tell, or while a checkpoint waits for its commit. A process that is stopped must be
named in the logs of the others within the deadline; then it goes on, and must end itself.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.end_to_end.program import REPOSITORY, Program, arrays, newest, rows, write_corpus
from tests.fakes.pod import SHORT_RUN, Pod, environment, free_port

# The first are those of a plan of few events.
POINTS = ("step", "commit", "start", "compile", "data", "ready", "evaluate", "save")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
STEPS_BETWEEN = 6
SILENCE, START = 10, 40
DEADLINE = {"start": START + 20}  # seconds until a stopped process is named
PATIENCE = 240.0


class Event(NamedTuple):
    point: str
    number: signal.Signals
    victims: tuple[int, ...]
    step: int  # not before this one
    delay: float


class Phase(NamedTuple):
    name: str
    step: int
    pid: int


def plan(seed: int, n_event: int, n_process: int) -> list[Event]:
    """Every point and every signal in turn, in random order."""
    draw = random.Random(seed)
    points = [POINTS[i % len(POINTS)] for i in range(n_event)]
    numbers = [SIGNALS[i % len(SIGNALS)] for i in range(n_event)]
    draw.shuffle(points)
    draw.shuffle(numbers)
    # A process that is stopped at the start and found in time starts no more: the next point lies ahead.
    while ("start", signal.SIGSTOP, "start") in zip(points, numbers, points[1:], strict=False):
        draw.shuffle(numbers)
    events = []
    for i, (point, number) in enumerate(zip(points, numbers, strict=True)):
        one, everyone = (draw.randrange(n_process),), tuple(range(n_process))
        victims = everyone if draw.random() < 0.25 else one
        events.append(Event(point, number, victims, STEPS_BETWEEN * i, draw.uniform(0, 0.01)))
    return events


class Chaos:
    """One supervised run and the events that befall it."""

    def __init__(self, program: Program, folder: Path, n_process: int, devices: int, n_event: int):
        self.n_process, self.folder, self.workdir = n_process, folder, folder / "broken"
        self.unbroken = folder / "unbroken"
        self.phases = folder / "phases"
        self.phases.mkdir()
        self.struck: dict[int, int] = {}  # the pid of each process at the last event
        self.variables = SHORT_RUN | {"JAX_NUM_CPU_DEVICES": str(devices)}
        steps = STEPS_BETWEEN * n_event + 20
        times = (f"silence_timeout={SILENCE}", f"start_timeout={START}", "step_timeout=60")
        no_sample = "--config.sample.every=0"  # no point to be struck at
        self.options = (
            f"--config.train.steps={steps}",
            no_sample,
            *(f"--config.cluster.{time}" for time in times),
        )
        self.program = program

    def arguments(self, workdir: Path) -> list[str]:
        return ["train", *self.program.options(workdir, *self.options)]

    def run_unbroken(self) -> None:
        arguments = self.arguments(self.unbroken)
        with Pod(
            self.folder, self.n_process, *arguments, module="tests.fakes.cached", **self.variables
        ) as pod:
            assert pod.codes(timeout=PATIENCE) == [0] * self.n_process, pod.said(0)

    @contextlib.contextmanager
    def supervised(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [
            REPOSITORY / "launch/local.sh",
            str(self.n_process),
            "--port",
            str(free_port()),
            "--backoff",
            "0",
            "--restarts",
            "1000",
        ]
        command += ["--", sys.executable, "-m", "tests.fakes.cached", *self.arguments(self.workdir)]
        variables = self.variables | {"TVQ_TEST_PHASES": os.fspath(self.phases)}
        with (
            (self.folder / "supervised.txt").open("wb") as output,
            subprocess.Popen(
                command, env=environment(**variables), stdout=output, stderr=output, start_new_session=True
            ) as process,
        ):
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def phase(self, process: int) -> Phase:
        try:
            name, step, pid = (self.phases / str(process)).read_text().split()
        except FileNotFoundError:
            return Phase("", 0, 0)
        return Phase(name, int(step), int(pid))

    def is_there(self, event: Event) -> bool:
        """Whether the run, started again since the last event, is at the point of this one."""
        pids = [self.phase(i).pid for i in range(self.n_process)]
        new = [i for i, pid in enumerate(pids) if pid != self.struck.get(i) and is_alive(pid)]
        if event.point == "start":
            return all(i in new and self.phase(i).name == "start" for i in event.victims)
        if len(new) < self.n_process:
            return False
        now = self.phase(event.victims[0])
        if event.point == "compile":
            return now.name in ("restore", "compile")
        if now.step < event.step:
            return False
        if event.point == "commit":
            return any((self.workdir / "checkpoints").glob("*tmp*"))  # a folder that may not be there yet
        return now.name == event.point

    def strike(self, event: Event, run: subprocess.Popen[bytes]) -> str:
        """Waits for the point, sends the signal; returns what happened."""
        deadline = time.monotonic() + PATIENCE
        while not self.is_there(event):
            assert run.poll() is None, f"the run ended before {event}:\n{self.logs()[-3000:]}"
            assert time.monotonic() < deadline, f"{event} never came: {[self.phase(i) for i in range(4)]}"
            time.sleep(0.001)
        time.sleep(event.delay)
        pids = {i: self.phase(i).pid for i in range(self.n_process)}
        # At the start the others go on waiting for the victims, with no need to start again themselves.
        if event.point != "start":
            self.struck = pids
        elif event.number != signal.SIGSTOP:
            self.struck |= {i: pids[i] for i in event.victims}
        logs = self.logs()
        send(event.number, [pids[i] for i in event.victims])
        at = self.phase(event.victims[0])
        who = "all" if len(event.victims) == self.n_process > 1 else f"process {event.victims[0]}"
        text = f"{event.number.name} to {who} at {event.point!r}, in {at.name!r} of step {at.step}"
        if event.number == signal.SIGSTOP:
            text += f": {self.named(event, logs)}"
            send(signal.SIGCONT, [pids[i] for i in event.victims])
        return text

    def named(self, event: Event, before: str) -> str:
        """Waits until stopped processes are named, or all have stood still for too long."""
        if len(event.victims) == self.n_process:
            time.sleep(SILENCE + 3)
            return "nobody is left to see it"
        began, allowed = time.monotonic(), DEADLINE.get(event.point, 2 * SILENCE + 15)
        while not (line := named_in(self.logs()[len(before) :], event.victims[0])):
            took = time.monotonic() - began
            assert took < allowed, f"{event}: not named within {allowed} s:\n{self.logs()[len(before) :]}"
            time.sleep(0.1)
        return f"after {time.monotonic() - began:.0f} s: {line}"

    def logs(self) -> str:
        return (self.folder / "supervised.txt").read_text(errors="replace")

    def check(self) -> None:
        """The broken run has the arrays, bit by bit, and the rows of the unbroken one."""
        found, wanted = arrays(newest(self.workdir)), arrays(newest(self.unbroken))
        differing = [name for name, array in found.items() if array.tobytes() != wanted[name].tobytes()]
        assert not differing, f"other values: {differing}"
        assert rows(self.workdir) == rows(self.unbroken), "other rows in metrics.jsonl"


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_alive(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def named_in(log: str, process: int) -> str:
    """The line that names a stopped process, as the others write it; empty if there is none."""
    lines = [rf"(?:no sign of life from|missing:|absent:) process(?:es)?[^;:]* {process}\b.*"]
    if process == 0:
        lines += [r"process 0, the coordinator, has not answered.*", r"could not reach process 0.*"]
        lines += [r"waiting for process 0 at.*"]
    match = re.search("|".join(lines), log)
    return match[0] if match else ""


def run(
    seed: int, n_event: int, n_process: int, devices: int, program: Program, folder: Path, say=print
) -> None:
    """AssertionError: the run did not survive as it must."""
    chaos = Chaos(program, folder, n_process, devices, n_event)
    chaos.run_unbroken()
    began = time.monotonic()
    with chaos.supervised() as supervised:
        for i, event in enumerate(plan(seed, n_event, n_process), start=1):
            what = chaos.strike(event, supervised)
            say(f"{time.monotonic() - began:5.0f} s  event {i} of {n_event}: {what}")
        code = supervised.wait(timeout=PATIENCE)
    assert code == 0, chaos.logs()[-3000:]
    chaos.check()
    restarts = chaos.logs().count("starting again")
    say(f"{restarts} restarts of single processes; last checkpoint and rows are those of an unbroken run")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tvq-chaos-") as folder:
        program = Program(Path(folder))
        write_corpus(program.corpus)
        run(chosen.seed, chosen.events, chosen.processes, chosen.devices, program, Path(folder))


if __name__ == "__main__":
    main()
