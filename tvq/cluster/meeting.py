"""The rendezvous before jax starts: who is here, who is missing, and whether all run the same program.

jax.distributed alone waits in silence and cannot tell who is missing. Here process 0 listens next to the
coordinator's port (on port + 1), each of the others sends one line about itself, and all get one verdict.
The ports trust their network, as jax's own do.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import selectors
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvq.cluster.place import Place
from tvq.errors import ClusterError, InputError

PACKAGE = Path(__file__).parents[1]
NEWS_EVERY = 5.0  # seconds between lines while waiting
LINGER = 5.0  # seconds that a bad verdict is kept for latecomers
PORT_PATIENCE = 20.0  # seconds that an earlier process, still ending, may hold the port
END_PATIENCE = 6.0  # seconds that process 0 gives the others to end before it


def code_version(package: Path = PACKAGE) -> dict[str, str]:
    """The code that runs here: package version, commit, a digest of the package's files, jax's versions."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    libraries = ("tvq", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    versions = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[f"{name} version"] = importlib.metadata.version(name)
    return versions | {"tvq commit": _commit(package), "tvq code": digest.hexdigest()[:12]}


def _commit(package: Path) -> str:
    if "TVQ_COMMIT" in os.environ:  # set where a checkout travels without its .git
        return os.environ["TVQ_COMMIT"]
    command = ["git", "-C", str(package), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.strip()


def differences(items: Mapping[int, Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """A line for each item that is not the same on all processes: every value, and who has it."""
    lines = []
    for key in dict.fromkeys(key for values in items.values() for key in values):
        holders: dict[str, list[int]] = {}
        for process, values in sorted(items.items()):
            holders.setdefault(json.dumps(values.get(key, "absent")), []).append(process)
        if len(holders) > 1:
            fewest_first = sorted(holders.items(), key=lambda item: len(item[1]))
            lines.append(f"{key}: " + "; ".join(f"{v} on {names(p, hosts)}" for v, p in fewest_first))
    return lines


def names(processes: Sequence[int], hosts: Sequence[str]) -> str:
    """`process 3 (node7)`, `processes 0, 1`: with hosts if they are known, and at most eight processes."""
    shown = [f"{i} ({hosts[i]})" if i < len(hosts) and hosts[i] else str(i) for i in processes[:8]]
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return ("process " if len(processes) == 1 else "processes ") + ", ".join(shown) + more


def command(place: Place, process: int) -> str:
    """What to type on a host to start one process of this run there."""
    program = "python -m tvq" if sys.argv[0].endswith("__main__.py") else shlex.quote(sys.argv[0])
    return (
        f"TVQ_COORDINATOR={place.coordinator} TVQ_N_PROCESS={place.n_process} TVQ_PROCESS_ID={process}"
        f" {program} {shlex.join(sys.argv[1:])}".rstrip()
    )


def meet(
    place: Place, items: Mapping[str, Any], timeout: float, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Waits for all processes and compares their items; returns the host name of each.

    Raises:
        ClusterError: not all came in time, or the coordinator cannot be reached; names who is missing.
        InputError: items differ, an id is taken twice, or the numbers of processes contradict each other.
    """
    deadline = time.monotonic() + timeout
    about = {
        "process": place.process_id,
        "n_process": place.n_process,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "items": items,
    }
    if place.is_main:
        listener = _listen(place, min(PORT_PATIENCE, timeout), say)
        verdict = _Rendezvous(listener, place, about, deadline, say).run()
    else:
        verdict = _answer(place, json.dumps(about).encode() + b"\n", deadline, say)
    if "input" in verdict:
        raise InputError(verdict["input"])
    if "error" in verdict:
        raise ClusterError(verdict["error"])
    return tuple(verdict["hosts"])


def wait_for_others(place: Place) -> None:
    """In process 0, before a bad end: until all others have ended, at most END_PATIENCE seconds.

    When process 0 ends, jax aborts the others, and their own last messages and exit codes would be lost.
    """
    deadline = time.monotonic() + END_PATIENCE
    with selectors.DefaultSelector() as selector:
        for line in place.lines:
            selector.register(line, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)


def _listen(place: Place, patience: float, say: Callable[[str], None]) -> socket.socket:
    port, deadline, said = place.address[1], time.monotonic() + patience, False
    while True:
        taken = port
        try:
            socket.create_server(("", port)).close()  # jax's own server would share a taken port in silence
            taken = port + 1
            return socket.create_server(("", port + 1))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"process 0 cannot listen on port {taken} of {socket.gethostname()}: {error.strerror};"
                    f" find the holder with `ss -ltnp sport = :{taken}`, or choose another port with"
                    " config.cluster.coordinator"
                ) from error
            if not said:
                said = True
                say(f"port {taken} is taken ({error.strerror}); trying for {patience:.0f} s")
            time.sleep(0.5)


def _answer(place: Place, line: bytes, deadline: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Reports to process 0 until there is a verdict, through refused, broken and restarted connections."""
    host, port = place.address
    news, trouble, last_said = "", "", time.monotonic()
    while not trouble or time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port + 1), timeout=5) as connection:
                connection.settimeout(1.0)
                connection.sendall(line)
                trouble = "the connection broke"
                for message in _messages(connection, deadline + 5):  # its verdict comes first
                    if "hosts" in message:
                        place.lines.append(connection.detach())
                    if "waiting" not in message:
                        return message
                    news = message["waiting"]
                    say(news)
        except OSError as error:
            trouble = error.strerror or str(error)
        if time.monotonic() - last_said > NEWS_EVERY:
            last_said = time.monotonic()
            say(f"waiting for process 0 at {place.coordinator}: {trouble}")
        time.sleep(0.3)
    if news:
        raise ClusterError(f"not all processes came in time; last heard: {news}")
    raise ClusterError(
        f"process {place.process_id} on {socket.gethostname()} could not reach process 0 at {host}, port"
        f" {port + 1}: {trouble}; is it running, and are ports {port} and {port + 1} open between the hosts?"
        f" To start it there: {command(place, 0)}"
    )


def _messages(connection: socket.socket, deadline: float) -> Any:
    buffer = b""
    while time.monotonic() < deadline:
        try:
            received = connection.recv(65536)
        except TimeoutError:
            continue
        if not received:
            return
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            yield json.loads(line)


@dataclasses.dataclass
class _Caller:
    connection: socket.socket
    received: bytes = b""
    about: dict[str, Any] | None = None


class _Rendezvous:
    """Process 0's side; `run` returns the verdict, which is sent to all who are here."""

    def __init__(
        self,
        listener: socket.socket,
        place: Place,
        about: dict[str, Any],
        deadline: float,
        say: Callable[[str], None],
    ):
        self.listener, self.place, self.about, self.deadline, self.say = listener, place, about, deadline, say
        self.hosts = [about["host"], *place.hosts[1:]]
        self.callers: dict[socket.socket, _Caller] = {}
        self.verdict: dict[str, Any] = {}
        self.told = 1  # this process

    @property
    def present(self) -> dict[int, dict[str, Any]]:
        return {0: self.about} | {c.about["process"]: c.about for c in self.callers.values() if c.about}

    def run(self) -> dict[str, Any]:
        next_news = time.monotonic() + NEWS_EVERY
        with self.listener, selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            closing = self.deadline
            while not self.verdict or self.told < self.place.n_process:
                events = selector.select(timeout=0.2)
                now = time.monotonic()
                # Hear those who have come before the time is up: this process itself may have been late.
                if self.verdict and not events and now > closing:
                    break
                for key, _ in events:
                    if key.fileobj is self.listener:
                        connection = self.listener.accept()[0]
                        connection.setblocking(False)
                        self.callers[connection] = _Caller(connection)
                        selector.register(connection, selectors.EVENT_READ)
                    else:
                        self._hear(self.callers[key.fileobj], selector)  # type: ignore[index]
                if not self.verdict:
                    self._count(is_late=not events and now > self.deadline)
                    closing = time.monotonic() + LINGER
                if self.verdict:
                    self._give_verdict(selector)
                elif time.monotonic() > next_news:
                    next_news = time.monotonic() + NEWS_EVERY
                    self.say(self._missing())
                    self._tell({"waiting": self._missing()}, self.callers.values())
        return self.verdict

    def _give_verdict(self, selector: selectors.BaseSelector) -> None:
        """Only to those who have spoken: closing on an unread line would lose the verdict."""
        for caller in [c for c in self.callers.values() if c.about]:
            self._tell(self.verdict, [caller])
            if "hosts" in self.verdict:
                self.place.lines.append(os.dup(caller.connection.fileno()))
            self._forget(caller, selector)
            self.told += 1

    def _forget(self, caller: _Caller, selector: selectors.BaseSelector) -> None:
        selector.unregister(caller.connection)
        caller.connection.close()
        del self.callers[caller.connection]

    def _hear(self, caller: _Caller, selector: selectors.BaseSelector) -> None:
        """Takes what a caller sent; one that hung up, or that is not a process of tvq, is forgotten."""
        try:
            received = caller.connection.recv(65536)
        except OSError:
            received = b""
        caller.received += received
        known = {"process", "n_process", "host", "pid", "items"}
        about = None
        if received.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                about = json.loads(caller.received)
        strange = received.endswith(b"\n") and not (isinstance(about, dict) and set(about) == known)
        if not received or strange:
            self._forget(caller, selector)
        elif about:
            twin = self.present.get(about["process"])
            caller.about = about
            if not self.verdict:
                self._register(about, twin)

    def _register(self, about: dict[str, Any], twin: dict[str, Any] | None) -> None:
        process, n, who = about["process"], about["n_process"], f"{about['host']} pid {about['pid']}"
        if n != self.place.n_process:
            self.verdict = {
                "input": f"process {process} ({who}) was started as one of {n},"
                f" but process 0 as one of {self.place.n_process}; give all the same TVQ_N_PROCESS"
            }
        elif twin:
            self.verdict = {
                "input": f"two processes claim to be number {process}: {twin['host']} pid {twin['pid']}"
                f" and {who}; give each its own TVQ_PROCESS_ID, 0 to {n - 1}"
            }
        else:
            self.hosts[process] = about["host"]

    def _count(self, is_late: bool) -> None:
        present = self.present
        if len(present) == self.place.n_process:
            unequal = differences({i: about["items"] for i, about in present.items()}, self.hosts)
            report = "the processes of this run differ:\n  " + "\n  ".join(unequal)
            self.verdict = {"input": report} if unequal else {"hosts": self.hosts}
        elif is_late:
            self.verdict = {"error": self._missing(late=True)}

    def _missing(self, late: bool = False) -> str:
        absent = [i for i in range(self.place.n_process) if i not in self.present]
        line = f"{len(self.present)} of {self.place.n_process} processes are here; missing: "
        line += names(absent, self.hosts)
        if not late:
            return line
        starts = "\n  ".join(command(self.place, i) for i in absent[:8])
        return f"{line}, after config.cluster.start_timeout; to start them, run on their hosts:\n  {starts}"

    def _tell(self, message: dict[str, Any], callers: Iterable[_Caller]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for caller in callers:
            with contextlib.suppress(OSError):  # it has gone; the next count shows that
                caller.connection.setblocking(True)
                caller.connection.settimeout(5)
                caller.connection.sendall(line)
                caller.connection.setblocking(False)
