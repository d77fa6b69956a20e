"""Raw files as users download them: found, hashed, unpacked while they are read, here or in a bucket."""

import contextlib
import gzip
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from etils import epath

from tvq.data import optional
from tvq.errors import InputError

CHUNK = 1 << 20
DAMAGED = (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile)


class Meter:
    """How many bytes of the raw files have been read, for the time left."""

    def __init__(self) -> None:
        self.n_byte = 0

    def open(self, path: epath.Path) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Counted(path.open("rb"), self), CHUNK))


class _Counted(io.RawIOBase):
    def __init__(self, file: BinaryIO, meter: Meter) -> None:
        self._file, self._meter = file, meter

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        raw = self._file.read(len(buffer))
        buffer[: len(raw)] = raw
        self._meter.n_byte += len(raw)
        return len(raw)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def explained(path: epath.Path) -> Iterator[None]:
    """What goes wrong while a file is read becomes an InputError that names it."""
    try:
        yield
    except DAMAGED as error:
        raise InputError(
            f"--input: {path} is damaged or not all there ({error}); fetch it again, whole"
        ) from error
    except OSError as error:
        raise InputError(
            f"--input: cannot read {path} ({error.strerror or error}); make it readable or move it away"
        ) from error


def chunks(path: epath.Path, meter: Meter) -> Iterator[bytes]:
    """The contents of a file, unpacked if its name ends with .zip, .gz or .zst. InputError: it is damaged."""
    with explained(path), meter.open(path) as raw:
        if path.suffix == ".zst":
            yield from _zstd(path, raw)
            return
        with contextlib.ExitStack() as stack:
            file: BinaryIO = raw
            if path.suffix == ".gz":
                file = cast(BinaryIO, stack.enter_context(gzip.open(raw)))
            elif path.suffix == ".zip":
                packed = stack.enter_context(zipfile.ZipFile(raw))
                names = [info.filename for info in packed.infolist() if not info.is_dir()]
                if len(names) != 1:
                    raise InputError(f"--input: {path} holds {len(names)} files, not one; unpack it")
                file = cast(BinaryIO, stack.enter_context(packed.open(names[0])))
            while chunk := file.read(CHUNK):
                yield chunk


def _zstd(path: epath.Path, raw: BinaryIO) -> Iterator[bytes]:
    """One frame after the other: a plain reader takes a torn one for the end."""
    zstandard = optional.load("zstandard")
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while packed := raw.read(CHUNK):
            while packed:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from error
    if not frame.eof:
        raise EOFError("it ends within a frame")


def lines(path: epath.Path, meter: Meter) -> Iterator[bytes]:
    """The lines of a file, without their ends."""
    rest = b""
    for chunk in chunks(path, meter):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def natural(name: str) -> list:
    """Sorts batch_10 after batch_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def below(root: epath.Path) -> list[epath.Path]:
    """A file itself, or the files of a folder in natural order of their names, hidden ones apart.

    InputError: there is none, or one cannot be looked at.
    """
    with explained(root):
        found = list(_walk(root)) if root.is_dir() else [root]
        if not root.exists():
            raise InputError(f"--input: there is no {root}")
    if not found:
        raise InputError(f"--input: {root} holds no files")
    return sorted(found, key=lambda path: natural(name_of(path, root)))


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if not path.name.startswith("."):
            if path.is_dir():
                yield from _walk(path)
            else:
                yield path


def name_of(path: epath.Path, root: epath.Path) -> str:
    """The path below the root, with forward slashes."""
    return path.relative_to(root).as_posix() if path != root else path.name


def hashes(paths: Sequence[epath.Path], root: epath.Path, n_thread: int) -> tuple[str, int]:
    """The lines that sha256sum writes, and the bytes of all files. InputError: one cannot be read."""

    def hashed(path: epath.Path) -> tuple[str, int]:
        meter = Meter()
        with explained(path), meter.open(path) as file:
            digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        return f"{digest}  {name_of(path, root)}\n", meter.n_byte

    with ThreadPoolExecutor(n_thread) as pool:
        found = list(pool.map(hashed, paths))
    return "".join(line for line, _ in found), sum(n_byte for _, n_byte in found)
