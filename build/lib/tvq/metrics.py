"""What a run tells: rows of numbers in a file, the time it takes, and one live line on the terminal.

A row is a flat dict that starts with `step` (parameter updates done) and `split`; a writer is anything with
`write(row)` and `close()`.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from etils import epath

Row = dict[str, Any]
CLEAR = "\r\x1b[K"  # to the start of the line, and empty it


def row(
    step: int,
    split: str,
    metrics: Mapping[str, Any],
    tokens_per_second: float | None,
    bytes_per_token: float | None = None,
) -> Row:
    """The row of a train step, from its metrics: scalars on the host.

    `loss` is in nats a token that counts, `bits_per_token` the same in bits, `bits_per_byte` in bits a byte
    of the original text if `bytes_per_token` is given. Loss and mask arrive as means over all positions;
    every other metric goes through under its own name.
    """
    values = {name: float(value) for name, value in metrics.items()}
    nats, mask = values.pop("loss_lm_per_token_unscaled"), values.pop("loss_mask_per_token")
    loss = nats / mask if mask else math.nan
    bits = loss / math.log(2)
    bits_per_byte = {} if bytes_per_token is None else {"bits_per_byte": bits / bytes_per_token}
    return {
        "step": step,
        "split": split,
        "loss": loss,
        "bits_per_token": bits,
        **bits_per_byte,
        "tokens_per_second": tokens_per_second,
        **values,
    }


def progress_line(row: Row, steps: int, seconds_left: float | None) -> str:
    """A row for the eye: step of steps, loss, bits, speed, time left."""
    parts = [f"step {row['step']:,} of {steps:,}", f"loss {row['loss']:.4f}"]
    unit = "byte" if "bits_per_byte" in row else "token"
    parts.append(f"{row[f'bits_per_{unit}']:.3f} bits a {unit}")
    if row["tokens_per_second"] is not None:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`4 s`, `3:05 min`, `2:07 h`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02} h"
    return f"{whole // 86400} d {whole // 3600 % 24} h"


class JsonlWriter:
    """Appends rows to a file, one JSON object a line, each flushed. NaN and infinity are written as null.

    A run that goes on from the checkpoint of `resume_step` first drops the rows after it, and a last line
    that a kill tore, so that no row is there twice. For none to be missing either, write the rows of a step
    before its checkpoint is saved. ValueError if another line is not a row.
    """

    def __init__(self, path: epath.PathLike, resume_step: int):
        self._path = epath.Path(path)
        #: Splits that have a row of `resume_step` already.
        self.splits = _drop_after(self._path, resume_step) if self._path.exists() else set()
        self._file = self._path.open("a")

    def write(self, row: Row) -> None:
        finite = {name: None if _is_not_finite(value) else value for name, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _drop_after(path: epath.Path, last_step: int) -> set[str]:
    """Rewrites the file of rows without those of later steps, in one commit; the splits of the last step."""
    content = path.read_bytes()
    # What follows the last newline is empty, or torn.
    lines = content.split(b"\n")[:-1]
    steps = [_step_of(path, i + 1, line) for i, line in enumerate(lines)]
    kept = [line + b"\n" for step, line in zip(steps, lines, strict=True) if step <= last_step]
    if b"".join(kept) != content:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
    return {json.loads(line)["split"] for step, line in zip(steps, lines, strict=True) if step == last_step}


def _step_of(path: epath.Path, number: int, line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"line {number} of {path} is not a row of metrics: {line[:60]!r};"
            " remove the line, or move the file away"
        ) from None


class Clock:
    """Train time and speed, without the first step, which compiles, and without pauses.

    `seconds` is train time in all, over restarts if it is given what the last life of the run had come to.
    """

    def __init__(
        self, tokens_per_step: int, seconds: float = 0.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._tokens_per_step, self._now = tokens_per_step, now
        self._before = seconds
        self._paused = 0.0  # seconds in pauses since `start`
        self._start: tuple[int, float] | None = None  # step, time
        self._lap = (0, 0.0)  # step, train seconds at the last lap

    def start(self, step: int) -> None:
        """The first step is done, and all before it compiled: counting begins. Later calls do nothing."""
        if self._start is None:
            self._start, self._paused = (step, self._now()), 0.0
            self._lap = (step, self.seconds)

    @property
    def seconds(self) -> float:
        """Train seconds so far."""
        return self._before if self._start is None else self._before + self._running() - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside (evaluation, saving) is no train time."""
        began = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - began

    def lap(self, step: int) -> float | None:
        """Tokens a second since the last lap; None if no step was timed."""
        (last_step, last_seconds), self._lap = self._lap, (step, self.seconds)
        if self._start is None or step == last_step or self.seconds == last_seconds:
            return None
        return (step - last_step) * self._tokens_per_step / (self.seconds - last_seconds)

    def left(self, step: int, steps: int) -> float | None:
        """Seconds until `steps` at the pace so far, pauses included; None before a step was timed."""
        if self._start is None or step == self._start[0]:
            return None
        return (steps - step) * self._running() / (step - self._start[0])

    def _running(self) -> float:
        assert self._start is not None
        return self._now() - self._start[1]


class Console:
    """The terminal: messages, and below them one live line that is rewritten in place.

    Where the stream is no terminal, or one without escape codes (TERM=dumb), lines are simply printed. A
    context manager: leaving it ends the live line. `quiet` prints nothing. Safe to use from several threads.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False):
        self._stream = sys.stdout if stream is None else stream
        self._quiet = quiet
        self._live = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._line = ""
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._line:
                self._write("\n")
            self._line = ""

    def say(self, text: str) -> None:
        """Prints a message of one or more lines, above the live line."""
        with self._lock:
            self._write(f"{CLEAR}{text}\n{self._fit(self._line)}" if self._line else f"{text}\n")

    def progress(self, line: str, *, brief: bool = False) -> None:
        """Shows where the run is. A `brief` line is not worth one of its own, and is shown only live."""
        with self._lock:
            if self._live:
                self._line = line
                self._write(CLEAR + self._fit(line))
            elif not brief:
                self._write(f"{line}\n")

    def _fit(self, line: str) -> str:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        # A full line would wrap, and could not be cleared.
        return line[: (columns or 80) - 1]

    def _write(self, text: str) -> None:
        if not self._quiet:
            self._stream.write(text)
            self._stream.flush()
