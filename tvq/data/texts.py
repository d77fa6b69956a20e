"""Sources of text for `tvq prepare`: enwik8, PG-19, and any file, folder or table."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator

from etils import epath

from tvq.data import files, optional, prepared
from tvq.data.documents import SPLITS, Piece, hashed_split
from tvq.data.files import Meter
from tvq.errors import InputError

TABLES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ENWIK8_BYTES = 100_000_000
ENWIK8_TRAIN = 90_000_000
ENWIK8_SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"  # mattmahoney.net/dc/textdata.html
PIECE = 1 << 14  # SentencePiece is slower on longer text
SPACE = re.compile(rb"[ \n\t\r]")
NAMED, HASHED, CUT = (
    "by the name of the folder or file: train, val..., test",
    "98/1/1 % by sha256 of the name, and of the row of a table",
    "train, validation and test end at bytes {}, {} and {}",
)


class Texts:
    """Documents of text: `rule` says how they are split, `files` what was read."""

    def __init__(self, root: epath.Path, column: str, *, named: bool) -> None:
        """The files below `root`; rows of tables have their text in `column`.

        `named` demands that names tell the splits. InputError: there are no files, or no names that tell.
        """
        self.root, self.column = root, column
        names = {path: files.name_of(path, root) for path in files.below(root)}
        if named:
            # Lists of the files may lie beside their folders.
            names = {path: n for path, n in names.items() if "/" in n or path.name.endswith(TABLES)}
            names = {path: name for path, name in names.items() if named_split(name)}
            if {named_split(name) for name in names.values()} != set(SPLITS):
                raise InputError(
                    f"--input: {root} needs folders or tables whose names begin with train, val and test"
                )
        self.files = list(names)
        self._named = all(named_split(name) for name in names.values())
        self.rule = NAMED if self._named else HASHED

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """All documents, those of a split in order. InputError: a file is unreadable."""
        for path in self.files:
            name = files.name_of(path, self.root)
            if path.name.endswith(TABLES):
                rows = _parquet if path.suffix == ".parquet" else _jsonl
                for i, text in enumerate(rows(path, self.column, meter)):
                    row = f"{name}:{i}"
                    yield Piece(self._split(name, row), row, text, last=True)
            else:
                split = self._split(name, name)
                for chunk in files.chunks(path, meter):
                    yield Piece(split, name, chunk, last=False)
                yield Piece(split, name, b"", last=True)

    def _split(self, name: str, document: str) -> str:
        return named_split(name) if self._named else hashed_split(document)


def named_split(name: str) -> str:
    """The split that the first folder with such a name, or else the file, tells; or nothing."""
    for part in name.lower().split("/"):
        for split in SPLITS:
            if part.startswith("val" if split == "validation" else split):
                return split
    return ""


class OneText:
    """A file whose bytes are split in order, one document a split."""

    def __init__(self, path: epath.Path, n_byte: int, n_train: int) -> None:
        """Of the `n_byte` bytes the first `n_train` train, the rest in halves validates and tests.

        InputError: that leaves nothing to train or to test on.
        """
        if not 0 < n_train < n_byte:
            raise InputError(f"--n_train={n_train} must be between 0 and the {n_byte} bytes of {path}")
        self.root, self.files = path, [path]
        ends = [n_train, n_train + (n_byte - n_train) // 2, n_byte]
        self._spans = list(zip(SPLITS, [0, *ends[:-1]], ends, strict=True))
        self.rule = CUT.format(*ends)

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """The three documents. InputError: the file is unreadable."""
        at = 0
        for chunk in files.chunks(self.root, meter):
            for split, start, end in self._spans:
                part = chunk[max(start - at, 0) : max(end - at, 0)]
                if part:
                    yield Piece(split, self.root.name, part, last=at + len(chunk) >= end)
            at += len(chunk)


def _measured(path: epath.Path) -> tuple[int, str]:
    """Bytes and SHA-1 of the contents."""
    n_byte, sha1 = 0, hashlib.sha1()
    for chunk in files.chunks(path, Meter()):
        n_byte += len(chunk)
        sha1.update(chunk)
    return n_byte, sha1.hexdigest()


def enwik8(path: epath.Path, n_train: int) -> OneText:
    """The first 90,000,000 bytes train, five million each validate and test.

    InputError: it is not enwik8, and no `n_train` says how to split another file.
    """
    n_byte, sha1 = _measured(path)
    if not n_train and (n_byte, sha1) != (ENWIK8_BYTES, ENWIK8_SHA1):
        raise InputError(
            f"--input: {path} holds {n_byte} bytes of SHA-1 {sha1}, enwik8 are {ENWIK8_BYTES}"
            f" of {ENWIK8_SHA1}; fetch it again, or say with --n_train how many bytes of another file train"
        )
    return OneText(path, n_byte, n_train or ENWIK8_TRAIN)


def text(path: epath.Path, column: str, n_train: int) -> Texts | OneText:
    """A folder, a table, or a file that is cut 90/5/5 % or after `n_train` bytes."""
    if path.is_dir() or path.name.endswith(TABLES):
        if n_train:
            raise InputError(
                f"--n_train={n_train} counts bytes of one file, but {path} is a folder or a table"
            )
        return Texts(path, column, named=False)
    n_byte, _ = _measured(path)
    return OneText(path, n_byte, n_train or n_byte * 90 // 100)


def _jsonl(path: epath.Path, column: str, meter: Meter) -> Iterator[bytes]:
    for number, line in enumerate(files.lines(path, meter), 1):
        where = f"--input: line {number} of {path}"
        try:
            row = json.loads(line)
            value = row[column]
            yield value.encode()
        except (ValueError, TypeError, AttributeError) as error:  # UnicodeError is a ValueError
            raise InputError(f"{where} has no text in {column!r} ({error}); mend it") from error
        except KeyError as error:
            raise InputError(f"{where} has no column {column!r}, it has {list(row)}; use --column") from error


def _parquet(path: epath.Path, column: str, meter: Meter) -> Iterator[bytes]:
    parquet = optional.load("pyarrow.parquet")
    with meter.open(path) as raw:
        try:
            table = parquet.ParquetFile(raw)
            names = table.schema_arrow.names
            if column in names:
                for batch in table.iter_batches(batch_size=16, columns=[column]):
                    yield from (value.encode() for value in batch.column(0).to_pylist())
        except (ValueError, OSError, AttributeError) as error:
            raise InputError(f"--input: {path} is no table with text in {column!r} ({error})") from error
        if column not in names:
            raise InputError(f"--input: {path} has no column {column!r}, it has {names}; use --column")


def at_spaces(pieces: Iterable[Piece], size: int = PIECE) -> Iterator[Piece]:
    """The same documents in pieces of a little over `size` bytes, cut at white space alone."""
    rest = b""
    for piece in pieces:
        raw, start = rest + piece.raw, 0
        while (space := SPACE.search(raw, start + size)) is not None:
            yield piece._replace(raw=raw[start : space.start()], last=False)
            start = space.start()
        rest = raw[start:]
        if piece.last:
            yield piece._replace(raw=rest)
            rest = b""


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
