"""A run that is killed or stopped, and started again by the same command, ends as if nothing had happened."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Here
from tests.end_to_end.program import Program, assert_same_run, end, newest, rows, tree
from tests.fakes.forks import Fork
from tvq.run import metrics, records

pytestmark = pytest.mark.slow
COMMITTED = ("6", "12", "18", "20")


@contextlib.contextmanager
def held(tvq: Program, point: str, workdir: Path, *more: str) -> Iterator[subprocess.Popen[str] | Fork]:
    """The run in `workdir`, once it stands at `point`."""
    command = (point, "train", *tvq.options(workdir, *more))
    has_workers = any(option.startswith("--config.data.workers") for option in more)
    with tvq.start(*command, module="tests.end_to_end.held", is_fork=not has_workers) as process:
        assert process.stdout is not None
        assert "held\n" in process.stdout, f"it ended without passing {point}: {process.communicate()}"
        yield process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 250
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def checkpoints(workdir: Path) -> list[str]:
    folder = workdir / "checkpoints"
    return sorted(path.name for path in folder.iterdir() if path.name in COMMITTED)


def kill(tvq: Program, point: str, committed: list[str], workdir: Path, *more: str) -> None:
    """Starts the run, kills it at `point`, when exactly these checkpoints are there."""
    with held(tvq, point, workdir, *more) as process:
        for name in committed:  # saving continues beside the run
            wait_for(workdir / "checkpoints" / name)
        os.killpg(process.pid, signal.SIGKILL)
        end(process, -signal.SIGKILL)
    assert checkpoints(workdir) == committed


@pytest.mark.parametrize(
    ("point", "committed", "goes_on"),
    [
        pytest.param("start", [], "a new run", id="before it is a run"),
        pytest.param("row:4", [], "a new run", id="before the first checkpoint"),
        pytest.param("row:10", ["6"], "resuming from step 6", id="between checkpoints"),
        pytest.param("save:12", ["6"], "resuming from step 6", id="during a save"),
    ],
)
def test_killed(
    tvq: Program, unbroken: Path, tmp_path: Path, point: str, committed: list[str], goes_on: str
) -> None:
    kill(tvq, point, committed, tmp_path)
    if point.startswith("save"):
        leftovers = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert any(name.startswith("12.") for name in leftovers), "the save was not under way"
    if point != "start":
        assert rows(tmp_path)[-1]["step"] >= int(point[-2:].strip(":")), "rows of the lost stretch are there"
    stdout, _ = tvq.train(tmp_path)
    assert goes_on in stdout
    assert_same_run(tmp_path, unbroken)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    assert (last["seconds_repeated"] > 0) == (point != "start"), "what was lost is time spent"


@pytest.mark.parametrize(
    ("number", "row", "saved"),
    [
        pytest.param(signal.SIGTERM, 10, 12, id="the update under way is finished"),
        pytest.param(signal.SIGINT, 8, 8, id="the evaluation under way is given up"),
        pytest.param(signal.SIGINT, 12, 12, id="and so is a sample"),
        pytest.param(signal.SIGTERM, 20, 20, id="and so are the last ones"),
    ],
)
def test_stopped(
    tvq: Program, unbroken: Path, tmp_path: Path, number: signal.Signals, row: int, saved: int
) -> None:
    with held(tvq, f"row:{row}", tmp_path) as process:
        os.killpg(process.pid, number)  # as Ctrl-C reaches all processes of the terminal
        stdout, stderr = end(process, 75)
    assert f"stopped and saved at step {saved}; the same command resumes the run" in stdout
    assert "Traceback" not in stderr
    assert newest(tmp_path).step == saved
    assert (rows(tmp_path)[-1]["step"], rows(tmp_path)[-1]["split"]) == (saved, "train")
    stdout, _ = tvq.train(tmp_path)
    assert f"resuming from step {saved}" in stdout
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_stopped_though_nobody_hears(tvq: Program, tmp_path: Path, number: signal.Signals) -> None:
    """`tvq train 2>&1 | tee log` and Ctrl-C, which ends tee first; a terminal that was closed."""
    with held(tvq, "row:4", tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        os.killpg(process.pid, number)
        assert process.wait(timeout=250) == 75
    assert newest(tmp_path).step == 6


Act = Callable[[Path], object]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Act], None]:
    """`meanwhile(workdir, act)`: somebody does something to it while the row of step 8 is written."""

    def at_step_8(workdir: Path, act: Act) -> None:
        write = records.JsonlWriter.write

        def write_and_act(self: records.JsonlWriter, row: metrics.Row) -> None:
            write(self, row)
            if (row["step"], row["split"]) == (8, "train"):
                act(workdir)

        monkeypatch.setattr(records.JsonlWriter, "write", write_and_act)

    return at_step_8


# TensorStore may answer when Orbax, whose save has failed by then, no longer listens.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_workdir_that_is_moved_under_a_run(
    tvq: Program, unbroken: Path, tmp_path: Path, meanwhile: Callable
) -> None:
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    meanwhile(workdir, lambda path: path.rename(moved))
    stdout, stderr = tvq.train(workdir, exit_code=2)
    assert f"{workdir} was moved to {moved} during the run" in stdout
    assert f"stopped at step 8: --workdir={workdir} was moved" in stderr
    assert f"resume with --workdir={moved}" in stderr
    assert not workdir.exists()
    tvq.train(moved)
    assert_same_run(moved, unbroken)


def remove(folder: Path) -> None:
    """As rm -rf: what is written meanwhile may stay."""
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_workdir_that_is_removed_under_a_run(tvq: Program, tmp_path: Path, meanwhile: Callable) -> None:
    workdir = tmp_path / "run"
    meanwhile(workdir, remove)
    stdout, _ = tvq.train(workdir, exit_code=75)
    assert f"{workdir} was removed during the run" in stdout
    assert "stopped and saved at step 8; the same command resumes the run" in stdout
    stdout, _ = tvq.train(workdir)
    assert "resuming from step 8" in stdout


def test_a_record_whose_checkpoints_are_gone_is_left_alone(tvq: Program, run: Path, here: Here) -> None:
    """The details are in tests/run/test_workdir.py."""
    (run / "checkpoints" / "18").rename(run / "18")
    for step in (6, 12):
        shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
    before = tree(run)
    _, stderr = here("train", *tvq.options(run), exit_code=2)
    assert "holds the record of a run (to step 20), but no checkpoint to resume from" in stderr
    assert {name: file for name, file in tree(run).items() if not name.startswith("logs")} == {
        name: file for name, file in before.items() if not name.startswith("logs")
    }


def test_killed_with_worker_processes(tvq: Program, unbroken: Path, tmp_path: Path) -> None:
    workers = "--config.data.workers=1"
    kill(tvq, "row:10", ["6"], tmp_path, workers)
    with held(tvq, "row:14", tmp_path, workers) as process:
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = end(process, 75)
    assert "stopped and saved at step 16" in stdout  # and not evaluated
    assert "Traceback" not in stderr
    tvq.train(tmp_path)  # and without them
    assert_same_run(tmp_path, unbroken)


def test_killed_twice_with_one_update_a_sequence(tvq: Program, tmp_path: Path) -> None:
    one_update = "--config.train.update_len=64"
    whole, broken = tmp_path / "unbroken", tmp_path / "broken"
    tvq.train(whole, one_update)
    kill(tvq, "save:6", [], broken, one_update)
    kill(tvq, "save:12", ["6"], broken, one_update)
    tvq.train(broken, one_update)
    assert_same_run(broken, whole)
