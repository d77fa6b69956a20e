"""What a run tells: rows of numbers, the time it takes, and one live line on the terminal.

A row is a flat dict that starts with `step` (parameter updates done) and `split`.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from tvq import words
from tvq.cluster.log import CLEAR, has_escape_codes

Row = dict[str, Any]


def row(
    step: int,
    split: str,
    metrics: Mapping[str, Any],
    pace: Mapping[str, Any],
    bytes_per_token: float | None = None,
) -> Row:
    """The row of a train step, from its metrics: scalars on the host.

    `loss` is in nats a token that counts, `bits_per_token` the same in bits, `bits_per_byte` in bits a byte
    of the original text if `bytes_per_token` is given. Loss and mask arrive as means over all positions;
    every other metric, and the columns of `pace`, go through under their own names.
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
        **pace,
        **values,
    }


def has_diverged(loss: float, n_vocab: int) -> bool:
    """Whether a loss is far worse than that of guessing, log(n_vocab): nothing is learnt from there on."""
    return loss > 2.0 * math.log(n_vocab)


def progress_line(row: Row, steps: int, seconds_left: float | None, n_vocab: int) -> str:
    """A row for the eye, what matters most first: a narrow terminal shows less of it."""
    parts = [f"step {row['step']:,} of {steps:,}"]
    if seconds_left:
        parts.append(f"{duration(seconds_left)} left")
    unit = "byte" if "bits_per_byte" in row else "token"
    if has_diverged(row["loss"], n_vocab):
        parts.append(f"loss {row['loss']:.4g} is worse than guessing: lower config.optimizer.lr_max")
    else:
        parts += [f"loss {row['loss']:.4f}", f"{row[f'bits_per_{unit}']:.3f} bits per {unit}"]
    if row.get("updates_skipped"):
        parts.append(f"skipped updates: {row['updates_skipped']:,.0f}")
    if row["tokens_per_second"] is not None:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("model_flops_use") is not None:
        parts.append(f"{100 * row['model_flops_use']:.0f} % of peak FLOPs")
    if row["data_wait"] is not None:
        parts.append(f"{100 * row['data_wait']:.0f} % data wait")
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


class Progress:
    """How far a long piece of work is, in words."""

    def __init__(self, what: str, unit: str, now: Callable[[], float] = time.monotonic) -> None:
        self._what, self._unit, self._now = what, unit, now
        self._first: tuple[int, float] | None = None

    def line(self, done: int, of: int) -> str:
        """`reading: 2,048 of 294,051 tokens, 15 s left`; the first part, which may compile, says nothing.

        `of` is 0 where it is not known.
        """
        text = (
            f"{self._what}: {done:,} of {of:,} {self._unit}" if of else f"{self._what}: {done:,} {self._unit}"
        )
        now = self._now()
        if self._first is None:
            self._first = (done, now) if done else None
            return text
        begun, since = self._first
        left = (of - done) * (now - since) / max(done - begun, 1)
        return text if done >= of else f"{text}, {duration(left)} left"


# What the wall time of a run goes into: updates; waiting for data while the devices have nothing to do;
# compiling, evaluating, drawing samples, saving; starting, until the first update; and updates that were lost
# with a process.
KINDS = ("step", "data", "compile", "evaluate", "sample", "save", "start", "repeated")


class Clock:
    """The wall time of a run by what it went into, over restarts, and its pace.

    It always counts for one of KINDS, "start" first. Time in which no process of the run is there does not
    count.
    """

    def __init__(
        self,
        tokens_per_step: int,
        peak: float | None = None,
        began: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`peak`: the tokens a second at the devices' peak, if that is known. It counts since `began`."""
        self._tokens_per_step, self._peak, self._now = tokens_per_step, peak, now
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", now() if began is None else began
        self._first: tuple[int, float] | None = None  # step and time when the updates of this process began
        self._lap = (0, 0.0, 0.0)  # at the last lap: step, seconds in steps, seconds of them without data

    def add(self, spent: Mapping[str, float]) -> None:
        """Adds what the run had spent before."""
        for kind, seconds in spent.items():
            self._spent[kind] += seconds

    def repeat(self, lost: Sequence[Row]) -> None:
        """Adds what went into rows after the checkpoint that the run resumes from: all that is done again."""
        totals = [sum(row.get(f"seconds_{kind}") or 0.0 for kind in KINDS) for row in lost]
        earlier = sum(self._spent.values())
        self._spent["repeated"] += max([0.0, *(total - earlier for total in totals)])

    def start(self, step: int) -> None:
        """The updates begin."""
        self._turn("step")
        self._first = (step, self._now())
        self._lap = (step, *self._trained())

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Time inside counts as `kind`."""
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    @contextlib.contextmanager
    def waiting(self, is_busy: Callable[[], bool]) -> Iterator[None]:
        """Time inside is waiting for data, unless the devices are still busy in the end."""
        began = self._now()
        yield
        waited = self._now() - began
        if not is_busy():
            self._spent["data"] += waited
            self._since += waited

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by kind."""
        self._turn(self._kind)
        return dict(self._spent)

    def lap(self, step: int) -> Row:
        """Columns of a row: the pace since the last lap, None if no step was timed, and where time went."""
        spent = self.spent
        last_step, last_seconds, last_data = self._lap
        self._lap = (step, *self._trained())
        seconds, data = self._lap[1] - last_seconds, self._lap[2] - last_data
        is_timed = self._first is not None and step > last_step and seconds > 0
        pace = (step - last_step) * self._tokens_per_step / seconds if is_timed else None
        columns: Row = {"tokens_per_second": pace, "data_wait": data / seconds if is_timed else None}
        if self._peak is not None:
            columns["model_flops_use"] = None if pace is None else pace / self._peak
        columns["goodput"] = goodput(spent)
        return columns | {f"seconds_{kind}": seconds for kind, seconds in spent.items()}

    def left(self, step: int, steps: int) -> float | None:
        """Seconds until `steps` at the pace so far, evaluation and saving included; None at first."""
        if self._first is None or step == self._first[0]:
            return None
        return (steps - step) * (self._now() - self._first[1]) / (step - self._first[0])

    def _turn(self, kind: str) -> str:
        """Counts for `kind` from now on; returns what it counted for."""
        now, before = self._now(), self._kind
        self._spent[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    def _trained(self) -> tuple[float, float]:
        return self._spent["step"] + self._spent["data"], self._spent["data"]


def goodput(spent: Mapping[str, float]) -> float:
    """The share of the wall time that went into steps."""
    total = sum(spent.values())
    return spent["step"] / total if total else 0.0


def spent_line(spent: Mapping[str, float]) -> str:
    """`2:36 min in all, 91 % in steps (goodput); compile 5 %, evaluate 3 %`."""
    total = sum(spent.values())
    rest = sorted(((s, kind) for kind, s in spent.items() if kind != "step"), reverse=True)
    parts = [f"{kind} {seconds / total:.0%}" for seconds, kind in rest if seconds >= total / 200]
    head = f"{duration(total)} in all, {goodput(spent):.0%} in steps (goodput)"
    return "; ".join([head, ", ".join(parts)] if parts else [head]).replace("%", " %")


class Console:
    """The terminal: messages, and below them one live line that is rewritten in place.

    Where the stream is not a terminal, or has no escape codes (TERM=dumb), lines are simply printed. A
    context manager: leaving it ends the live line. `silent` prints nothing. Safe to use from several threads.
    What the stream does not take is dropped, and raises nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False):
        self._stream = words.guarded(sys.stdout if stream is None else stream, patience=None)
        self._silent = silent
        self._live = has_escape_codes(self._stream)
        self._line = self._shown = ""  # the line that stays, and what is shown in its place
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._shown:
                self._write(f"{CLEAR}{self._fit(self._line)}\n" if self._line else CLEAR)
            self._line = self._shown = ""

    def say(self, text: str) -> None:
        """Prints a message of one or more lines, above the live line."""
        with self._lock:
            self._write(f"{CLEAR if self._shown else ''}{text}\n{self._fit(self._line)}")
            self._shown = self._line

    def progress(self, line: str, *, brief: bool = False) -> None:
        """Shows where the run is. A `brief` line stands in its place, only live, until the next message."""
        with self._lock:
            if self._live:
                self._line, self._shown = (self._line if brief else line), line
                self._write(CLEAR + self._fit(line))
            elif not brief:
                self._write(f"{line}\n")

    def _fit(self, line: str) -> str:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            columns = 0
        # A full line would wrap, and could not be cleared.
        shown = line[: (columns or 80) - 1]
        return shown if shown == line else shown.rpartition(", ")[0] or shown

    def _write(self, text: str) -> None:
        if not self._silent:
            self._stream.write(text)
