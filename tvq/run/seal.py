"""The seal of a checkpoint: size and checksum of each of its files, and the refusal to seal half of one."""

import itertools
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import orbax.checkpoint as ocp
import tensorstore
from etils import epath

FILE = "SEAL.json"
ITEMS = ("meta", "state")  # the folders of a checkpoint, each with its seal
CHUNK = 1 << 24  # bytes read at a time


class Arrays(ocp.StandardCheckpointHandler):
    """Refuses to commit what has lost arrays: Orbax does not notice that a process's folder has gone."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if lost := missing(directory):
            raise FileNotFoundError(f"{len(lost)} arrays are missing, such as {lost[0]}")
        seal(directory)


class Json(ocp.JsonCheckpointHandler):
    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        seal(directory)


def seal(folder: epath.Path) -> None:
    """Writes what the files are. Called on one process, when all have written and before the commit."""
    files = list(_files(folder))
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_size_and_sum, files))
    names = [str(path.relative_to(folder)) for path in files]
    (folder / FILE).write_text(json.dumps(dict(zip(names, sums, strict=True)), indent=1))


def damage(folder: epath.Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    for item in ITEMS:
        try:
            sealed = json.loads((folder / item / FILE).read_text())
            with ThreadPoolExecutor() as pool:
                actual = pool.map(_size_and_sum, [folder / item / name for name in sealed])
                for (name, wanted), got in zip(sealed.items(), actual, strict=True):
                    if got != wanted:
                        return f"{item}/{name}: bytes and checksum are {got}, sealed {wanted}"
        except OSError as error:
            return f"{item}: {error}"
        except ValueError:
            return f"{item}/{FILE} cannot be read"
    return None


def missing(folder: epath.Path) -> list[str]:
    """The arrays that Orbax's metadata names and of which a part, or all, is not stored."""
    path = os.fspath(folder)
    base = path if "://" in path else {"driver": "file", "path": f"{path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    stored = {key.decode() for key in store.list().result()}
    tree = json.loads((folder / "_METADATA").read_text())["tree_metadata"]
    names = [".".join(str(part["key"]) for part in entry["key_metadata"]) for entry in tree.values()]

    def is_whole(name: str) -> bool:
        if f"{name}/.zarray" not in stored:
            return False
        like = json.loads(store.read(f"{name}/.zarray").result().value)
        counts = [-(-n // chunk) for n, chunk in zip(like["shape"], like["chunks"], strict=True)]
        chunks = itertools.product(*map(range, counts))
        return all(f"{name}/{'.'.join(map(str, chunk)) or '0'}" in stored for chunk in chunks)

    return [name for name in names if not is_whole(name)]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _size_and_sum(path: epath.Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
