"""Rows on disk, on a full disk, in TensorBoard's files and at Weights & Biases."""

import contextlib
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from tvq import schema
from tvq.run import image_samples
from tvq.run.records import SAMPLES, JsonlWriter, Records, check, samples, tag


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, resume_step: int, *steps: int) -> None:
    writer = JsonlWriter(path, resume_step)
    for step in steps:
        writer.write({"step": step, "split": "train", "loss": step / 2})
    writer.close()


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write({"step": 1, "loss": 0.5})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    writer.close()


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1e300})
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "step": 1, "a": None, "b": None, "c": None, "d": None, "e": 1e300,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("resume_step", "stay"), [(0, []), (1, [1]), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3])]
)
def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path, resume_step: int, stay: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2, 2, 3)
    write(path, resume_step, 10)
    assert [r["step"] for r in rows(path)] == [*stay, 10]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ["{", '{"step": 3, "los', '{"step": 3}', "\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    with path.open("a") as file:
        file.write(torn)
    write(path, 5, 6)
    assert [r["step"] for r in rows(path)] == [1, 2, 6]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", "{}", "7", "", "\x00", '{"step": "x"}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n' + bad + '\n{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not a row"):
        JsonlWriter(path, 5)
    assert path.read_text() == text


def test_the_splits_of_the_checkpoint_are_known(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, split in ((2, "train"), (4, "train"), (4, "validation"), (6, "test")):
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split}) + "\n")
    writer = JsonlWriter(path, 4)
    writer.close()
    assert writer.splits == {"train", "validation"}
    assert writer.dropped == [{"step": 6, "split": "test"}]


def test_a_file_without_later_rows_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    before = path.stat().st_ino
    write(path, 2, 3)
    assert path.stat().st_ino == before


WRITER = """
import sys
from tvq.run.records import JsonlWriter
writer = JsonlWriter(sys.argv[1], 100)
for step in range(1, 1000):  # 100 MB, should nobody come to kill it
    writer.write({"step": step, "split": "train", "text": "x" * 100_000})
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path])
    while not path.exists() or path.stat().st_size < 3_000_000:
        assert writer.poll() in (None, 0)
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    n_whole = path.read_text().count("\n")
    assert n_whole > 20
    write(path, 20, 21)
    assert [r["step"] for r in rows(path)] == list(range(1, 22))


@contextlib.contextmanager
def full_disk(n_byte: int) -> Iterator[None]:
    """No file may become larger: to a program this looks as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_byte, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    writer = JsonlWriter(path, 0, said.append)
    writer.write({"step": 1})
    with full_disk(path.stat().st_size + 4):
        for step in (2, 3):
            writer.write({"step": step})
        assert path.read_text() == '{"step": 1}\n{"st', "the second row is torn"
    assert said == [
        f"{path} cannot be written (File too large): make room; training continues, and the rows are kept in"
        " memory until then"
    ]
    writer.write({"step": 4})
    writer.close()
    assert [r["step"] for r in rows(path)] == [1, 2, 3, 4]
    assert len(said) == 1


def test_rows_that_never_got_room_are_told(tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    writer = JsonlWriter(path, 0, said.append)
    with full_disk(4):
        writer.write({"step": 1})
        writer.write({"step": 2})
        writer.close()
    assert said[1:] == [f"{path}: 2 rows were never written and are lost"]
    write(path, 9, 3)
    assert [r["step"] for r in rows(path)] == [3], "the torn row is gone"


def events(folder: Path) -> list[Event]:
    """Of all files, in the order in which they were begun."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def records(tmp_path: Path, resume_step: int, said: list[str], **log: str) -> Records:
    c = schema.Config(log=schema.Log(**log))
    return Records(c, epath.Path(tmp_path), resume_step, tmp_path, said.append)


def test_tensorboard_has_each_row_once(tmp_path: Path) -> None:
    for resume_step in (0, 2):  # killed after step 4, and resumed
        made = records(tmp_path, resume_step, [])
        for step in range(resume_step + 2, 6, 2):
            made.write({"step": step, "split": "train", "loss": step / 2, "grad_norm": None})
        made.close()
    assert [row["step"] for row in made.dropped] == [4]
    found = events(tmp_path / "tensorboard")
    curve: dict[int, float] = {}
    for event in found:
        if event.HasField("session_log"):  # TensorBoard forgets what it had from there on
            curve = {step: loss for step, loss in curve.items() if step < event.step}
        for value in event.summary.value:
            assert event.step not in curve
            curve[event.step] = value.simple_value
            assert value.tag == "train/loss"
    assert curve == {2: 1.0, 4: 2.0}
    assert found[0].file_version == "brain.Event:2"


def test_tensorboard_reads_resumed_rows_last_though_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [2_000_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for resume_step in (0, 2):
        made = records(tmp_path, resume_step, [])
        for step in (1, 2):
            made.write({"step": resume_step + step, "split": "train", "loss": 1.0})
            now[0] += 60 if resume_step == 0 else -60
        made.close()
        for path in (tmp_path / "tensorboard").iterdir():
            os.utime(path, (now[0], now[0]))
        now[0] -= 3600
    found = events(tmp_path / "tensorboard")
    assert [event.step for event in found] == [0, 1, 1, 2, 0, 3, 3, 4]
    times = [event.wall_time for event in found]
    assert times == sorted(times)


def test_curves_are_in_groups() -> None:
    names = ("loss", "c_dead", "vec_norm_mean", "seconds_step")
    assert [tag("train", name) for name in names] == [
        "train/loss", "train_codebook/c_dead", "train_codebook/vec_norm_mean", "train_time/seconds_step",
    ]  # fmt: skip


def png(width: int, height: int) -> bytes:
    return image_samples.png(np.zeros((height, width, 3), np.uint8))


def test_samples_are_files_and_in_tensorboard(tmp_path: Path) -> None:
    made = records(tmp_path, 0, [])
    assert made.done == set()
    made.show(2, "import x\n# é\n")
    made.show(4, png(5, 3))
    made.show(6, "lost")
    made.close()
    folder = epath.Path(tmp_path) / "samples"
    assert samples(folder)[2].read_text() == "import x\n# é\n"
    assert samples(folder)[4].read_bytes() == png(5, 3)
    text, image, _ = (event.summary.value[0] for event in events(tmp_path / "tensorboard")[2:])
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val[0].decode() == "    import x\n    # é\n    ", "not Markdown"
    assert (image.image.width, image.image.height) == (5, 3)
    assert image.image.encoded_image_string == png(5, 3)
    (folder / "step_5.txt.tmp").write_bytes(b"torn")
    (folder / "step_8").mkdir()  # of tvq sample
    resumed = records(tmp_path, 4, [])
    resumed.close()
    assert resumed.done == {SAMPLES}
    assert list(samples(folder)) == [2, 4]


def test_training_goes_on_without_samples(tmp_path: Path) -> None:
    (tmp_path / SAMPLES).write_text("in the way")
    said: list[str] = []
    made = records(tmp_path, 0, said)
    for step in (1, 2):
        made.show(step, "text")
    made.close()
    (message,) = said
    assert message.startswith("samples cannot be written ([Errno 17] File exists: ")
    assert len(events(tmp_path / "tensorboard")) == 4


def test_training_goes_on_without_tensorboard(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    made = records(tmp_path, 0, said)
    for step in (1, 2):
        made.write({"step": step, "split": "train"})
    made.close()
    assert len(said) == 1
    assert said[0].startswith("TensorBoard cannot be written ([Errno 17] File exists: ")
    assert said[0].endswith("training continues without it; metrics.jsonl has all numbers")
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_disk_that_fills_up_ends_tensorboard_alone(tmp_path: Path) -> None:
    said: list[str] = []
    made = records(tmp_path, 0, said)
    with full_disk(100):
        for step in range(1, 9):
            made.write({"step": step, "split": "train", "loss": 1.0})
    made.write({"step": 9, "split": "train", "loss": 1.0})
    made.close()
    assert [text.partition(" cannot")[0] for text in said] == ["TensorBoard", str(tmp_path / "metrics.jsonl")]
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == list(range(1, 10))


class Wandb(types.ModuleType):
    """Stands for Weights & Biases: one run, of which it remembers the rows."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.asked: dict[str, Any] = {}
        self.rows: dict[int, dict[str, float]] = {}
        self.step, self.is_there = 0, True

    def init(self, **asked: Any) -> "Wandb":
        if not self.is_there:
            raise self.errors.Error("no answer")
        self.asked, self.step = asked, max(self.rows, default=-1) + 1
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if not self.is_there:
            raise self.errors.Error("no answer")
        assert step >= self.step
        self.step = step
        self.rows.setdefault(step, {}).update(numbers)

    def finish(self) -> None: ...


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_continues_one_run(tmp_path: Path, wandb: Wandb) -> None:
    said: list[str] = []
    ids = []
    for resume_step in (0, 2):
        made = records(tmp_path, resume_step, said, wandb="tvq")
        ids.append(wandb.asked["id"])
        for step in range(resume_step + 2, 8, 2):
            made.write({"step": step, "split": "train", "loss": step / 2})
        made.write({"step": 6, "split": "validation", "loss": 1.0})
        made.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
    assert wandb.asked["project"] == "tvq"
    assert wandb.asked["config"]["train.seed"] == 0
    assert wandb.rows == {
        2: {"train/loss": 1.0}, 4: {"train/loss": 2.0}, 6: {"train/loss": 3.0, "validation/loss": 1.0},
    }  # fmt: skip
    assert said == []


class Service(Wandb):
    """The same with several runs, which take nothing back: `runs` has the rows of each, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, dict[int, dict[str, float]]] = {}

    def init(self, **asked: Any) -> "Wandb":
        self.rows = self.runs.setdefault(asked["id"], {})
        return super().init(**asked)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    fake = Service()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def train(folder: Path, resume_step: int, losses: dict[int, float], steps: int = 9) -> list[str]:
    """A start that writes these rows; returns what was said."""
    said: list[str] = []
    c = schema.Config(log=schema.Log(wandb="tvq"), train=schema.Train(steps=steps))
    made = Records(c, epath.Path(folder), resume_step, folder, said.append)
    for step, loss in losses.items():
        made.write({"step": step, "split": "train", "loss": loss})
    made.close()
    return said


def shown(service: Service, folder: Path) -> dict[int, float]:
    """The curve of the workdir's run at the service."""
    found = service.runs[(folder / "wandb_id").read_text()]
    return {step: numbers["train/loss"] for step, numbers in found.items()}


def test_a_branch_is_a_new_run_at_wandb(tmp_path: Path, service: Service) -> None:
    assert train(tmp_path, 0, {2: 5.0, 4: 4.0, 6: 3.0}) == []
    (first,) = service.runs
    (said,) = train(tmp_path, 2, {4: 4.0001, 6: 2.0, 8: 1.0})  # rounding, then another learning rate
    assert said.startswith(
        "Weights & Biases: the rows from step 6 on differ from those sent; all rows are in"
    )
    assert shown(service, tmp_path) == {2: 5.0, 4: 4.0001, 6: 2.0, 8: 1.0}
    assert {step: row["train/loss"] for step, row in service.runs[first].items()} == {2: 5.0, 4: 4.0, 6: 3.0}
    assert train(tmp_path, 8, {9: 0.5}) == []
    assert shown(service, tmp_path) == {2: 5.0, 4: 4.0001, 6: 2.0, 8: 1.0, 9: 0.5}


def test_rows_that_will_not_be_repeated_are_not_kept_at_wandb(tmp_path: Path, service: Service) -> None:
    train(tmp_path, 0, {2: 5.0, 4: 4.0, 6: 3.0})
    assert len(train(tmp_path, 2, {4: 4.0}, steps=4)) == 1
    assert shown(service, tmp_path) == {2: 5.0, 4: 4.0}
    train(tmp_path, 4, {6: 3.0})
    train(tmp_path, 2, {})  # stopped at once: its rows of 4 and 6 are dropped, unknown to the next start
    assert len(train(tmp_path, 2, {4: 1.0})) == 1
    assert shown(service, tmp_path) == {2: 5.0, 4: 1.0}


def test_a_copied_workdir_is_a_new_run_at_wandb(tmp_path: Path, service: Service) -> None:
    first, copy, moved = tmp_path / "first", tmp_path / "copy", tmp_path / "moved"
    first.mkdir()
    train(first, 0, {2: 5.0, 4: 4.0})
    shutil.copytree(first, copy)
    (said,) = train(copy, 4, {6: 1.0})
    assert "this workdir is a copy of another run's" in said
    assert train(copy, 6, {8: 0.5}) == []
    assert shown(service, first) == {2: 5.0, 4: 4.0}
    assert shown(service, copy) == {2: 5.0, 4: 4.0, 6: 1.0, 8: 0.5}
    first.rename(moved)
    assert train(moved, 4, {6: 3.0}) == []
    assert shown(service, moved) == {2: 5.0, 4: 4.0, 6: 3.0}
    assert len(service.runs) == 2


@pytest.mark.parametrize("is_there", [True, False])
def test_training_goes_on_without_wandb(tmp_path: Path, wandb: Wandb, is_there: bool) -> None:
    said: list[str] = []
    wandb.is_there = is_there
    made = records(tmp_path, 0, said, wandb="tvq")
    wandb.is_there = False
    for step in (1, 2):
        made.write({"step": step, "split": "train", "loss": 1.0})
    made.close()
    (message,) = said
    assert message.startswith(
        "Weights & Biases cannot be written (no answer); training continues without it; "
    )


def test_samples_are_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    said: list[str] = []
    made = records(tmp_path, 0, said, wandb="tvq")
    for step, sample in ((2, "if x < y:\n    é"), (4, png(5, 3))):
        made.write({"step": step, "split": "train", "loss": 1.0})
        made.show(step, sample)
    made.close()
    text, image = sorted(tmp_path.glob("wandb/offline-run-*/files/media/*/*"))
    assert text.name.startswith("sample_2_")
    assert text.read_text().endswith("<pre>if x &lt; y:\n    &#233;</pre>")
    assert image.name.startswith("sample_4_")
    assert image.read_bytes() == png(5, 3)
    assert said == []


def test_wandb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check(schema.Log())
    with pytest.raises(ValueError, match=r"config.log.wandb needs .*: pip install 'tvq\[wandb\]'"):
        check(schema.Log(wandb="tvq"))
