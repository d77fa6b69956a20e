"""The mesh is no part of a run's identity: one device or eight, and a change of them on the way."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.program import Program, newest, rows

pytestmark = pytest.mark.slow
EIGHT = "--cpu_devices=8"


@pytest.fixture(scope="module")
def on_eight(tvq: Program) -> Path:
    """The workdir of the unbroken run on eight devices."""
    workdir = tvq.folder / "on_eight"
    stdout, _ = tvq.train(workdir, EIGHT)
    assert "8 x cpu, 1 sequences each" in stdout
    return workdir


def assert_same_losses(a: Path, b: Path) -> None:
    for found, wanted in zip(rows(a), rows(b), strict=True):
        assert (found["step"], found["split"]) == (wanted["step"], wanted["split"])
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5), found["step"]
    assert newest(a).step == newest(b).step == 20


def cut(workdir: Path, copy: Path) -> Path:
    """A copy of a run as if it had been killed before its third checkpoint."""
    shutil.copytree(workdir, copy)
    for step in ("18", "20"):
        shutil.rmtree(copy / "checkpoints" / step)
    return copy


def test_eight_devices_train_as_one(unbroken: Path, on_eight: Path) -> None:
    assert_same_losses(on_eight, unbroken)


def test_saved_on_eight_goes_on_with_one(
    tvq: Program, unbroken: Path, on_eight: Path, tmp_path: Path
) -> None:
    workdir = cut(on_eight, tmp_path / "run")
    stdout, _ = tvq.train(workdir)
    assert "devices  1 x cpu" in stdout
    assert "going on from step 12" in stdout
    assert_same_losses(workdir, unbroken)


def test_saved_on_one_goes_on_with_eight(tvq: Program, unbroken: Path, tmp_path: Path) -> None:
    workdir = cut(unbroken, tmp_path / "run")
    stdout, _ = tvq.train(workdir, EIGHT, "--config.mesh.devices=8")
    assert "devices  8 x cpu" in stdout
    assert "going on from step 12" in stdout
    assert_same_losses(workdir, unbroken)
