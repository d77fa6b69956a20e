"""The mesh is not part of a run's identity: one device or eight, and a change between them."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import made_once
from tests.end_to_end.program import Program, end, newest, rows
from tests.fakes.pod import free_port

pytestmark = pytest.mark.slow
EIGHT = "--cpu_devices=8"


@pytest.fixture(scope="module")
def on_eight(tvq: Program) -> Path:
    """The workdir of the unbroken run on eight devices."""
    workdir = tvq.folder / "on_eight"
    with made_once(workdir) as is_mine:
        if is_mine:
            stdout, _ = tvq.train(workdir, EIGHT)
            assert "8 x cpu: devices=8 (cuts the batch)" in stdout
    return workdir


def assert_same_numbers(a: Path, b: Path) -> None:
    for found, wanted in zip(rows(a), rows(b), strict=True):
        assert found.pop("split") == wanted.pop("split")
        assert found == pytest.approx(wanted, rel=1e-5)
    assert newest(a).step == newest(b).step == 20


def cut(workdir: Path, copy: Path) -> Path:
    """A copy of a run as if it had been killed before its third checkpoint."""
    shutil.copytree(workdir, copy)
    for step in ("18", "20"):
        shutil.rmtree(copy / "checkpoints" / step)
    return copy


def test_eight_devices_train_as_one(unbroken: Path, on_eight: Path) -> None:
    assert_same_numbers(on_eight, unbroken)


def test_saved_on_eight_goes_on_with_one(
    tvq: Program, unbroken: Path, on_eight: Path, tmp_path: Path
) -> None:
    workdir = cut(on_eight, tmp_path / "run")
    stdout, _ = tvq.train(workdir)
    assert "1 x cpu: devices=1" in stdout
    assert "resuming from step 12" in stdout
    assert_same_numbers(workdir, unbroken)


def test_saved_on_one_goes_on_with_eight(tvq: Program, unbroken: Path, tmp_path: Path) -> None:
    workdir = cut(unbroken, tmp_path / "run")
    stdout, _ = tvq.train(workdir, EIGHT, "--config.mesh.devices=8")
    assert "8 x cpu: devices=8" in stdout
    assert "resuming from step 12" in stdout
    assert_same_numbers(workdir, unbroken)


def test_a_run_goes_on_and_is_evaluated_on_any_shape(tvq: Program, unbroken: Path, tmp_path: Path) -> None:
    """Parameters and sequences cut, values cut, one device: as if it had always been one."""
    workdir = tmp_path / "run"
    cut = ("--config.mesh.sequence=2", "--config.mesh.shard_params=true", "--config.train.accumulate=2")
    stdout, _ = tvq.train(
        workdir, EIGHT, "--config.mesh.devices=2", "--config.mesh.replica=2", *cut, "--config.train.steps=12"
    )
    assert "sequence=2" in stdout
    stdout, _ = tvq.train(workdir, "--cpu_devices=4", "--config.mesh.tensor=4")
    assert "resuming from step 12" in stdout
    by_step = lambda run: {(row["step"], row.pop("split")): row for row in rows(run)}
    found, wanted = by_step(workdir), by_step(unbroken)
    del found[12, "validation"]  # the first of the two runs ended there
    assert found == {key: pytest.approx(row, rel=1e-5) for key, row in wanted.items()}
    evaluate = ("eval", f"--workdir={workdir}", "--split=test")
    one, _ = tvq.run(*evaluate, "--config.mesh.tensor=1")
    many, _ = tvq.run(*evaluate, EIGHT, "--config.mesh.tensor=2", *cut[:2])
    found, wanted = (json.loads(text.splitlines()[-1]) for text in (many, one))
    assert found.pop("split") == wanted.pop("split")
    assert found == pytest.approx(wanted, rel=1e-6)


def test_wrong_input_to_two_processes(tvq: Program, tmp_path: Path) -> None:
    with together(tvq, tmp_path / "run", "--config.mesh.devices=4") as processes:
        for i, process in enumerate(processes):
            _, stderr = end(process, 2)
            assert f"[{i}] tvq: config.mesh.devices is 4 but there are 2 cpu devices" in stderr
            assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@contextlib.contextmanager
def together(tvq: Program, workdir: Path, *more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A run of two processes on this machine, with a device each."""
    place = {"TVQ_COORDINATOR": f"127.0.0.1:{free_port()}", "TVQ_N_PROCESS": "2"}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                tvq.start("train", *tvq.options(workdir, *more), **place, TVQ_PROCESS_ID=str(i))
            )
            for i in range(2)
        ]
