"""Where rows and samples of a run go: files, TensorBoard and, if asked for, Weights & Biases.

metrics.jsonl and samples/ are the record; the others repeat it, and one that fails is dropped from then on.
Training continues in any case, and says so once.
"""

import contextlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from tvq import atomic
from tvq.errors import InputError
from tvq.run.curves import Sample, TensorBoardWriter, WandbWriter, Writer, tag
from tvq.run.metrics import Row
from tvq.schema import Config, Log

__all__ = ["JsonlWriter", "Records", "Sample", "SampleWriter", "check", "samples", "tag", "to_json"]

Say = Callable[[str], None]
FILE, SAMPLES = "metrics.jsonl", "samples"
BEFORE = "before.jsonl"  # the rows of the runs that a branch continues, up to where it starts
NEWLINE = b"\n"


class Records(Writer):
    """All writers of a run, on the main process.

    `dropped` are the rows after `resume_step`, which the run repeats. `done` are the splits that have a
    row of that step, and SAMPLES if it has a sample.
    """

    def __init__(self, config: Config, workdir: epath.Path, resume_step: int, local: Path, say: Say):
        """`local` is a folder for files that cannot be written to a bucket."""
        self._say = say
        rows = JsonlWriter(workdir / FILE, resume_step, say)
        self.dropped = rows.dropped
        self.done = rows.splits | ({SAMPLES} if resume_step in samples(workdir / SAMPLES) else set())
        self._writers: dict[str, Writer] = {FILE: rows}
        self._add(SAMPLES, lambda: SampleWriter(workdir / SAMPLES, resume_step))
        self._add("TensorBoard", lambda: TensorBoardWriter(local / "tensorboard", resume_step))
        if config.log.wandb:
            self._add(
                "Weights & Biases",
                lambda: WandbWriter(config, workdir, resume_step, rows.dropped, rows.read, local, say),
            )

    def write(self, row: Row) -> None:
        """Writes a row to every writer immediately."""
        for name in list(self._writers):
            with self._or_without(name):
                self._writers[name].write(row)

    def show(self, step: int, sample: Sample) -> None:
        for name in list(self._writers):
            with self._or_without(name):
                self._writers[name].show(step, sample)

    def close(self) -> None:
        for name in list(self._writers):
            with self._or_without(name):
                self._writers[name].close()

    def _add(self, name: str, make: Callable[[], Writer]) -> None:
        with self._or_without(name):
            self._writers[name] = make()

    @contextlib.contextmanager
    def _or_without(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writers.pop(name, None)
            self._say(
                f"{name} cannot be written ({error}); training continues without it; {FILE} has all numbers"
            )


class JsonlWriter(Writer):
    """Appends rows to a file immediately, one JSON object per line. NaN and infinity are written as null.

    A run that resumes from the checkpoint of `resume_step` first drops the rows after it, and a last line
    that a kill cut short, so that no row is there twice; `dropped` are those rows, `splits` the splits that
    have one of `resume_step`. For no row to be missing, write the rows of a step before its checkpoint is
    saved. InputError if another line is not a row.

    Rows that do not fit on a full disk wait in memory until they do.
    """

    def __init__(self, path: epath.PathLike, resume_step: int, say: Say = print):
        self._path, self._say = epath.Path(path), say
        kept, self.dropped = _drop_after(self._path, resume_step) if self._path.exists() else ([], [])
        self.splits = {row.get("split") for row in kept if row["step"] == resume_step}
        self._file: Any = self._path.open("ab")
        # Bypasses the buffer of a local file: after an error it is known how much was written.
        self._raw = getattr(self._file, "raw", self._file)
        self._waiting = b""
        self._has_failed = False

    def write(self, row: Row) -> None:
        self._waiting += to_json(row).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._raw.write(self._waiting) :]
            self._file.flush()
        except OSError as error:
            if not self._has_failed:
                self._say(
                    f"{self._path} cannot be written ({error.strerror}): make room; training continues, and"
                    " the rows are kept in memory until then"
                )
            self._has_failed = True

    def read(self) -> list[Row]:
        """The rows that are written."""
        lines = self._path.read_bytes().split(NEWLINE)[:-1] if self._path.exists() else []
        return [_row(self._path, i + 1, line) for i, line in enumerate(lines)]

    def close(self) -> None:
        if self._waiting:
            self._say(f"{self._path}: {self._waiting.count(NEWLINE)} rows were never written and are lost")
        self._file.close()


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain values, valid for every reader: NaN and infinity are null."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: epath.Path, last_step: int) -> tuple[list[Row], list[Row]]:
    """Rewrites the file of rows without those of later steps, in one commit; returns (kept, dropped)."""
    content = path.read_bytes()
    # What follows the last newline is empty, or cut short.
    lines = content.split(b"\n")[:-1]
    rows = [_row(path, i + 1, line) for i, line in enumerate(lines)]
    kept, dropped = [], []
    for row in rows:
        (kept if row["step"] <= last_step else dropped).append(row)
    whole = b"".join(line + b"\n" for line, row in zip(lines, rows, strict=True) if row["step"] <= last_step)
    if whole != content:
        atomic.write(path, whole)
    return kept, dropped


def _row(path: epath.Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
        return row | {"step": int(row["step"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"line {number} of {path} is not a row of metrics: {line[:60]!r};"
            " remove the line, or move the file away"
        ) from None


class SampleWriter(Writer):
    """One file per sample, `folder/step_STEP.txt` or `.png`. Those after `resume_step` are removed."""

    def __init__(self, folder: epath.Path, resume_step: int):
        self._folder = folder
        for step, path in samples(folder).items():
            if step > resume_step:
                path.unlink()

    def show(self, step: int, sample: Sample) -> None:
        content, suffix = (sample.encode(), "txt") if isinstance(sample, str) else (sample, "png")
        atomic.write(self._folder / f"step_{step}.{suffix}", content)


def samples(folder: epath.Path) -> dict[int, epath.Path]:
    """The file of each step that has one, in order; none without a folder."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    named = [(re.fullmatch(r"step_(\d+)\.(txt|png)", path.name), path) for path in paths]
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def check(log: Log) -> None:
    """InputError if a writer that the config asks for is not installed."""
    if log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("config.log.wandb needs Weights & Biases: pip install 'tvq[wandb]'")
