"""Errors that end the program with a message and no traceback, and the exit codes that a supervisor reads."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from tvq import EXIT_INTERRUPTED, end_at_interrupt

EXIT_FAILED = 1  # restart me
EXIT_INPUT = 2  # wrong configuration or input: a restart would fail again
EXIT_DIVERGED = 3  # loss or gradient is not a number: runs repeat, and a restart would diverge again
EXIT_STUCK = 70  # the watchdog ended me: restart me
EXIT_STOPPED = 75  # asked to stop, and saved: start me again


class InputError(ValueError):
    """A config, an option or a file is wrong. The message names it, the numbers, and what would work."""


class SaveError(OSError):
    """A checkpoint cannot be written."""


class DivergedError(RuntimeError):
    """Loss or gradient is no longer a number."""


class DisagreementError(RuntimeError):
    """Two programs that must give the same numbers do not."""


class ClusterError(RuntimeError):
    """The processes did not all connect, or lost one another. A restart may succeed."""


CODES: dict[type[Exception], int] = {
    ClusterError: EXIT_FAILED,
    DisagreementError: EXIT_FAILED,
    SaveError: EXIT_FAILED,
    DivergedError: EXIT_DIVERGED,
    InputError: EXIT_INPUT,
}


@contextlib.contextmanager
def explained(say: Callable[[str], None]) -> Iterator[None]:
    """Ends the process with a message and an exit code, without a traceback, at errors meant for the user."""
    try:
        yield
    except tuple(CODES) as error:
        say(f"tvq: {error}")
        sys.exit(next(code for kind, code in CODES.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        say("tvq: interrupted")
        sys.exit(EXIT_INTERRUPTED)


def raise_at_interrupt() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt. In the middle of some imports it would crash the process."""
    if signal.getsignal(signal.SIGINT) is end_at_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def writing(option: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """InputError, naming the `option` that asked for it, if the code inside cannot write the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{option}={folder}: cannot write there ({error.strerror}); use another folder"
        ) from error
