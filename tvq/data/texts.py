"""Sources of text: enwik8, PG-19, any file, folder or table, and the source of Python's standard library."""

import hashlib
import json
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator

from etils import epath

from tvq.data import files, optional, prepared, walk
from tvq.data.files import JSON_LINES, File, Meter, shown
from tvq.data.splits import HASHED, NAMED, SIDE, SPLITS, Piece, hashed_split, named_split, told_splits
from tvq.errors import InputError

ENWIK8_BYTES = 100_000_000
ENWIK8_TRAIN = 90_000_000
ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"  # mattmahoney.net/dc/textdata.html
PIECE = 1 << 14  # SentencePiece is slower on longer text
SPACE = re.compile(rb"[ \n\t\r]")
CUT = "train, validation and test end at bytes {}, {} and {}"
# The bytes of a UTF-8 character after its first.
BEHIND = re.compile(rb"[\x80-\xbf]{0,3}")
NOT_PYTHON = ("site-packages", "dist-packages", "__pycache__")


def is_table(name: str) -> bool:
    """Whether the rows of a file of that name are documents."""
    return files.unpacked_suffix(name) in JSON_LINES or name.lower().endswith(".parquet")


class Texts:
    """Documents of text, a file each or a row of a table.

    `rule` says how they are split, `files` are read, `left_out` holds pairs of a name and the reason.
    """

    def __init__(self, files: Collection[File], column: str, splits: dict[str, str] | None = None) -> None:
        """Rows of tables have their text in `column`; without one, tables are text like any other file.

        `splits` of the files by their names; without it a hash decides.
        """
        self._column, self._splits = column, splits
        self.files = [file for file in files if not splits or file.name in splits]
        self.left_out = [(file.name, SIDE) for file in files if splits and file.name not in splits]
        self.rule = NAMED if splits else HASHED

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """All documents, those of a split in order. InputError: a file is unreadable."""
        for file in self.files:
            if self._column and is_table(file.name):
                rows = _parquet if file.name.lower().endswith(".parquet") else _jsonl
                for i, text in enumerate(rows(file, self._column, meter)):
                    row = f"{file.name}:{i}"
                    yield Piece(self._split(file, row), row, text, last=True)
            else:
                split = self._split(file, file.name)
                for chunk in files.chunks(file, meter):
                    yield Piece(split, file.name, chunk, last=False)
                yield Piece(split, file.name, b"", last=True)

    def _split(self, file: File, document: str) -> str:
        return self._splits[file.name] if self._splits else hashed_split(document)


class OneText:
    """A file whose bytes are split in order, one document for each split."""

    left_out: Collection[tuple[str, str]] = ()

    def __init__(self, file: File, n_byte: int, n_train: int, *, whole_letters: bool = False) -> None:
        """Of the `n_byte` bytes the first `n_train` train; half of the rest validates, half tests.

        With `whole_letters`, for a vocabulary of UTF-8, a split that would end within a character ends after
        it. InputError: that leaves nothing to train or to test on.
        """
        if not n_byte:
            raise InputError(f"{shown(file.path)} holds no text (0 bytes); give a file with text")
        if not 0 < n_train < n_byte:
            raise InputError(
                f"--n_train={n_train} must be between 0 and the {n_byte} bytes of {shown(file.path)}"
                if n_train
                else f"{shown(file.path)} holds {n_byte} bytes, too few to cut in three; give more"
            )
        self._file, self.files, self._whole_letters = file, [file], whole_letters
        self._ends = [n_train, n_train + (n_byte - n_train) // 2, n_byte]
        self.rule = CUT.format(*self._ends) + (", or after the character there" if whole_letters else "")

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """The documents, except empty ones. InputError: the file is unreadable."""
        parts, now = self._parts(meter), ""
        for split, raw in _at_letters(parts) if self._whole_letters else parts:
            if now not in ("", split):
                yield Piece(now, self._file.name, b"", last=True)
            now = split
            yield Piece(split, self._file.name, raw, last=False)
        if now:
            yield Piece(now, self._file.name, b"", last=True)

    def _parts(self, meter: Meter) -> Iterator[tuple[str, bytes]]:
        at, spans = 0, list(zip(SPLITS, [0, *self._ends[:-1]], self._ends, strict=True))
        for chunk in files.chunks(self._file, meter):
            for split, start, end in spans:
                part = chunk[max(start - at, 0) : max(end - at, 0)]
                if part:
                    yield split, part
            at += len(chunk)


def _at_letters(parts: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """The rest of a UTF-8 character goes to the split that it begins in."""
    now, left = "", 0
    for split, raw in parts:
        if now not in ("", split):
            n = len(BEHIND.match(raw)[0][:left])  # type: ignore[index]
            if n:
                yield now, raw[:n]
            left -= n
            if n == len(raw):
                continue
            raw = raw[n:]
        if now != split:
            now, left = split, 3
        yield split, raw


def _measured(file: File) -> tuple[int, str]:
    """Bytes and SHA-1 of the contents."""
    n_byte, sha1 = 0, hashlib.sha1()
    for chunk in files.chunks(file, Meter()):
        n_byte += len(chunk)
        sha1.update(chunk)
    return n_byte, sha1.hexdigest()


def enwik8(path: epath.Path, n_train: int, *, whole_letters: bool = False) -> OneText:
    """The first 90,000,000 bytes train, five million each validate and test.

    InputError: it is not enwik8, and no `n_train` says how to split another file.
    """
    file = walk.one(path)
    n_byte, sha1 = _measured(file)
    if not n_train and (n_byte, sha1) != (ENWIK8_BYTES, ENWIK8_SHA1):
        raise InputError(
            f"{shown(path)} holds {n_byte} bytes of SHA-1 {sha1}, enwik8 has {ENWIK8_BYTES}"
            f" of {ENWIK8_SHA1}; fetch it again, or say with --n_train how many bytes of another file train"
        )
    return OneText(file, n_byte, n_train or ENWIK8_TRAIN, whole_letters=whole_letters)


def pg19(root: epath.Path, column: str) -> Texts:
    """Folders or tables of the three splits. InputError: one is missing."""
    listed = walk.walk(root).files
    # Lists of the files may be beside their folders.
    splits = {file.name: named_split(file.name) for file in listed}
    splits = {name: split for name, split in splits.items() if split and ("/" in name or is_table(name))}
    if set(splits.values()) != set(SPLITS):
        raise InputError(f"{shown(root)} needs folders or tables whose names begin with train, val and test")
    return Texts(listed, column, splits)


def cut(file: File, n_train: int = 0, *, whole_letters: bool = False) -> OneText:
    """A file that is cut 90/5/5 %, or after `n_train` bytes."""
    n_byte, _ = _measured(file)
    return OneText(file, n_byte, n_train or n_byte * 90 // 100, whole_letters=whole_letters)


def text(
    path: epath.Path, column: str, n_train: int, choice: str = "", *, whole_letters: bool = False
) -> Texts | OneText:
    """A folder, a table, or a file that is cut 90/5/5 % or after `n_train` bytes."""
    with files.reading(path):
        in_parts = path.is_dir() or is_table(path.name)
    if not in_parts:
        if choice:
            raise InputError(f"--split={choice} is for a folder, but {shown(path)} is a file, cut in order")
        return cut(walk.one(path), n_train, whole_letters=whole_letters)
    if n_train:
        raise InputError(
            f"--n_train={n_train} counts bytes of one file, but {shown(path)} is a folder or a table"
        )
    listed = walk.walk(path)
    source = Texts(listed.files, column, told_splits([file.name for file in listed.files], choice))
    source.left_out += [(name, walk.OWN) for name in listed.left_out]
    return source


def stdlib() -> walk.Walk:
    """The source of Python's standard library, without installed packages."""
    root = epath.Path(sysconfig.get_path("stdlib"))
    listed = walk.walk(root, skip=NOT_PYTHON).files
    # By name, because another order would make other batches.
    return walk.Walk(sorted((f for f in listed if f.name.endswith(".py")), key=lambda f: f.name), [])


def _row(where: str, row: object, column: str) -> bytes:
    """The text of a row. InputError: it has none."""
    if not isinstance(row, dict):
        raise InputError(
            f"{where} has no text in {column!r}: it is of type {type(row).__name__}, not an object"
        )
    if column not in row:
        raise InputError(f"{where} has no column {column!r}, it has {list(row)}; use --column")
    return _encoded(where, row[column], column)


def _encoded(where: str, value: object, column: str) -> bytes:
    if not isinstance(value, str):
        what = "null" if value is None else f"a value of type {type(value).__name__}"
        raise InputError(f"{where} has no text in {column!r}, but {what}; fix it or leave it out")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has no text in {column!r} ({error}); fix it") from error


def _jsonl(file: File, column: str, meter: Meter) -> Iterator[bytes]:
    for number, line in enumerate(files.lines(file, meter), 1):
        if not line.strip():
            continue
        where = f"line {number} of {shown(file.path)}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
            raise InputError(f"{where} has no text in {column!r} ({error}); fix it") from error
        yield _row(where, row, column)


def _parquet(file: File, column: str, meter: Meter) -> Iterator[bytes]:
    parquet, n_row = optional.load("pyarrow.parquet"), 0
    with files.reading(file.path), meter.open(file.path) as raw:
        table = parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        if column not in names:
            raise InputError(f"{shown(file.path)} has no column {column!r}, it has {names}; use --column")
        for batch in table.iter_batches(batch_size=16, columns=[column]):
            for value in batch.column(0).to_pylist():
                n_row += 1
                yield _encoded(f"row {n_row} of {shown(file.path)}", value, column)


def at_spaces(pieces: Iterable[Piece], size: int = PIECE) -> Iterator[Piece]:
    """The same documents in pieces of a little over `size` bytes, cut only at white space."""
    rest, n_rest = list[bytes](), 0  # joined once, so that a text without spaces takes linear time
    for piece in pieces:
        raw, start = piece.raw, 0
        while (space := SPACE.search(raw, max(start + size - n_rest, start))) is not None:
            yield piece._replace(raw=b"".join([*rest, raw[start : space.start()]]), last=False)
            rest, n_rest, start = [], 0, space.start()
        rest.append(raw[start:])
        n_rest += len(rest[-1])
        if piece.last:
            yield piece._replace(raw=b"".join(rest))
            rest, n_rest = [], 0


def whole(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same documents, each in one piece."""
    return at_spaces(pieces, size=1 << 62)


def sentences(pieces: Iterable[Piece], n_byte: int) -> Iterator[str]:
    """The lines of the first `n_byte` bytes to train on. InputError: they are not UTF-8."""
    for piece in at_spaces(piece for piece in pieces if piece.split == "train"):
        try:
            yield from piece.raw.decode().split("\n")
        except UnicodeDecodeError as error:
            raise prepared.not_utf8(piece, error) from error
        n_byte -= len(piece.raw)
        if n_byte <= 0:
            return
