"""How a process ends: its errors, and the exit codes that a supervisor reads."""

import contextlib
import os
from collections.abc import Iterator

from tvq.errors import InputError

EXIT_FAILED = 1  # restart me
EXIT_INPUT = 2  # wrong configuration or input: a restart would fail again
EXIT_DIVERGED = 3  # loss or gradient is not a number: runs repeat, and a restart would diverge again
EXIT_STUCK = 70  # the watchdog ended me: restart me
EXIT_STOPPED = 75  # asked to stop, and saved: start me again


class ClusterError(RuntimeError):
    """The processes did not all connect, or lost one another. A restart may succeed."""


@contextlib.contextmanager
def writing(option: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """InputError, naming the `option` that asked for it, if the code inside cannot write the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{option}={folder}: cannot write there ({error.strerror}); use another folder"
        ) from error
