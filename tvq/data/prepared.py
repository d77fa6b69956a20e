"""The prepared folder: what a source of text or images has become, written once and read by every run.

manifest.json        format version, vocabulary, source, and the counts of each split
<split>.tokens       bare little-endian uint16
<split>.documents    little-endian uint64 [n_document, 3]: tokens, bytes and words up to a document's end
vocabulary.model     the SentencePiece model, where there is one
sources.sha256       the hashes of the files that it was made from, as sha256sum writes them
"""

import dataclasses
import hashlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from etils import epath

from tvq import paths
from tvq.data.documents import SPLITS, Piece
from tvq.data.vocabulary import END, VOCABULARIES, ByteVocabulary, Vocabulary, describe
from tvq.errors import InputError

VERSION = 2
DTYPE = np.dtype("<u2")
INDEX_DTYPE = np.dtype("<u8")
MANIFEST, MODEL, SOURCES = "manifest.json", "vocabulary.model", "sources.sha256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """What a prepared folder says of one split.

    `n_byte` counts the original text or the values of the images, without end ids; `n_word` the words of the
    text, as `wc -w` does (0 for images); `gzip_bytes` is what gzip -9 makes of the text (None for train, and
    for images); `sha256` is that of the token file.
    """

    n_token: int
    n_document: int
    n_byte: int
    n_word: int
    sha256: str
    gzip_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """`image_size`: documents are square images of that side, in raster order, channels last; 0: text."""

    vocabulary: Vocabulary
    image_size: int
    source: dict[str, Any]
    splits: dict[str, Split]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How raw pieces become tokens. `encode` may be called from several threads."""

    encode: Callable[[Piece], np.ndarray]
    vocabulary: Vocabulary = dataclasses.field(default_factory=ByteVocabulary)
    end_ids: bool = True  # each document ends with the end id
    image_size: int = 0


def text_form(vocabulary: Vocabulary, *, end_ids: bool = True) -> Form:
    """For pieces of text."""
    return Form(encode=lambda piece: encode_text(vocabulary, piece), vocabulary=vocabulary, end_ids=end_ids)


def encode_text(vocabulary: Vocabulary, piece: Piece) -> np.ndarray:
    """The ids of text. InputError: the vocabulary needs UTF-8 and this is something else."""
    try:
        return vocabulary.encode(piece.raw)
    except UnicodeDecodeError as error:
        raise not_utf8(piece, error) from error


def not_utf8(piece: Piece, error: UnicodeDecodeError) -> InputError:
    n_wrong = piece.raw.decode(errors="replace").count("\ufffd") - piece.raw.count("\ufffd".encode())
    return InputError(
        f"{piece.document} is not UTF-8: {n_wrong} wrong places, the first after"
        f" {piece.raw[: error.start][-20:]!r}; mend it, or use --vocabulary=bytes"
    )


def tokens_path(folder: epath.Path, split: str) -> epath.Path:
    return folder / f"{split}.tokens"


def index_path(folder: epath.Path, split: str) -> epath.Path:
    return folder / f"{split}.documents"


class _Words:
    """Counts the runs of other bytes than ASCII white space in a text that comes in pieces."""

    IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))

    def __init__(self) -> None:
        self.count, self._inside = 0, False

    def add(self, text: bytes) -> None:
        if text:
            space = self.IS_SPACE[np.frombuffer(text, np.uint8)]
            self.count += int(np.count_nonzero(space[:-1] & ~space[1:])) + (not space[0] and not self._inside)
            self._inside = not space[-1]

    def end(self) -> None:
        self._inside = False


class _Writer:
    """Writes one split and keeps its counts; memory does not grow with the text."""

    def __init__(self, folder: epath.Path, split: str, form: Form, files: ExitStack) -> None:
        self._tokens = files.enter_context(tokens_path(folder, split).open("wb"))
        self._index = files.enter_context(index_path(folder, split).open("wb"))
        self._form, self._is_text = form, not form.image_size
        self._sha256, self._words = hashlib.sha256(), _Words()
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._zips = self._is_text and split != "train"
        self._n_token = self._n_document = self._gzip_bytes = 0
        self.n_byte = 0

    def _write(self, ids: np.ndarray) -> None:
        raw = ids.astype(DTYPE, copy=False).tobytes()
        self._tokens.write(raw)
        self._sha256.update(raw)
        self._n_token += len(ids)

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        self._write(ids)
        self.n_byte += len(piece.raw) if self._is_text else len(ids)
        if self._is_text:
            self._words.add(piece.raw)
        if self._zips:
            self._gzip_bytes += len(self._gzip.compress(piece.raw))
        if piece.last:
            if self._form.end_ids:
                self._write(np.array([END]))
            self._n_document += 1
            self._words.end()
            row = np.array([self._n_token, self.n_byte, self._words.count], INDEX_DTYPE)
            self._index.write(row.tobytes())

    def finish(self) -> Split:
        return Split(
            n_token=self._n_token,
            n_document=self._n_document,
            n_byte=self.n_byte,
            n_word=self._words.count,
            sha256=self._sha256.hexdigest(),
            gzip_bytes=self._gzip_bytes + len(self._gzip.flush()) if self._zips else None,
        )


def write(
    folder: epath.Path,
    pieces: Iterable[Piece],
    form: Form,
    source: dict[str, Any],
    *,
    n_thread: int = 0,
    progress: Callable[[int], Any] = lambda n_byte: None,
) -> None:
    """Fills an existing empty folder, `n_thread` pieces at a time; 0 encodes in this thread.

    The pieces of a document follow one another. `source` (JSON values) says where they came from. `progress`
    hears the bytes so far. InputError: a document cannot be read. OSError: the folder cannot be written.
    """
    with ExitStack() as files:
        writers = {split: _Writer(folder, split, form, files) for split in SPLITS}
        for piece, ids in _encoded(pieces, form.encode, n_thread):
            writers[piece.split].add(piece, ids)
            progress(sum(writer.n_byte for writer in writers.values()))
        splits = {split: dataclasses.asdict(writer.finish()) for split, writer in writers.items()}
    if form.vocabulary.model:
        (folder / MODEL).write_bytes(form.vocabulary.model)
    manifest = {
        "version": VERSION,
        "vocabulary": describe(form.vocabulary),
        "image_size": form.image_size,
        "source": source,
        "splits": splits,
    }
    # Last, so that a folder with a manifest is whole.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _encoded(
    pieces: Iterable[Piece], encode: Callable[[Piece], np.ndarray], n_thread: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its ids, in order. Libraries that encode let other threads run."""
    if not n_thread:
        yield from ((piece, encode(piece)) for piece in pieces)
        return
    pool, waiting = ThreadPoolExecutor(n_thread), deque[tuple[Piece, Future]]()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(encode, piece)))
            if len(waiting) > 2 * n_thread:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read(folder: epath.Path, where: str, remedy: str) -> Manifest:
    """The manifest, checked against the sizes of the files and the end of the index; no token is read.

    `where` names the config field and the folder, `remedy` the way out, for the messages. InputError: not a
    prepared folder, damaged, of another version, or of an unknown vocabulary.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            way_out = f"update tvq, or {remedy}" if manifest["version"] > VERSION else remedy
            raise InputError(
                f"{where} has format version {manifest['version']}, this tvq reads {VERSION}; {way_out}"
            )
        splits = {split: Split(**manifest["splits"][split]) for split in SPLITS}
        vocabulary = _vocabulary(folder, f"{where} was made with", remedy, **manifest["vocabulary"])
        found = Manifest(
            vocabulary=vocabulary, image_size=manifest["image_size"], source=manifest["source"], splits=splits
        )
    except OSError as error:
        raise InputError(
            f"{where} is not a prepared folder: cannot read {MANIFEST} ({error.strerror}); {remedy}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{where} has a damaged {MANIFEST} ({error!r}); {remedy}") from error
    for split, info in splits.items():
        _check_files(folder, split, info, f"{where} is damaged", remedy)
    return found


def _check_files(folder: epath.Path, split: str, info: Split, damaged: str, remedy: str) -> None:
    index = index_path(folder, split)
    wanted = {
        tokens_path(folder, split): info.n_token * DTYPE.itemsize,
        index: info.n_document * 3 * INDEX_DTYPE.itemsize,
    }
    for path, n_byte in wanted.items():
        size = paths.size(path) if path.exists() else 0
        if size != n_byte:
            raise InputError(f"{damaged}: {path.name} has {size} bytes, its manifest says {n_byte}; {remedy}")
    if info.n_document:
        with index.open("rb") as file:
            file.seek(-3 * INDEX_DTYPE.itemsize, 2)
            last = np.frombuffer(file.read(), INDEX_DTYPE).tolist()
        if last != [info.n_token, info.n_byte, info.n_word]:
            raise InputError(
                f"{damaged}: {index.name} ends at token, byte and word {last}, its manifest says"
                f" {[info.n_token, info.n_byte, info.n_word]}; {remedy}"
            )


def _vocabulary(
    folder: epath.Path, made_with: str, remedy: str, name: str, size: int, sha256: str
) -> Vocabulary:
    if name not in VOCABULARIES:
        known = ", ".join(VOCABULARIES)
        raise InputError(
            f"{made_with} the vocabulary {name!r}, this tvq knows {known}; update tvq, or {remedy}"
        )
    path = folder / MODEL
    model = path.read_bytes() if path.exists() else b""
    found = hashlib.sha256(model).hexdigest()
    if found != sha256:
        raise InputError(f"{made_with} a {MODEL} of sha256 {sha256}, there is one of {found}; {remedy}")
    vocabulary = VOCABULARIES[name](model)
    if vocabulary.size != size:
        raise InputError(f"{made_with} {size} ids of {name!r}, which has {vocabulary.size}; {remedy}")
    return vocabulary
