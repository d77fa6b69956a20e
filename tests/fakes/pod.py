"""Several local processes as one run, each with its own CPU devices and log."""

import functools
import mmap
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jaxlib

from tests.fakes.forks import Fork, environment


@functools.cache
def knows(flag: str) -> bool:
    """Whether the installed XLA has a flag of this name; one that it does not know ends the process.

    The library itself is searched for the name as a C string: to try the flag would take a process.
    """
    (library,) = Path(jaxlib.__file__).parent.glob("libjax_common.*")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(flag.encode() + b"\0") >= 0


def flags(**values: str) -> str:
    """A value of XLA_FLAGS with those of these flags that the installed XLA has."""
    return " ".join(f"--{name}={value}" for name, value in values.items() if knows(name))


# Small programs run once: to compile them takes most of the time, and a fifth of it if nothing is optimised.
QUICK_TO_COMPILE = flags(
    xla_backend_optimization_level="0",
    xla_cpu_use_fusion_emitters="false",  # gone from jax 0.11 on
    xla_cpu_parallel_codegen_split_count="1",
)
# For short runs of real programs: what is compiled is kept, and warnings are errors.
SHORT_RUN = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_SHARE_BINARY_BETWEEN_HOSTS": "true",  # one process compiles; see tests/fakes/cached.py
    "XLA_FLAGS": QUICK_TO_COMPILE,
    "PYTHONWARNINGS": "error",
}


ENDLESS = "--steps=1000000"  # of tests.fakes.worker: the run is still there, however late a test gets to it
# Of the ports given out here, one each until this process ends: another that tests beside it is given others.
HELD: list[socket.socket] = []


def free_port() -> int:
    """A port that is free together with the next one, for the one who asked alone.

    Of those that SLURM jobs get, and below those that the kernel gives to outgoing connections.
    """
    while True:
        port, holder = random.randrange(12000, 20000, 2), socket.socket(type=socket.SOCK_DGRAM)
        try:
            holder.bind(("", port))  # of datagrams, which no run uses
            for number in (port, port + 1):
                socket.create_server(("", number)).close()
        except OSError:
            holder.close()
            continue
        HELD.append(holder)
        return port


class Pod:
    """`n` processes of one run, by default of tests.fakes.worker; what they print is in `folder`.

    `one` overrides the environment of single processes, `own` adds options to them, `on` starts them through
    another command.
    """

    def __init__(
        self,
        folder: Path,
        n: int,
        *options: str,
        module: str = "tests.fakes.worker",
        one: Mapping[int, Mapping[str, str]] | None = None,
        own: Mapping[int, Sequence[str]] | None = None,
        on: Mapping[int, Sequence[str]] | None = None,
        port: int = 0,
        **variables: str,
    ):
        self.folder, self.port = folder, port or free_port()
        self.processes: dict[int, subprocess.Popen[bytes] | Fork] = {}
        if module == "tests.fakes.worker":
            options = (f"--workdir={folder}", *options)
        for i in range(n):
            place = {
                "TVQ_COORDINATOR": f"127.0.0.1:{self.port}",
                "TVQ_N_PROCESS": str(n),
                "TVQ_PROCESS_ID": str(i),
            }
            found = variables | (place if n > 1 else {}) | dict((one or {}).get(i, {}))
            if "ABSENT" in found:
                continue
            with (folder / f"output_{i}.txt").open("ab") as output:
                arguments = (*options, *(own or {}).get(i, ()))
                if on is None:
                    fd = output.fileno()
                    self.processes[i] = Fork(module, arguments, environment(**found), fd, fd)
                    continue
                self.processes[i] = subprocess.Popen(
                    [*on[i], sys.executable, "-m", module, *arguments],
                    env=environment(**found),
                    stdout=output,
                    stderr=output,
                )

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def codes(self, timeout: float = 250) -> list[int]:
        """Exit codes in order, once all have ended."""
        deadline = time.monotonic() + timeout
        return [p.wait(timeout=max(0.1, deadline - time.monotonic())) for p in self.processes.values()]

    def said(self, process: int) -> str:
        return (self.folder / f"output_{process}.txt").read_text()

    def wait_for(self, path: str, timeout: float = 250) -> None:
        self.wait_until(lambda: (self.folder / path).exists(), path, timeout)

    def wait_for_line(self, process: int, text: str, timeout: float = 250) -> None:
        self.wait_until(lambda: text in self.said(process), text, timeout)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 250) -> None:
        deadline = time.monotonic() + timeout
        while True:
            has_ended = all(p.poll() is not None for p in self.processes.values())
            if condition():  # looked at last: they may have done it and ended
                return
            is_over = has_ended or time.monotonic() > deadline
            assert not is_over, f"{what} did not come; {[self.said(i) for i in self.processes]}"
            time.sleep(0.02)
