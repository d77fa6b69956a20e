"""The folder of a run: whether a run may start there, and whether it is still where it was."""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

from etils import epath

from tvq import cluster
from tvq.config import FILE as CONFIG_FILE
from tvq.config import differences, recorded, to_dict
from tvq.errors import InputError
from tvq.run import health, records
from tvq.schema import Config

CHECKPOINTS = "checkpoints"
# Written once there is a checkpoint: without this file, rows without checkpoints are of a run that was killed
# before its first.
SAVED = "checkpoints.json"
# What is left in a workdir if the program is killed at its start, before there is a run.
STARTED = ("logs", f"{CONFIG_FILE}.tmp")


def check_workdir(workdir: epath.Path, config: Config) -> None:
    """InputError if it holds another run, something that is not a run, or a run without its checkpoints."""
    path = workdir / CONFIG_FILE
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is not a folder; use another")
    if path.exists():
        differing = differences(recorded(path), to_dict(config))
        if differing:
            raise InputError(
                f"--workdir={workdir} holds a run with another config; resume with its own config,"
                " or use another workdir:\n  " + "\n  ".join(differing)
            )
    elif workdir.exists() and any(path.name not in STARTED for path in workdir.iterdir()):
        raise InputError(f"--workdir={workdir} is not empty and holds no run; use another folder")
    _check_checkpoints(workdir, config)


def _check_checkpoints(workdir: epath.Path, config: Config) -> None:
    """InputError if the checkpoints of a record are gone: a new run would erase what the old one recorded."""
    folder = workdir / CHECKPOINTS
    what, is_bucket = "", "://" in str(workdir)
    if folder.is_dir() or is_bucket:  # which has no empty folders
        if steps(workdir):
            return
        if any(name.startswith("damaged_") for name in _names(folder)):
            what = "holds only damaged ones"
        elif (workdir / SAVED).exists() or _last_row(workdir) > _surely_saved(workdir, config):
            what = "is empty: not mounted, perhaps"
    elif os.path.islink(folder):
        target = os.readlink(folder)
        if not _has_record(workdir):
            raise InputError(
                f"{folder} is a link to {target}, which is not a folder; make it, or remove the link"
            )
        what = f"is a link to {target}, which is not a folder"
    elif folder.exists():
        raise InputError(f"{folder} is not a folder; move it away, or use another workdir")
    else:
        what = "is not there"
    if what and _has_record(workdir):
        raise InputError(
            f"--workdir={workdir} holds the record of a run (to step {_last_row(workdir)}), but no"
            f" checkpoint to resume from: {folder} {what}; restore the checkpoints, or use another workdir:"
            f" a new run here would erase that record (if that is what you want, delete {workdir})"
        )


def steps(workdir: epath.Path) -> list[int]:
    """The steps of the checkpoints that are committed."""
    return steps_in(workdir / CHECKPOINTS)


def steps_in(checkpoints: epath.Path) -> list[int]:
    """The same of a folder of checkpoints."""
    return sorted(int(name) for name in _names(checkpoints) if name.isdecimal())


def _names(folder: epath.Path) -> list[str]:
    """What a folder holds; nothing if there is no folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _has_record(workdir: epath.Path) -> bool:
    """Whether there is something that a new run would erase."""
    snapshots, samples = workdir / health.FOLDER, workdir / records.SAMPLES
    return _last_row(workdir) >= 0 or any(_names(f) for f in (snapshots, samples))


def _last_row(workdir: epath.Path) -> int:
    """The step of the last row, -1 if there is none."""
    path = workdir / records.FILE
    numbers = re.findall(rb'"step": *(\d+)', path.read_bytes()) if path.exists() else []
    return int(numbers[-1]) if numbers else -1


def _surely_saved(workdir: epath.Path, config: Config) -> float:
    """A row after this step means that the run has saved: the second save waits for the end of the first."""
    path = workdir / CONFIG_FILE
    saving = recorded(path).checkpoint if path.exists() else config.checkpoint
    if not saving.every:
        return math.inf
    return 2 * saving.every + config.train.sequence_len // config.train.update_len


def mark_saved(workdir: epath.Path) -> bool:
    """Records that the run has a checkpoint, as soon as it has one; returns whether that is recorded."""
    saved = steps(workdir)
    if saved:
        with contextlib.suppress(OSError):  # a full disk: tried again at the next row
            _write(workdir / SAVED, {"step": saved[-1]})
            return True
    return False


def _write(path: epath.Path, content: dict) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def record(workdir: epath.Path, config: Config, log: cluster.Log) -> None:
    """Claims the workdir and writes the config of the run there, whole or not at all.

    InputError: it cannot be written. ClusterError: a run is in progress there.
    """
    with cluster.writing("--workdir", workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        log.claim()
        _write(workdir / CONFIG_FILE, to_dict(config))


class Home:
    """The workdir of a run in progress, on the main process: notices when somebody moves or removes it.

    Nothing is noticed in a bucket, which has no folders.
    """

    def __init__(self, workdir: epath.Path, config: Config, say: Callable[[str], None]):
        self.workdir, self._c, self._say = workdir, config, say
        self.is_lost = self._is_marked = False
        if not steps(workdir):
            (workdir / SAVED).unlink(missing_ok=True)  # of an earlier record, which was removed
        self._fd = None  # refers to the folder itself, whatever its name
        if "://" not in str(workdir):
            self._fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def look(self) -> bool:
        """True the first time that the folder is not in its place; then it is made again, to save there."""
        if self.is_lost:
            return False
        if self._is_in_place():
            self._is_marked = self._is_marked or mark_saved(self.workdir)
            return False
        self.is_lost = True
        self._say(f"--workdir={self.workdir} was {self._fate()} during the run, which saves and stops")
        with contextlib.suppress(OSError):  # the save that follows says what is wrong
            (self.workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            _write(self.workdir / CONFIG_FILE, to_dict(self._c))
        return True

    def _is_in_place(self) -> bool:
        if self._fd is None:  # a bucket
            return True
        try:
            is_same = os.path.samestat(os.stat(self.workdir), os.fstat(self._fd))
            return is_same and (self.workdir / CONFIG_FILE).exists()  # or it was emptied
        except FileNotFoundError:
            return False
        except OSError:  # a disk that does not answer tells nothing about the folder
            return True

    def _moved_to(self) -> Path | None:
        """Where the folder is now, None if it was removed or this system cannot tell."""
        assert self._fd is not None
        try:
            place = Path(os.readlink(f"/proc/self/fd/{self._fd}"))
            is_it = os.path.samestat(os.stat(place), os.fstat(self._fd))
            is_elsewhere = place != Path(os.path.realpath(self.workdir))
            return place if is_it and is_elsewhere else None
        except OSError:
            return None

    def _fate(self) -> str:
        place = self._moved_to()
        return f"moved to {place}" if place else "removed"

    def settle(self, step: int) -> tuple[str, bool]:
        """After the last save of a run that lost its folder: how to resume, and if the same command does.

        A folder that was moved gets the checkpoint. The same command would then start a new run.
        """
        place = self._moved_to()
        ours = self.workdir / CHECKPOINTS
        is_here = step in steps(self.workdir)  # if not, the save came before the loss
        if place is None:
            lost = "what it held" if is_here else "all of it"
            return f"--workdir={self.workdir} was removed during the run: {lost} is lost", is_here
        try:
            if is_here:
                os.rename(ours / str(step), place / CHECKPOINTS / str(step))
            for name in (health.FOLDER, records.SAMPLES):  # written until the loss was noticed
                if (self.workdir / name).is_dir():
                    shutil.copytree(self.workdir / name, place / name, dirs_exist_ok=True)
        except OSError as error:
            return (
                f"--workdir={self.workdir} was moved to {place} during the run, and {ours / str(step)} could"
                f" not be moved there ({error.strerror}): move it into {place / CHECKPOINTS}, and resume with"
                f" --workdir={place}"
            ), False
        for name in (CHECKPOINTS, health.FOLDER, records.SAMPLES):
            shutil.rmtree(self.workdir / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder holds files that are not ours
            (self.workdir / CONFIG_FILE).unlink()
            self.workdir.rmdir()
        return (
            f"--workdir={self.workdir} was moved to {place} during the run, and checkpoint {step} is there:"
            f" resume with --workdir={place}"
        ), False
