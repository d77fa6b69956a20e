"""Ends a process that no longer moves, and says which process of the run holds the others up.

Two threads in every process. One exchanges signs of life through jax's key-value store, and may itself be
held up by a coordinator that is stopped; the other only looks at clocks, so that it always fires.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import threading
import time
from collections.abc import Sequence

import jax

from tvq import schema
from tvq.cluster.log import Log
from tvq.cluster.meeting import names, wait_for_others
from tvq.cluster.processes import Processes
from tvq.errors import EXIT_STUCK

# Seconds that a process stays after its last line: the others, whose connections break, say theirs first.
LINGER = 2.0


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a process was last heard to do, for how long, and since when it is silent (seconds)."""

    phase: str
    step: int
    in_phase: float
    silent: float = 0.0


def blame(signs: Sequence[Sign], hosts: Sequence[str], silence: float) -> str:
    """One line: who holds the run up, from the last sign of each process."""
    silent = [i for i, s in enumerate(signs) if s.silent > silence]
    if silent:
        longest = max(signs[i].silent for i in silent)
        return f"no sign of life from {names(silent, hosts)} for {longest:.0f} s: dead, stopped or cut off"
    last = min(s.step for s in signs)
    behind = [i for i, s in enumerate(signs) if s.step == last]
    reading = [i for i in behind if signs[i].phase == "data"]
    if reading:
        return f"waiting for data on {names(reading, hosts)} (step {last})"
    # At the same step, those in the phase of most are waiting; the odd ones out are waited for.
    phases = [signs[i].phase for i in behind]
    most = max(phases, key=phases.count)
    odd = [i for i in behind if signs[i].phase != most]
    if 2 * len(odd) >= len(behind):
        return f"the processes are in different phases of step {last}: {', '.join(sorted(set(phases)))}"
    if odd:
        return f"waiting for {names(odd, hosts)}, in {signs[odd[0]].phase!r} of step {last}"
    if len(behind) < len(signs):
        return f"waiting for {names(behind, hosts)}, still at step {last} in {most!r}"
    return (
        f"all processes are in {most!r} of step {last}" if len(signs) > 1 else f"in {most!r} of step {last}"
    )


def table(signs: Sequence[Sign], hosts: Sequence[str]) -> str:
    """A line for each process."""
    return "\n".join(
        f"  {names([i], hosts)}: {s.phase} of step {s.step} for {s.in_phase + s.silent:.0f} s,"
        f" last heard of {s.silent:.0f} s ago"
        for i, s in enumerate(signs)
    )


class Watchdog:
    """`with Watchdog(...) as watchdog:` around the work; `watchdog.beat(phase, step)` wherever it moves on.

    When this process stays in one phase for longer than allowed, or another process gives no sign of life
    for `silence_timeout`, it writes to the log who holds the run up, what every process was doing and the
    stacks of all threads, and exits with EXIT_STUCK.

    One of several processes that was paused for `silence_timeout` (SIGSTOP, starved) ends too: the others
    have given it up. A single one holds nobody up, and the pause does not count.
    """

    def __init__(self, processes: Processes, section: schema.Cluster, log: Log):
        self.processes, self.section, self.log = processes, section, log
        self.tick = min(2.0, section.step_timeout / 10, section.silence_timeout / 10)
        self._lock = threading.Lock()
        self._leaving = threading.Lock()
        self._now = ("start", 0, time.monotonic(), section.compile_timeout)
        self._heard: list[tuple[str, float]] = []  # last text, when it changed
        self._exchanged = self._looked = 0.0
        self._warned = 0.0
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if processes.place.n_process > 1:
            self._threads.append(threading.Thread(target=self._exchange, name="signs of life", daemon=True))

    def __enter__(self) -> "Watchdog":
        self.processes.barrier("watchdog", self.section.start_timeout)  # from here on all give signs of life
        self._exchanged = self._looked = time.monotonic()
        self._heard = [("", self._looked)] * self.processes.place.n_process
        self.log.file  # noqa: B018  opened here, where an error has someone to hear it
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.processes.barrier("end of work")  # until here
        else:
            self._look()  # who is lost comes before what was lost with it
        with self._leaving:  # what others lost when they went is not reported once the watchdog has spoken
            self._end.set()
        for thread in self._threads:
            thread.join(timeout=10 if kind is None else 1)  # a lost coordinator may hold up the exchange
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str, step: int, allow: float | None = None) -> None:
        """Entered `phase` of `step`; it may take `allow` seconds (default config.cluster.step_timeout)."""
        allow = self.section.step_timeout if allow is None else allow
        with self._lock:
            self._now = (phase, step, time.monotonic(), allow)

    def signs(self) -> list[Sign]:
        """The last sign of every process; this one's own is of now.

        Silence counts only while the coordinator answers: when that is stopped, nobody is heard.
        """
        now, asked, signs = time.monotonic(), self._exchanged, []
        for i, (text, changed) in enumerate(self._heard):
            if i == self.processes.place.process_id:
                phase, step, since, _ = self._now
                signs.append(Sign(phase, step, now - since))
            elif text:
                phase, step, in_phase, _ = json.loads(text)
                signs.append(Sign(phase, step, in_phase, max(0.0, asked - changed)))
            else:
                signs.append(Sign("start", 0, 0.0, max(0.0, asked - changed)))
        return signs

    def _exchange(self) -> None:
        client, me = self.processes.client, self.processes.place.process_id
        assert client is not None
        count = 0
        while not self._end.wait(self.tick):
            phase, step, since, _ = self._now
            count += 1
            text = json.dumps([phase, step, round(time.monotonic() - since, 1), count])
            with contextlib.suppress(
                jax.errors.JaxRuntimeError
            ):  # no answer; the silence grows, _watch counts
                client.key_value_set(f"tvq/sign/{me}", text, allow_overwrite=True)
                signs = client.key_value_dir_get("tvq/sign/")
                now = self._exchanged = time.monotonic()
                for key, value in signs:
                    i = int(key.rpartition("/")[2])
                    if value != self._heard[i][0]:
                        self._heard[i] = (value, now)

    def _watch(self) -> None:
        while not self._end.wait(self.tick):
            # In C, and so also when some thread keeps the interpreter to itself. It cannot tell a pause from
            # that, so a process alone does without.
            if self.processes.place.n_process > 1:
                faulthandler.dump_traceback_later(self._now[3] + 30, exit=True, file=self.log.file)
            self._look()

    def _look(self) -> None:
        silence, many = self.section.silence_timeout, self.processes.place.n_process > 1
        now, before = time.monotonic(), self._looked
        self._looked = now
        if not many and now - before > 5 * self.tick:
            self._skip(now - before)
        phase, step, since, allow = self._now
        signs = self.signs()
        if many and now - before > silence:
            self._fire(f"this process itself stood still for {now - before:.0f} s: stopped or starved", [])
        if many and now - self._exchanged > silence:
            self._fire(f"process 0, the coordinator, has not answered for {silence:.0f} s", [])
        is_fresh = not many or now - self._exchanged < 5 * self.tick  # or the others have gone on since
        if now - since > allow and is_fresh:
            self._fire(f"no progress: in {phase!r} of step {step} for {now - since:.0f} s", signs)
        if any(sign.silent > silence for sign in signs):
            self._fire("a process is gone", signs)
        # Tell early, and then ever more rarely, what a long wait is for.
        if now - since > max(30.0, 2 * self._warned) and self._warned < allow:
            self._warned = now - since
            culprit = f": {blame(signs, self.processes.hosts, silence)}" if many else ""
            self.log.say(f"{phase!r} of step {step} for {self._warned:.0f} s{culprit}")
        if now - since < 30:
            self._warned = 0.0

    def _skip(self, pause: float) -> None:
        """A pause of this process does not count as time in its phase."""
        with self._lock:
            phase, step, since, allow = self._now
            self._now = (phase, step, min(since + pause, time.monotonic()), allow)

    def _fire(self, why: str, signs: Sequence[Sign]) -> None:
        """`signs` that are too old to blame anybody are left out."""
        with self._leaving:
            if self._end.is_set():  # the work has just ended by itself
                return
            try:
                self._last_words(why, signs)
            finally:  # whatever became of the words
                os._exit(EXIT_STUCK)

    def _last_words(self, why: str, signs: Sequence[Sign]) -> None:
        hosts = self.processes.hosts
        self.log.say(f"watchdog: {why}")
        if signs:
            self.log.say(blame(signs, hosts, self.section.silence_timeout))
        self.log.say(table(signs or self.signs(), hosts))
        faulthandler.dump_traceback(self.log.file, all_threads=True)
        self.log.say(f"exit {EXIT_STUCK}, to be started again; the stacks are in {self.log.path}")
        if len(hosts) > 1:
            time.sleep(LINGER)
        if self.processes.is_main:
            wait_for_others(self.processes.place)
