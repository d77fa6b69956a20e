"""`tvq train` and `tvq eval` as several processes: what one process computes, and all or none continue."""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests import chaos
from tests.end_to_end.program import Program, arrays, has_rows, newest, rows, tree
from tests.fakes.pod import SHORT_RUN, Pod
from tvq import cluster

pytestmark = pytest.mark.slow
QUICK_TO_GIVE_UP = ("--config.cluster.start_timeout=60", "--config.cluster.silence_timeout=20")


@contextlib.contextmanager
def pod(
    folder: Path,
    n: int,
    devices: int,
    *arguments: str,
    one: Mapping[int, Mapping[str, str]] | None = None,
    own: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[Pod]:
    """`n` processes of `devices` devices each; what they print is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = SHORT_RUN | {"JAX_NUM_CPU_DEVICES": str(devices)}
    with Pod(folder, n, *arguments, module="tests.fakes.cached", one=one, own=own, **variables) as started:
        yield started


def train(tvq: Program, workdir: Path, n: int, devices: int, *more: str) -> str:
    """A run that must end well; returns what process 0 printed."""
    folder = workdir.with_name(f"{workdir.name}_output")
    with pod(folder, n, devices, "train", *tvq.options(workdir, *more)) as started:
        codes = started.codes()
        assert codes == [0] * n, [started.said(i) for i in range(n)]
    return started.said(0)


def assert_close(a: Path, b: Path, tolerance: float) -> None:
    """The same rows and arrays, each within `tolerance` of the largest of its kind.

    Not bitwise: between processes gloo adds the devices' parts in another order than one process does.
    """
    found, wanted = rows(a), rows(b)
    assert [(row["step"], row["split"]) for row in found] == [(row["step"], row["split"]) for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    ours, theirs = arrays(newest(a)), arrays(newest(b))
    for name, array in ours.items():
        if array.dtype.kind == "f":
            largest = np.abs(theirs[name]).max()
            np.testing.assert_allclose(array, theirs[name], rtol=0, atol=tolerance * largest, err_msg=name)
        else:
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_two_processes_compute_what_one_does_and_process_0_alone_speaks(tvq: Program, tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    tvq.train(alone, "--cpu_devices=4")
    train(tvq, two, 2, 2)
    assert_close(two, alone, 1e-6)
    first, second = ((tmp_path / "two_output" / f"output_{i}.txt").read_text() for i in (0, 1))
    assert "step 20 of 20" in first
    assert not re.search("^step", second, re.M)  # a slow machine has its watchdog speak of steps
    for i in (0, 1):
        assert f"process {i} of 2, coordinator" in (two / "logs" / f"process_{i}.log").read_text()
    stdout, _ = tvq.run("eval", f"--workdir={two}", "--split=test", "--cpu_devices=4")
    assert evaluated(two, 2, 2) == stdout.splitlines()


def test_a_sequence_is_cut_over_processes(tvq: Program, unbroken: Path, tmp_path: Path) -> None:
    """Both read all sequences; each device has half of the tokens and half of the values."""
    cut = ("--config.mesh.devices=1", "--config.mesh.sequence=2", "--config.mesh.tensor=2")
    train(tvq, tmp_path / "run", 2, 2, *cut)
    assert_close(tmp_path / "run", unbroken, 1e-5)
    assert set(tree(tmp_path / "run" / "samples")) == {"step_12.txt", "step_20.txt"}


def evaluated(workdir: Path, n: int, devices: int) -> list[str]:
    """The two lines of `tvq eval`, which process 0 alone prints."""
    with pod(
        workdir.with_name(f"eval_{n}"), n, devices, "eval", f"--workdir={workdir}", "--split=test"
    ) as ran:
        assert ran.codes() == [0] * n, ran.said(0)
    said = [[line for line in ran.said(i).splitlines() if line.startswith(("test", "{"))] for i in range(n)]
    assert said[1:] == [[]] * (n - 1)
    assert json.loads(said[0][1])["split"] == "test"
    return said[0]


def test_runs_go_on_with_other_numbers_of_processes_and_devices(
    tvq: Program, unbroken: Path, tmp_path: Path
) -> None:
    """From one device to two processes, and to one again. That four sum as one does: tests/cluster."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for step in ("18", "20"):
        shutil.rmtree(workdir / "checkpoints" / step)
    assert "resuming from step 12" in train(tvq, workdir, 2, 2, "--config.train.steps=16")
    stdout, _ = tvq.train(workdir, "--cpu_devices=4")
    assert "resuming from step 16" in stdout
    assert_close(workdir, unbroken, 1e-5)


def test_sigterm_on_one_process_saves_all_at_one_step(tvq: Program, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    endless = ("--config.train.steps=100000", "--config.evaluate.every=0")
    with pod(tmp_path / "output", 2, 2, "train", *tvq.options(workdir, *endless)) as started:
        started.wait_until(lambda: has_rows(workdir), "a row")
        started.processes[1].send_signal(signal.SIGTERM)
        assert started.codes() == [cluster.EXIT_STOPPED] * 2
    stopped = re.findall(
        r"stopped and saved at step (\d+); the same command resumes the run", started.said(0)
    )
    assert [newest(workdir).step] == [int(step) for step in stopped]


def refused(tvq: Program, folder: Path, **differing: Mapping) -> list[str]:
    """What two rejected processes print."""
    arguments = ("train", *tvq.options(folder / "run", *QUICK_TO_GIVE_UP))
    with pod(folder, 2, 2, *arguments, **differing) as started:
        assert started.codes() == [cluster.EXIT_INPUT] * 2, [started.said(i) for i in (0, 1)]
    return [started.said(i) for i in (0, 1)]


def test_another_config_on_one_process_stops_all_before_there_is_a_run(tvq: Program, tmp_path: Path) -> None:
    for text in refused(tvq, tmp_path, own={1: ("--config.model.n_code=16",)}):
        assert re.search(r"config.model.n_code: 8 on process 0 \(.*\); 16 on process 1 \(", text), text
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_data_on_one_process_stops_all(tvq: Program, tmp_path: Path) -> None:
    homes = [tmp_path / "home_0", tmp_path / "home_1"]
    for i, home in enumerate(homes):
        home.mkdir()
        (home / "corpus.txt").write_text(tvq.corpus.read_text() + "more\n" * i)
    one = {i: {"HOME": os.fspath(home)} for i, home in enumerate(homes)}
    for text in refused(tvq, tmp_path, one=one, own={i: ["--config.data.path=~/corpus.txt"] for i in (0, 1)}):
        assert re.search(r'data: "\w+" on process 0 \(.*\); "\w+" on process 1 \(', text), text


def test_a_workdir_that_is_not_shared_stops_all(tvq: Program, tmp_path: Path) -> None:
    for text in refused(tvq, tmp_path, own={1: [f"--workdir={tmp_path / 'elsewhere'}"]}):
        assert re.search(r"--workdir, .*: true on process 0 \(.*\); false on process 1 \(", text), text


def test_a_run_survives_chaos(tvq: Program, tmp_path: Path) -> None:
    """Two of the events of tests/chaos.py: a process asked to stop as a checkpoint is committed, one killed.

    One that is stopped is named in tests/cluster/test_watchdog.py.
    """
    chaos.run(3, 2, 2, 2, tvq, tmp_path)
