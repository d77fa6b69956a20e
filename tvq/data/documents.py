"""Where text comes from: the documents of a source and the split that each belongs to.

A file's split follows from a hash of its name, so it stays where it is when files come and go.
"""

import dataclasses
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tvq import config, paths
from tvq.errors import InputError

SPLITS = ("train", "validation", "test")
SPLIT_RULE = "folder: 98/1/1 % by sha256 of the name; file: 90/5/5 % of its bytes, in order"
CHUNK = 1 << 20


class Piece(NamedTuple):
    """A stretch of a document: `raw` is some of its text, or an image."""

    split: str
    document: str
    raw: bytes
    last: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """Bytes `start` to `stop` of a file; `name` is the file's path below its root, with forward slashes."""

    split: str
    name: str
    path: Path
    start: int
    stop: int
    mtime_ns: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, at most `CHUNK` at a time. InputError: the file is unreadable or has become shorter."""
        left = self.stop - self.start
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                while left:
                    chunk = file.read(min(left, CHUNK))
                    if not chunk:
                        raise InputError(
                            f"config.data.path: {self.path} became shorter while read; try again"
                        )
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise unreadable(self.path, error) from error


def pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """The text of the documents, at most `CHUNK` bytes at a time."""
    for document in documents:
        for chunk in document.chunks():
            yield Piece(document.split, document.name, chunk, last=False)
        yield Piece(document.split, document.name, b"", last=True)


def unreadable(path: Path, error: OSError) -> InputError:
    name = error.filename or path
    return InputError(
        f"config.data.path: cannot read {name} ({error.strerror}); make it readable or move it away"
    )


def hashed_split(name: str) -> str:
    """The split of the document called `name`: 98 of 100 names train, one validates, one tests."""
    percent = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % 100
    return "train" if percent < 98 else "validation" if percent == 98 else "test"


def find(data: config.Data) -> list[Document]:
    """The documents of source stdlib or text, in order. InputError: there are none, or none to train on."""
    if data.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skip = ("site-packages", "dist-packages", "__pycache__")
        documents = _of_folder(root, suffix=".py", skip=skip)
    else:
        root = Path(paths.expand("config.data.path", data.path)).resolve()
        try:
            mode = root.stat().st_mode
        except OSError as error:
            raise InputError(
                f"config.data.path: {root} cannot be opened ({error.strerror}); give a file or folder of text"
            ) from error
        if stat.S_ISDIR(mode):
            documents = _of_folder(root)
        elif stat.S_ISREG(mode):
            documents = _of_file(root)
        else:
            raise InputError(f"config.data.path: {root} is neither a file nor a folder; give one of them")
    _check_text(root, documents)
    return documents


def _of_file(path: Path) -> list[Document]:
    info = path.stat()
    edges = [0, info.st_size * 90 // 100, info.st_size * 95 // 100, info.st_size]
    return [
        Document(split=split, name=path.name, path=path, start=start, stop=stop, mtime_ns=info.st_mtime_ns)
        for split, start, stop in zip(SPLITS, edges[:-1], edges[1:], strict=True)
        if start < stop
    ]


def _of_folder(root: Path, *, suffix: str = "", skip: tuple[str, ...] = ()) -> list[Document]:
    """One document a regular file, by name. Hidden names are left out; linked folders are not entered."""
    documents = []
    try:
        for folder, folders, files in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
            paths = [Path(folder, name) for name in files if not name.startswith(".")]
            documents += [_whole(root, path) for path in paths if path.name.endswith(suffix)]
    except OSError as error:
        raise unreadable(root, error) from error
    return sorted(filter(None, documents), key=lambda document: document.name)


def _whole(root: Path, path: Path) -> Document | None:
    """A file as one document, or None for a socket, a pipe or a link to a folder."""
    info, name = path.stat(), path.relative_to(root).as_posix()
    if not stat.S_ISREG(info.st_mode):
        return None
    return Document(
        split=hashed_split(name), name=name, path=path, start=0, stop=info.st_size, mtime_ns=info.st_mtime_ns
    )


def _raise(error: OSError) -> None:
    raise error


def _check_text(root: Path, documents: list[Document]) -> None:
    n_byte = dict.fromkeys(SPLITS, 0)
    for document in documents:
        n_byte[document.split] += document.stop - document.start
    if not any(n_byte.values()):
        raise InputError(
            f"config.data.path: {root} holds no text (0 bytes in {len(documents)} files, hidden ones apart);"
            " give a file or folder with text"
        )
    if not n_byte["train"]:
        counts = ", ".join(f"{split} {n}" for split, n in n_byte.items())
        raise InputError(
            f"config.data.path: the {len(documents)} files of {root} hold no training text (bytes: {counts});"
            " a file's name decides its split: add files, or give one file, which is cut 90/5/5 %"
        )
