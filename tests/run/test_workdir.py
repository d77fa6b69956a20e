import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath

from tvq import cluster, config, schema
from tvq.errors import InputError
from tvq.run.workdir import SAVED, Home, check_workdir, mark_saved, record

C = schema.Config(checkpoint=schema.Checkpoint(every=6), train=schema.Train(sequence_len=64, update_len=32))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run to step 8 with a checkpoint at step 6."""
    workdir = tmp_path / "run"
    with contextlib.closing(cluster.Log(workdir / "logs", cluster.Place(how="alone"))) as log:
        record(epath.Path(workdir), C, log)
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    write_rows(workdir, 8)
    assert mark_saved(epath.Path(workdir))
    return workdir


def write_rows(workdir: Path, last: int) -> None:
    rows = [json.dumps({"step": step, "split": "train"}) + "\n" for step in range(2, last + 1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(rows))


def check(workdir: Path) -> None:
    check_workdir(epath.Path(workdir), C)


def take_away(workdir: Path, how: str) -> None:
    folder = workdir / "checkpoints"
    shutil.rmtree(folder)
    if how == "is a link":
        folder.symlink_to(workdir / "unmounted")
    elif how != "is not there":
        folder.mkdir()
    if how == "holds only damaged":
        (folder / "damaged_6").mkdir()


GONE = ["is not there", "is empty", "is a link", "holds only damaged"]


@pytest.mark.parametrize("how", GONE)
def test_a_record_without_its_checkpoints_is_refused(run: Path, how: str) -> None:
    check(run)
    take_away(run, how)
    with pytest.raises(InputError, match=rf"record of a run \(to step 8\).*checkpoints {how}.*restore"):
        check(run)
    (run / "metrics.jsonl").unlink()
    (run / "samples").mkdir()
    (run / "samples" / "step_8.txt").touch()  # a new run would erase it too
    if how != "is empty":
        with pytest.raises(InputError, match="a new run here would erase that record"):
            check(run)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(run: Path) -> None:
    take_away(run, "is empty")
    (run / SAVED).unlink()
    for last in (0, 8, 14):  # the first checkpoint was still being written
        write_rows(run, last)
        check(run)
    write_rows(run, 16)  # the second save has waited for the first
    with pytest.raises(InputError, match="is empty"):
        check(run)
    # The run that wrote these rows saved more rarely.
    (run / config.FILE).write_text(
        json.dumps(config.to_dict(C) | {"checkpoint": {"every": 1000, "keep": 1, "keep_every": 0}})
    )
    check(run)


def test_a_new_run_in_the_place_of_one_that_was_removed_has_saved_nothing(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "metrics.jsonl").unlink()
    with home(run):
        write_rows(run, 2)
    check(run)


def test_checkpoints_in_a_place_that_is_no_folder(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    take_away(run, "is a link")
    with pytest.raises(InputError, match=r"is a link to .*unmounted, which is not a folder; make it"):
        check(run)


SAID: list[str] = []


@contextlib.contextmanager
def home(workdir: Path) -> Iterator[Home]:
    SAID.clear()
    with Home(epath.Path(workdir), C, SAID.append) as made:
        yield made


def save(workdir: Path, step: int) -> None:
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)


def test_a_workdir_that_stays(run: Path) -> None:
    (run / SAVED).unlink()
    with home(run) as made:
        assert not made.look()
        assert json.loads((run / SAVED).read_text()) == {"step": 6}
        assert not made.is_lost
    assert SAID == []


def test_a_workdir_that_was_moved_gets_the_last_checkpoint(run: Path, tmp_path: Path) -> None:
    with home(run) as made:
        moved = run.rename(tmp_path / "moved")
        assert made.look()
        assert not made.look(), "it is said once"
        save(run, 10)
        (run / "codebook").mkdir()
        (run / "codebook" / "step_8.npz").touch()
        words, is_here = made.settle(10)
    assert [f"--workdir={run} was moved to {moved} during the run, which saves and stops"] == SAID
    assert f"checkpoint 10 is there: resume with --workdir={moved}" in words
    assert not is_here, "the same command would begin a new run"
    assert not run.exists()
    assert {path.name for path in (moved / "checkpoints").iterdir()} == {"6", "10"}
    assert (moved / "codebook" / "step_8.npz").exists()
    check(moved)


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_workdir_that_was_removed_is_made_again_for_the_checkpoint(run: Path, how: str) -> None:
    with home(run) as made:
        if how == "removed":
            shutil.rmtree(run)
        else:
            for path in run.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert made.look()
        save(run, 10)
        words, is_here = made.settle(10)
    assert "was removed during the run: what it held is lost" in words
    assert is_here
    check(run)  # goes on from step 10


def test_a_workdir_that_goes_after_the_last_save(run: Path, tmp_path: Path) -> None:
    with home(run) as made:
        moved = run.rename(tmp_path / "moved")
        made.look()
        assert made.settle(6)[0].endswith(f"checkpoint 6 is there: resume with --workdir={moved}")
    with home(moved) as made:
        shutil.rmtree(moved)
        made.look()
        assert made.settle(6) == (f"--workdir={moved} was removed during the run: all of it is lost", False)


def test_another_folder_in_the_place_of_the_workdir(run: Path, tmp_path: Path) -> None:
    with home(run) as made:
        run.rename(tmp_path / "moved")
        run.mkdir()
        assert made.look()
