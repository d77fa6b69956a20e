"""Files as users have them, here or in a bucket: opened, unpacked, hashed."""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from etils import epath

from tvq.data import optional
from tvq.errors import InputError

CHUNK = 1 << 20
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)
# How a file is compressed: by its suffix, or else by its first bytes.
PACKED = {
    ".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".lzma": "xz", ".zst": "zst", ".zstd": "zst", ".zip": "zip",
}  # fmt: skip
FIRST_BYTES = {
    b"\x1f\x8b": "gz",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"PK\3\4": "zip",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\7": "a RAR archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\xff\6\0\0sNaPpY": "compressed with Snappy",
    b"\x1f\x9d": "compressed with compress",
    b"LZIP\1": "compressed with lzip",
    b"PAR1\x15": "a Parquet table",
    b"ARROW1\0\0": "an Arrow table",
    b"\x93NUMPY": "an array of NumPy",
    b"SQLite format 3\0": "an SQLite database",
    b"%PDF-": "a PDF document",
}
BZ2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
# Suffixes of files that are not read.
REFUSED = {
    ".tar": "a tar archive", ".tgz": "a tar archive", ".tbz2": "a tar archive", ".tbz": "a tar archive",
    ".txz": "a tar archive", ".tzst": "a tar archive", ".7z": "a 7z archive", ".rar": "a RAR archive",
    ".lz4": "compressed with lz4", ".br": "compressed with Brotli", ".z": "compressed with compress",
    ".sz": "compressed with Snappy", ".snappy": "compressed with Snappy", ".lz": "compressed with lzip",
    ".lzo": "compressed with lzop", ".arrow": "an Arrow table", ".feather": "an Arrow table",
}  # fmt: skip
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")


class File(NamedTuple):
    """`name` is the path below the root, with forward slashes; in a bucket size and time are 0."""

    path: epath.Path
    name: str
    size: int = 0
    mtime_ns: int = 0


class Meter:
    """How many bytes of the raw files have been read, for the time left."""

    def __init__(self) -> None:
        self.n_byte = 0

    def open(self, path: epath.Path) -> io.BufferedReader:
        return io.BufferedReader(_Counted(path.open("rb"), self), CHUNK)


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


def is_bucket(path: os.PathLike | str) -> bool:
    return "://" in os.fspath(path)


def shown(name: os.PathLike | str) -> str:
    """A name on one line, even if it has line ends or bytes that are not UTF-8."""
    text = os.fspath(name)
    return text if text.isprintable() else repr(text)[1:-1]


def listed(names: Collection[str]) -> str:
    """Some of the names, on one line."""
    some = ", ".join(shown(name) for name in sorted(names)[:3])
    return some + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Puts the option or config field before the message of an InputError about the files that it names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


@contextlib.contextmanager
def reading(path: os.PathLike | str) -> Iterator[None]:
    """Whatever goes wrong while a user's file is read becomes an InputError that names it.

    Everything is caught: a library may raise anything for a damaged file.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"cannot read {shown(path)} ({error.strerror}): it does not exist, or is a broken link;"
            " give a file or folder"
        ) from error
    except DAMAGED as error:
        raise InputError(
            f"{shown(path)} is damaged or incomplete ({error}); fetch it again, whole"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(
                f"cannot read {shown(path)} ({error.strerror}); make it readable or move it away"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"cannot read {shown(path)} ({reason}); it is damaged, or of a format that is not supported"
        ) from error


def packing(name: str) -> str:
    """How a file of that name is compressed, or nothing."""
    return PACKED.get(Path(name.lower()).suffix, "")


def unpacked_suffix(name: str) -> str:
    """The suffix of a file in lower case, without one of compression after it."""
    path = Path(name.lower())
    return Path(path.stem).suffix if packing(name) else path.suffix


def kind_of_bytes(head: bytes) -> str:
    """How a file that begins with these bytes is compressed, or what else it is; nothing for text."""
    if BZ2.match(head):
        return "bz2"
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for magic, kind in FIRST_BYTES.items() if head.startswith(magic)), "")


def chunks(file: File, meter: Meter) -> Iterator[bytes]:
    """The contents of a file, decompressed.

    InputError: it is damaged, holds several files, has changed since it was listed, or is neither text nor
    compressed in a supported way.
    """
    path, n_byte = file.path, 0
    with reading(path), contextlib.ExitStack() as stack:
        raw = stack.enter_context(meter.open(path))
        kind = packing(path.name) or kind_of_bytes(raw.peek(512)) or REFUSED.get(path.suffix.lower(), "")
        for i, chunk in enumerate(_unpacked(path, raw, kind, stack)):
            inside = kind_of_bytes(chunk[:512]) if kind and not i else ""
            if inside:
                what = f"compressed with {inside}" if inside in PACKED.values() else inside
                raise InputError(f"what {shown(path)} holds is {what}; unpack it")
            n_byte += len(chunk)
            yield chunk
    if not kind and file.size and n_byte != file.size:
        raise InputError(
            f"{shown(path)} changed while it was read, from {file.size} bytes to {n_byte}; try again"
        )


def _unpacked(
    path: epath.Path, raw: io.BufferedReader, kind: str, stack: contextlib.ExitStack
) -> Iterator[bytes]:
    if kind == "zst":
        yield from _zstd(raw)
        return
    file: BinaryIO = raw
    match kind:
        case "":
            pass
        case "gz":
            file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=raw)))
        case "bz2":
            file = cast(BinaryIO, stack.enter_context(bz2.BZ2File(raw)))
        case "xz":
            file = cast(BinaryIO, stack.enter_context(lzma.LZMAFile(raw)))  # noqa: SIM115
        case "zip":
            file = cast(BinaryIO, stack.enter_context(_only_member(path, raw, stack)))
        case _:
            raise InputError(f"{shown(path)} is {kind}, which is not read as text; unpack it or move it away")
    while chunk := file.read(CHUNK):
        yield chunk


def _only_member(path: epath.Path, raw: BinaryIO, stack: contextlib.ExitStack) -> Any:
    packed = stack.enter_context(zipfile.ZipFile(raw))
    names = [info.filename for info in packed.infolist() if not info.is_dir()]
    # macOS adds files of its own.
    names = [n for n in names if not n.startswith("__MACOSX/") and not n.rpartition("/")[2].startswith(".")]
    if len(names) != 1:
        raise InputError(f"{shown(path)} holds {len(names)} files, not one; unpack it")
    if Path(names[0].lower()).suffix in JSON_LINES and unpacked_suffix(path.name) not in JSON_LINES:
        raise InputError(
            f"{shown(path)} holds the table {shown(names[0])}; unpack it, or let its name end with .jsonl.zip"
        )
    return packed.open(names[0])


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """One frame after the other: a plain reader takes a truncated one for the end."""
    zstandard = optional.load("zstandard")
    # The window of `zstd --long=31`.
    begin = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    frame = begin()
    try:
        while packed := raw.read(CHUNK):
            while packed:
                if frame.eof:
                    frame = begin()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from error
    if not frame.eof:
        raise EOFError("it ends within a frame")


def lines(file: File, meter: Meter) -> Iterator[bytes]:
    """The lines of a file, without their ends; in linear time, however long a line is."""
    rest: list[bytes] = []
    for chunk in chunks(file, meter):
        first, *more = chunk.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    last = b"".join(rest)
    if last:
        yield last


def hashes(files: Sequence[File], n_thread: int) -> tuple[bytes, int]:
    """The lines that sha256sum writes, and the total bytes. InputError: a file cannot be read."""

    def hashed(file: File) -> tuple[bytes, int]:
        meter = Meter()
        with reading(file.path), meter.open(file.path) as opened:
            digest = hashlib.file_digest(cast(Any, opened), "sha256").hexdigest()
        name = file.name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        mark = "\\" if name != file.name else ""
        return os.fsencode(f"{mark}{digest}  {name}\n"), meter.n_byte

    with ThreadPoolExecutor(n_thread) as pool:
        results = list(pool.map(hashed, files))
    return b"".join(line for line, _ in results), sum(n_byte for _, n_byte in results)
