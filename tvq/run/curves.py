"""Rows and samples as curves elsewhere: TensorBoard's files, and Weights & Biases."""

import contextlib
import html
import importlib
import io
import json
import math
import os
import re
import secrets
import socket
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

from tvq import atomic
from tvq.config import flatten
from tvq.data import optional
from tvq.run.metrics import Row
from tvq.schema import Config

Sample = str | bytes  # a text, or a picture as PNG
WANDB_ID, WANDB_PLACE = "wandb_id", "wandb_place.json"  # the id of the run, and where the workdir was then
SAME_LOSS = 1e-3  # relative: what rounding makes of a loss that is computed again
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


class TensorBoardWriter(Writer):
    """Appends to `folder/events.out.tfevents.*`, a file of its own for each start.

    TensorBoard forgets what earlier starts wrote after `resume_step`. It reads the files in the order of the
    times in their names: these continue those of earlier starts, though the clock was set back meanwhile.
    OSError: it cannot be written.
    """

    def __init__(self, folder: Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._time = max([0.0, *(_last_time(path) + 1e-3 for path in folder.iterdir())])
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{self._now():017.6f}.{os.getpid()}"))
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
            self._file.write(Event(wall_time=self._now(), **fields).SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise

    def _now(self) -> float:
        """The clock, or where that was set back, the latest time that was written."""
        self._time = max(self._time, time.time())
        return self._time


def _last_time(path: Path) -> float:
    """When the last event of a file was written, by its name and its time of change; 0 for other files."""
    named = re.fullmatch(r"events\.out\.tfevents\.(\d+(?:\.\d+)?)(\..*)?", path.name)
    return max(float(named[1]), path.stat().st_mtime) if named else 0.0


class WandbWriter(Writer):
    """Sends to a run of Weights & Biases, whose id is kept in the workdir. OSError: it cannot be reached.

    What a resumed run repeats is there already and is not sent again. Nothing that was sent can be taken
    back: where the rows become others than were sent, as after a return to an older checkpoint with another
    learning rate, and where the workdir is a copy of another run's, a new run gets all rows of metrics.jsonl.
    """

    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        resume_step: int,
        dropped: list[Row],
        rows: Callable[[], list[Row]],
        local: Path,
        say: Callable[[str], None],
    ):
        self._wandb = importlib.import_module("wandb")
        self._config, self._workdir, self._rows = config, workdir, rows
        self._local, self._say = local, say
        self._resume_step = resume_step
        self._sent = {(row["step"], row["split"]): row for row in dropped}  # and not to be dropped there
        is_new, is_copy = not (workdir / WANDB_ID).exists(), _is_copy(workdir)
        if is_new or is_copy:
            self._new_id()
        self._write_place()
        self._open()
        last = max([resume_step, *(row["step"] for row in dropped)])
        if is_copy:
            self._send_all("this workdir is a copy of another run's")
        elif last > config.train.steps or self._n_had > last + 1:
            self._start_anew("it has rows that this run will not repeat")

    def write(self, row: Row) -> None:
        step, key = row["step"], (row["step"], row["split"])
        if step >= self._n_had:
            self._log(step, _curves(row))
        elif key in self._sent and _repeats(row, self._sent[key]):
            return
        elif key not in self._sent and step == self._resume_step:  # the stop at that step left it out
            self._log(self._run.step, _curves(row))
        else:
            self._start_anew(f"the rows from step {step:,} on differ from those sent")

    def _open(self) -> None:
        with self._as_os_error():
            self._run = self._wandb.init(
                project=self._config.log.wandb,
                id=(self._workdir / WANDB_ID).read_text(),
                resume="allow",
                name=self._workdir.name,
                dir=str(self._local),
                config=flatten(self._config),
            )
            self._n_had = self._run.step  # the first step that it has no row of

    def _new_id(self) -> None:
        atomic.write(self._workdir / WANDB_ID, secrets.token_hex(4))

    def _start_anew(self, why: str) -> None:
        self.close()
        self._new_id()
        self._open()
        self._send_all(why)

    def _send_all(self, why: str) -> None:
        self._say(
            f"Weights & Biases: {why}; all rows are in a new run, {(self._workdir / WANDB_ID).read_text()}"
        )
        for row in self._rows():
            self._log(row["step"], _curves(row))
        self._n_had, self._sent = 0, {}

    def _write_place(self) -> None:
        atomic.write(self._workdir / WANDB_PLACE, json.dumps(_place(self._workdir)) + "\n")

    def show(self, step: int, sample: Sample) -> None:
        if isinstance(sample, str):
            # In ASCII: the page is shown without a word on its encoding.
            text = html.escape(sample).encode("ascii", "xmlcharrefreplace").decode()
            shown = self._wandb.Html(f"<pre>{text}</pre>")
        else:
            shown = self._wandb.Image(optional.load("PIL.Image").open(io.BytesIO(sample)))
        if step >= self._n_had:
            self._log(step, {"sample": shown})

    def _log(self, step: int, values: dict[str, Any]) -> None:
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


def _curves(row: Row) -> dict[str, Any]:
    return {tag(row["split"], k): v for k, v in row.items() if k not in ("step", "split")}


def _repeats(row: Row, sent: Row) -> bool:
    """Whether a row is that which was sent, but for rounding: on another mesh, or on a GPU."""
    now, before = row.get("loss"), sent.get("loss")
    if now is None or before is None or not math.isfinite(now):
        return before is None and (now is None or not math.isfinite(now))
    return math.isclose(now, before, rel_tol=SAME_LOSS)


def _place(workdir: epath.Path) -> dict[str, Any]:
    """What a copy of a workdir has otherwise, and a renamed one, or one seen from another host, has not."""
    if "://" in str(workdir):
        return {"host": "", "path": str(workdir), "inode": 0}
    real = os.path.realpath(workdir)
    return {"host": socket.gethostname(), "path": real, "inode": os.stat(real).st_ino}


def _is_copy(workdir: epath.Path) -> bool:
    path, now = workdir / WANDB_PLACE, _place(workdir)
    if not path.exists():  # a run of an older version, or a new one
        return False
    before = json.loads(path.read_text())
    is_there = (before["host"], before["path"]) == (now["host"], now["path"])
    return not is_there and (before["inode"] != now["inode"] or not now["inode"])
