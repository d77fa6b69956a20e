"""Several local processes as one run, each with its own CPU devices and log."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    """A port that is free now together with the next one."""
    while True:
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except OSError:
                continue
            return port


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


class Pod:
    """`n` processes of tests.fakes.worker. `one` overrides the environment of single processes."""

    def __init__(
        self,
        workdir: Path,
        n: int,
        *options: str,
        one: dict[int, dict[str, str]] | None = None,
        port: int = 0,
    ):
        self.workdir, self.port = workdir, port or free_port()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for i in range(n):
            place = {
                "TVQ_COORDINATOR": f"127.0.0.1:{self.port}",
                "TVQ_N_PROCESS": str(n),
                "TVQ_PROCESS_ID": str(i),
            }
            variables = (place if n > 1 else {}) | (one or {}).get(i, {})
            if "ABSENT" in variables:
                continue
            with (workdir / f"output_{i}.txt").open("ab") as output:
                self.processes[i] = subprocess.Popen(
                    [sys.executable, "-m", "tests.fakes.worker", f"--workdir={workdir}", *options],
                    env=environment(**variables),
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

    def codes(self, timeout: float = 60) -> list[int]:
        """Exit codes in order, once all have ended."""
        deadline = time.monotonic() + timeout
        return [p.wait(timeout=max(0.1, deadline - time.monotonic())) for p in self.processes.values()]

    def said(self, process: int) -> str:
        return (self.workdir / f"output_{process}.txt").read_text()

    def wait_for(self, path: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not (self.workdir / path).exists():
            alive = any(p.poll() is None for p in self.processes.values())
            if not alive or time.monotonic() > deadline:
                raise AssertionError(f"{path} did not come; {[self.said(i) for i in self.processes]}")
            time.sleep(0.02)
