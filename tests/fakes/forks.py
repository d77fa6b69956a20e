"""Processes that need not import: forks of one that has imported tvq, which takes each two seconds else.

    Fork("tests.fakes.worker", ["--workdir=DIR"], environment, stdout, stderr)

is `python -m tests.fakes.worker --workdir=DIR` for a test: a process with this environment that runs the
module as its `__main__`. The one that forks has no backend of jax and no threads of its own; it is started at
need, once for each process that tests, and ends with it.
"""

import atexit
import concurrent.futures
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import jax

REPOSITORY = Path(__file__).parents[2]
IMPORTED = ("evaluate", "sample", "train")  # the programs that tests start as processes
STATUS = struct.Struct("i")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without anything that tells of a scheduler or of devices."""
    foreign = (
        "SLURM",
        "OMPI",
        "TPU",
        "MEGASCALE",
        "KUBERNETES",
        "JOB_COMPLETION",
        "TVQ_",
        "XLA_FLAGS",
        "JAX_",
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return (
        clean
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
        }
        | variables
    )


class Fork:
    """As subprocess.Popen, as far as tests use it: PIPE makes text streams of stdout and stderr."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        stdout: int,
        stderr: int,
        start_new_session: bool = False,
    ) -> None:
        self.stdout, stdout = piped(stdout)
        self.stderr, stderr = piped(stderr)
        request = {
            "argv": [module, *map(os.fspath, arguments)],
            "variables": dict(variables),
            "new_session": start_new_session,
        }
        status, theirs = os.pipe()
        ask(json.dumps(request).encode(), [stdout, stderr, theirs])
        os.close(theirs)
        for reader, writer in ((self.stdout, stdout), (self.stderr, stderr)):
            if reader is not None:
                os.close(writer)
        self.returncode: int | None = None
        self._status: BinaryIO = os.fdopen(status, "rb", buffering=0)  # until it has ended
        self.pid: int = STATUS.unpack(self._status.read(STATUS.size))[0]

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What has not been read yet of both streams, which must be PIPE."""
        assert self.stdout is not None
        assert self.stderr is not None
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            stdout, stderr = threads.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        self.wait(timeout)
        return stdout, stderr

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(STATUS.unpack(self._status.read(STATUS.size))[0])
            self._status.close()
        return self.returncode


def piped(fd: int) -> tuple[TextIO | None, int]:
    """`(reader, fd)` of a new pipe for PIPE, and the same file otherwise."""
    if fd != subprocess.PIPE:
        return None, fd
    reader, writer = os.pipe()
    return os.fdopen(reader), writer


@functools.cache
def forking() -> socket.socket:
    """The connection to the process that forks."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.forks"],
            stdin=theirs,
            cwd=REPOSITORY,
            env=environment(OPENBLAS_NUM_THREADS="1"),
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # called first, and tells the other to end
    return ours


LOCK = threading.Lock()


def ask(request: bytes, fds: list[int]) -> None:
    with LOCK:
        socket.send_fds(forking(), [request], fds)


def serve(connection: socket.socket) -> None:
    """Forks at each request, and between them notices those that have ended."""
    keepers: set[int] = set()
    while True:
        message, fds, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            break
        keeper = os.fork()
        if keeper == 0:
            connection.close()
            keep(json.loads(message), fds)
        keepers.add(keeper)
        for fd in fds:
            os.close(fd)
        keepers -= {one for one in keepers if os.waitpid(one, os.WNOHANG)[0]}
    for one in keepers:
        os.waitpid(one, 0)


def keep(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """The parent of one process: tells its number, and how it ended."""
    stdout, stderr, status = fds
    pid = os.fork()
    if pid == 0:
        os.close(status)
        become(request, stdout, stderr)
    os.write(status, STATUS.pack(pid))
    os.close(stdout)
    os.close(stderr)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    os.write(status, STATUS.pack(os.waitpid(pid, 0)[1]))
    os._exit(0)


def become(request: dict[str, Any], stdout: int, stderr: int) -> NoReturn:
    """From here on this process is what was asked for; it ends like a Python that runs a module."""
    if request["new_session"]:
        os.setsid()
    for fd, to in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
        os.dup2(fd, to)
        os.close(fd)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for name in set(os.environ) - set(request["variables"]):
        del os.environ[name]
    os.environ.update(request["variables"])
    code = 1
    try:
        configure(request["variables"])
        sys.argv = request["argv"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # as Python itself shows it
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody reads it
                code = 120
        os._exit(code)


def configure(variables: Mapping[str, str]) -> None:
    """What jax and Python have read of the environment when they started."""
    for name, text in variables.items():
        option = name.lower()
        if name.startswith("JAX_") and hasattr(jax.config, option):
            now = getattr(jax.config, option)
            if isinstance(now, bool):
                value: Any = text.lower() in ("1", "true")
            else:
                value = type(now)(text) if isinstance(now, int | float) else text
            jax.config.update(option, value)
    if variables.get("PYTHONWARNINGS") == "error":
        warnings.simplefilter("error")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(f"tvq.programs.{name}")
    serve(socket.socket(fileno=os.dup(0)))
