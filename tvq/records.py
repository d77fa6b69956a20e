"""Where rows and samples of a run go: files, TensorBoard and, if asked for, Weights & Biases.

metrics.jsonl and samples/ are the record: the others repeat it, and one that fails is left out from then on.
Training goes on in any case, and says so once.
"""

import contextlib
import html
import importlib
import importlib.util
import io
import json
import math
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.record_writer import RecordWriter

from tvq import atomic, config
from tvq.data import optional
from tvq.errors import InputError
from tvq.metrics import Row

Say = Callable[[str], None]
Sample = str | bytes  # a text, or a picture as PNG
FILE, SAMPLES = "metrics.jsonl", "samples"
NEWLINE = b"\n"
# Columns whose curves stand apart from the others of their split, by how their names begin.
GROUPS = {"c_": "_codebook", "relative_err": "_codebook", "vec_": "_codebook", "seconds_": "_time"}


def tag(split: str, name: str) -> str:
    """The name of a curve, SPLIT/NAME or SPLIT_GROUP/NAME: groups are shown in alphabetical order."""
    group = next((group for start, group in GROUPS.items() if name.startswith(start)), "")
    return f"{split}{group}/{name}"


class Writer:
    """What a writer has no use for it leaves out."""

    def write(self, row: Row) -> None:
        """Takes a row."""

    def show(self, step: int, sample: Sample) -> None:
        """Takes what the model of a step drew."""

    def close(self) -> None:
        """Nothing follows."""


class Records(Writer):
    """All writers of a run, on the main process.

    `dropped` are the rows after `resume_step`, which the run does again. `done` are the splits that have a
    row of that step, and SAMPLES where it has a sample.
    """

    def __init__(self, c: config.Config, workdir: epath.Path, resume_step: int, local: Path, say: Say):
        """`local` is a folder for what cannot be written to a bucket."""
        self._say = say
        rows = JsonlWriter(workdir / FILE, resume_step, say)
        self.dropped = rows.dropped
        self.done = rows.splits | ({SAMPLES} if resume_step in samples(workdir / SAMPLES) else set())
        self._writers: dict[str, Writer] = {FILE: rows}
        self._add(SAMPLES, lambda: SampleWriter(workdir / SAMPLES, resume_step))
        self._add("TensorBoard", lambda: TensorBoardWriter(local / "tensorboard", resume_step))
        if c.log.wandb:
            self._add("Weights & Biases", lambda: WandbWriter(c, workdir, local))

    def write(self, row: Row) -> None:
        """A row, at once, to every writer."""
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
            self._say(f"{name} cannot be written ({error}); training goes on without, {FILE} has all numbers")


class JsonlWriter(Writer):
    """Appends rows to a file, one JSON object a line, at once. NaN and infinity are written as null.

    A run that goes on from the checkpoint of `resume_step` first drops the rows after it, and a last line
    that a kill tore, so that no row is there twice; `dropped` are those rows, `splits` the splits that have
    one of `resume_step`. For none to be missing either, write the rows of a step before its checkpoint is
    saved. InputError if another line is not a row.

    What does not fit on a full disk waits in memory until it does.
    """

    def __init__(self, path: epath.PathLike, resume_step: int, say: Say = print):
        self._path, self._say = epath.Path(path), say
        kept, self.dropped = _drop_after(self._path, resume_step) if self._path.exists() else ([], [])
        self.splits = {row.get("split") for row in kept if row["step"] == resume_step}
        self._file: Any = self._path.open("ab")
        # Past the buffer of a local file: after an error it is known how much of it was written.
        self._raw = getattr(self._file, "raw", self._file)
        self._waiting = b""
        self._has_failed = False

    def write(self, row: Row) -> None:
        finite = {name: None if _is_not_finite(value) else value for name, value in row.items()}
        self._waiting += json.dumps(finite, allow_nan=False).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._raw.write(self._waiting) :]
            self._file.flush()
        except OSError as error:
            if not self._has_failed:
                self._say(
                    f"{self._path} cannot be written ({error.strerror}): make room; training goes on, and the"
                    " rows are kept in memory until then"
                )
            self._has_failed = True

    def close(self) -> None:
        if self._waiting:
            self._say(f"{self._path}: {self._waiting.count(NEWLINE)} rows were never written and are lost")
        self._file.close()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _drop_after(path: epath.Path, last_step: int) -> tuple[list[Row], list[Row]]:
    """Rewrites the file of rows without those of later steps, in one commit; returns (kept, dropped)."""
    content = path.read_bytes()
    # What follows the last newline is empty, or torn.
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
    """A file a sample, `folder/step_STEP.txt` or `.png`. Those after `resume_step`, drawn again, go."""

    def __init__(self, folder: epath.Path, resume_step: int):
        self._folder = folder
        for step, path in samples(folder).items():
            if step > resume_step:
                path.unlink()

    def show(self, step: int, sample: Sample) -> None:
        content, suffix = (sample.encode(), "txt") if isinstance(sample, str) else (sample, "png")
        atomic.write(self._folder / f"step_{step}.{suffix}", content)


def samples(folder: epath.Path) -> dict[int, epath.Path]:
    """The file of each step that has one, in order; none where there is no folder."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    named = [(re.fullmatch(r"step_(\d+)\.(txt|png)", path.name), path) for path in paths]
    return dict(sorted((int(found[1]), path) for found, path in named if found))


class TensorBoardWriter(Writer):
    """Appends to `folder/events.out.tfevents.*`, a file of its own for each start.

    TensorBoard forgets what earlier starts wrote after `resume_step`. OSError: it cannot be written.
    """

    def __init__(self, folder: Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"))
        self._add(file_version="brain.Event:2")
        self._add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Row) -> None:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        values = [
            Summary.Value(tag=tag(row["split"], name), simple_value=value)
            for name, value in numbers.items()
            if name != "step"
        ]
        self._add(step=row["step"], summary=Summary(value=values))

    def show(self, step: int, sample: Sample) -> None:
        if isinstance(sample, str):
            as_is = "\n".join(f"    {line}" for line in sample.split("\n"))  # or it is read as Markdown
            kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
            text = TensorProto(dtype="DT_STRING", string_val=[as_is.encode()])
            value = Summary.Value(tag="sample", metadata=kind, tensor=text)
        else:
            width, height = struct.unpack(">II", sample[16:24])
            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=sample)
            value = Summary.Value(tag="sample", image=image)
        self._add(step=step, summary=Summary(value=[value]))

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        try:
            self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise


class WandbWriter(Writer):
    """Sends to one Weights & Biases run, whose id is kept in the workdir. OSError: it cannot be reached.

    What a resumed run repeats, bitwise, is there already and is not sent again.
    """

    def __init__(self, c: config.Config, workdir: epath.Path, local: Path):
        self._wandb = importlib.import_module("wandb")
        path = workdir / "wandb_id"
        if not path.exists():
            atomic.write(path, secrets.token_hex(4))
        with self._as_os_error():
            self._run = self._wandb.init(
                project=c.log.wandb,
                id=path.read_text(),
                resume="allow",
                name=workdir.name,
                dir=str(local),
                config=config.flatten(c),
            )

    def write(self, row: Row) -> None:
        step, split = row["step"], row["split"]
        self._log(step, {tag(split, k): v for k, v in row.items() if k not in ("step", "split")})

    def show(self, step: int, sample: Sample) -> None:
        if isinstance(sample, str):
            # In ASCII: the page is shown without a word on its encoding.
            text = html.escape(sample).encode("ascii", "xmlcharrefreplace").decode()
            shown = self._wandb.Html(f"<pre>{text}</pre>")
        else:
            shown = self._wandb.Image(optional.load("PIL.Image").open(io.BytesIO(sample)))
        self._log(step, {"sample": shown})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:
            with self._as_os_error():
                self._run.log(values, step=step)

    def close(self) -> None:
        with self._as_os_error():
            self._run.finish()

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except self._wandb.errors.Error as error:
            raise OSError(str(error)) from error


def check(c: config.Log) -> None:
    """InputError if a writer that the config asks for is not installed."""
    if c.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("config.log.wandb needs Weights & Biases: pip install 'tvq[wandb]'")
