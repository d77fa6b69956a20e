"""Messages on the terminal and in logs. Writing them never fails: no run ends because of a message.

A pipe without a reader, a full disk, a terminal that is gone or closed: what cannot be written is dropped,
and the next message is tried again. What a command was asked to print is more than a message: `failed`
tells whether it was written.
"""

import atexit
import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, TextIO

PATIENCE = 10.0  # seconds that a run waits for a reader who has stopped reading (less, Ctrl-S)
_FAILED: dict[int, OSError] = {}  # by descriptor: why words were dropped last


class Words(io.TextIOBase):
    """A stream of text over another one, or over None where there is none. Its methods raise nothing.

    It has no buffer of its own, so that nothing is left over to fail at exit, and a signal handler may use it
    in the middle of another write.
    """

    def __init__(self, stream: IO[Any] | None, patience: float | None):
        """`patience`: seconds to wait for a reader (None: forever); then words are dropped until it reads."""
        self._stream, self._patience = stream, patience
        self._is_stuck = False
        try:
            self._fd = None if stream is None else stream.fileno()
        except (OSError, ValueError):  # not a file of the operating system, or closed
            self._fd = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self.flush()
        self.write_now(text)
        return len(text)

    def write_now(self, text: str) -> None:
        """Writes without flushing the stream first: for a signal handler, which may interrupt a flush."""
        with self._dropping():
            if self._fd is not None:
                self._put(self._fd, text.encode(self.encoding, "replace"))
            elif self._stream is not None:
                self._stream.write(text)
                self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """Keeps the error for `failed` instead of raising it; a stream that was closed is none."""
        try:
            yield
        except OSError as error:
            _FAILED[-1 if self._fd is None else self._fd] = error
        except ValueError:  # the stream was closed
            pass

    def _put(self, fd: int, data: bytes) -> None:
        while data and self._is_ready(fd):
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]  # more might block, although it is ready

    def _is_ready(self, fd: int) -> bool:
        if self._patience is None:
            return True
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        self._is_stuck = not poll.poll(0 if self._is_stuck else 1000 * self._patience)
        return not self._is_stuck

    def flush(self) -> None:
        """Flushes what was written to the stream itself before."""
        with self._dropping():
            if self._stream is not None:
                self._stream.flush()

    def fileno(self) -> int:
        if self._fd is None:
            raise io.UnsupportedOperation("fileno")
        return self._fd

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:
            return False

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Closes the stream; a full disk may report its error only then."""
        with self._dropping():
            if self._stream is not None:
                self._stream.close()

    def __del__(self) -> None:
        """Leaves the stream open: this object does not own it."""


def guarded(stream: IO[Any] | None, patience: float | None = PATIENCE) -> Words:
    """The stream, wrapped so that writing never fails."""
    return stream if isinstance(stream, Words) else Words(stream, patience)


def tell(text: str) -> None:
    """Writes a line to standard error."""
    guarded(sys.stderr).write(f"{text}\n")


def failed(stream: TextIO | None) -> str:
    """Why words to the stream were last dropped; empty if none were, or if the reader has left."""
    try:
        error = None if stream is None else _FAILED.get(stream.fileno())
    except (OSError, ValueError):
        return ""
    return "" if error is None or isinstance(error, BrokenPipeError) else str(error.strerror)


def arrived(code: int, say: Callable[[str], None]) -> int:
    """The exit code of a command whose result is its standard output: a failure if that is lost."""
    trouble = failed(sys.stdout)
    if trouble:
        say(f"tvq: standard output: {trouble}; the output is lost")
    return code or int(bool(trouble))


def begin() -> None:
    """At the start of the program: guards standard error, and the last flush at exit."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes `number`; else the next file opened would get the words
    _FAILED.clear()
    sys.stderr = guarded(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that the terminal cannot show is not an error
    atexit.unregister(settle)
    atexit.register(settle)


def settle() -> None:
    """Flushes the standard streams. What they cannot write is dropped; else Python would exit with 120."""
    for stream in filter(None, (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__)):
        try:
            stream.flush()
        except OSError as error:
            _FAILED[stream.fileno()] = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
        except ValueError:  # closed
            continue
