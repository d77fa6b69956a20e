"""The one walk over files: what a source of data reads below a file or folder, local or in a bucket."""

import dataclasses
import os
import re
import stat
from collections import deque
from collections.abc import Collection
from pathlib import Path

from etils import epath

from tvq.data.files import File, is_bucket, reading, shown
from tvq.errors import InputError

PREPARING = ".tvq-preparing"  # marks a folder that `tvq prepare` is filling
OWN = "made by tvq"  # why a folder was left out


@dataclasses.dataclass(frozen=True)
class Walk:
    """The files below a root, in natural order of their names; the folders made by tvq that were left out."""

    files: list[File]
    left_out: list[str]


def natural(name: str) -> tuple:
    """Sorts batch_10 after batch_9."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(x), "") if i % 2 else (-1, x) for i, x in enumerate(parts)], name


def walk(root: epath.Path, *, skip: Collection[str] = (), leave_out: Collection[Path] = ()) -> Walk:
    """A file itself, or the regular files of a folder.

    Left out are hidden names, those in `skip`, pipes, sockets and devices, the folders `leave_out`, and
    folders that tvq made below the root: runs and prepared data, which would make other text at each start.
    A folder that several links lead to is read once, so links may form loops. InputError: there is no
    file, one cannot be inspected, or the root can be read only once.
    """
    with reading(root):
        if is_bucket(root):
            if not root.exists():
                raise InputError(f"{root} does not exist")
            listed = Walk([] if root.is_dir() else [File(root, root.name)], [])
            if root.is_dir():
                _in_bucket(root, "", listed)
        else:
            listed = _local(Path(root), skip, leave_out)
    if not listed.files:
        raise InputError(f"{shown(root)} holds no text or images (no files except hidden ones)")
    return Walk(sorted(listed.files, key=lambda file: natural(file.name)), sorted(listed.left_out))


def one(path: epath.Path) -> File:
    """The file at a path. InputError: there is none, it is a folder, or can be read only once."""
    with reading(path):
        if path.is_dir():
            raise InputError(f"cannot read {shown(path)} (Is a directory); give a file")
    return walk(path).files[0]


def _in_bucket(folder: epath.Path, prefix: str, listed: Walk) -> None:
    inside = list(folder.iterdir())
    if prefix and is_own(folder, {path.name for path in inside}):
        listed.left_out.append(prefix)
        return
    for path in inside:
        if not path.name.startswith("."):
            if path.is_dir():
                _in_bucket(path, f"{prefix}{path.name}/", listed)
            else:
                listed.files.append(File(path, prefix + path.name))


def _local(root: Path, skip: Collection[str], leave_out: Collection[Path]) -> Walk:
    mode = _stat(root).st_mode
    if stat.S_ISREG(mode):
        return Walk([_file(root, root.name, _stat(root))], [])
    if not stat.S_ISDIR(mode):
        once = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        raise InputError(
            f"{shown(root)} is neither a file nor a folder"
            + (", it can be read only once" if once else "")
            + "; write it to a file first and give that"
        )
    files, own = list[File](), list[str]()
    seen = {_identity(path) for path in leave_out if path.exists()} - {_identity(root)}
    waiting, linked = deque([("", root)]), deque[tuple[str, Path]]()
    while waiting or linked:
        # Linked folders last: one that is also below the root keeps its name there.
        prefix, folder = (waiting or linked).popleft()
        if _identity(folder) in seen:
            continue
        seen.add(_identity(folder))
        with reading(folder), os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        if prefix and is_own(folder, {entry.name for entry in inside}):
            own.append(prefix)
            continue
        for entry in inside:
            if not entry.name.startswith(".") and entry.name not in skip:
                path, name = folder / entry.name, prefix + entry.name
                info = _stat(path)
                if stat.S_ISDIR(info.st_mode):
                    (linked if entry.is_symlink() else waiting).append((f"{name}/", path))
                elif stat.S_ISREG(info.st_mode):
                    files.append(_file(path, name, info))
    return Walk(files, own)


def is_own(folder: Path | epath.Path, names: Collection[str]) -> bool:
    """Whether a folder that holds these names is a run of tvq, or data that it prepared or is preparing."""
    if PREPARING in names or {"manifest.json", "train.tokens"} <= set(names):
        return True
    if "config.json" in names and not {"metrics.jsonl", "checkpoints", "logs"}.isdisjoint(names):
        return True
    # Several processes that start as one run have logs before anything else.
    logs = folder / "logs"
    return (
        "logs" in names
        and logs.is_dir()
        and any(re.fullmatch(r"process_\d+\.log", path.name) for path in logs.iterdir())
    )


def _stat(path: Path) -> os.stat_result:
    with reading(path):
        return path.stat()


def _identity(path: Path) -> tuple[int, int]:
    info = _stat(path)
    return info.st_dev, info.st_ino


def _file(path: Path, name: str, info: os.stat_result) -> File:
    return File(epath.Path(path), name, info.st_size, info.st_mtime_ns)
