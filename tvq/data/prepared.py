"""The prepared folder: text or images as tokens, written once and read by every run.

manifest.json        format version, vocabulary, source, and the counts of each split
<split>.tokens       bare little-endian uint16
<split>.documents    little-endian uint64 [n_document, 3]: tokens, bytes and words up to a document's end
vocabulary.model     the SentencePiece model, if there is one
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
from tvq.data.files import is_bucket, shown
from tvq.data.splits import SPLITS, Piece
from tvq.data.vocabulary import END, UNKNOWN, VOCABULARIES, ByteVocabulary, Vocabulary, describe
from tvq.errors import InputError

VERSION = 2
# Token files of up to this size are hashed whole whenever they are opened, seconds at most; of larger ones
# only the evenly spaced blocks below, which detects other tokens but not a few changed ones.
HASHED_WHOLE = 4 << 30
WARN_UNKNOWN = 0.001  # of all tokens
N_BLOCK, BLOCK = 1024, 1 << 16
DTYPE = np.dtype("<u2")
INDEX_DTYPE = np.dtype("<u8")
MANIFEST, MODEL, SOURCES = "manifest.json", "vocabulary.model", "sources.sha256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """What a prepared folder says of one split.

    `n_byte` counts the original text or the values of the images, without end ids; `n_word` the words of the
    text, as `wc -w` does (0 for images); `gzip_bytes` is what gzip -9 makes of the text (None for train, and
    for images); `sha256` is that of the token file, `index_sha256` of the documents', `blocks_sha256` of some
    blocks of a large token file; `n_unknown` tokens stand for what the vocabulary has no pieces for. Older
    folders do not have the last three: None.
    """

    n_token: int
    n_document: int
    n_byte: int
    n_word: int
    sha256: str
    gzip_bytes: int | None
    n_unknown: int | None = None
    index_sha256: str | None = None
    blocks_sha256: str | None = None

    @property
    def is_empty(self) -> bool:
        """End ids alone count as nothing, and so does text that leaves no token."""
        return not (self.n_byte and self.n_token)


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
    """The ids of text. InputError: the vocabulary needs UTF-8 and this is not."""
    try:
        return vocabulary.encode(piece.raw)
    except UnicodeDecodeError as error:
        raise not_utf8(piece, error) from error


def not_utf8(piece: Piece, error: UnicodeDecodeError) -> InputError:
    n_wrong = piece.raw.decode(errors="replace").count("\ufffd") - piece.raw.count("\ufffd".encode())
    utf16 = " (it begins as UTF-16 does)" if piece.raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return InputError(
        f"{shown(piece.document)} is not UTF-8{utf16}: {n_wrong} invalid places, the first after"
        f" {piece.raw[: error.start][-20:]!r}; fix it, or use --vocabulary=bytes"
    )


def unknown(info: Split) -> str:
    """A warning about tokens for text that no piece covers, if they are many; otherwise nothing."""
    if not info.n_unknown or info.n_unknown < WARN_UNKNOWN * info.n_token:
        return ""
    return (
        f"{info.n_unknown:,} tokens, {100 * info.n_unknown / info.n_token:.2g} %, are the unknown piece:"
        " their text is lost, and losses look better than they are"
    )


def tokens_path(folder: epath.Path, split: str) -> epath.Path:
    return folder / f"{split}.tokens"


def index_path(folder: epath.Path, split: str) -> epath.Path:
    return folder / f"{split}.documents"


class _Words:
    """Counts the runs of bytes other than ASCII white space in a text that comes in pieces."""

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
        self._path = tokens_path(folder, split)
        self._tokens = files.enter_context(self._path.open("wb"))
        self._index = files.enter_context(index_path(folder, split).open("wb"))
        self._form, self._is_text = form, not form.image_size
        self._sha256, self._index_sha256, self._words = hashlib.sha256(), hashlib.sha256(), _Words()
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._zips = self._is_text and split != "train"
        self._n_token = self._n_document = self._gzip_bytes = self._n_unknown = 0
        self.n_byte = 0

    def _write(self, ids: np.ndarray) -> None:
        raw = ids.astype(DTYPE, copy=False).tobytes()
        self._tokens.write(raw)
        self._sha256.update(raw)
        self._n_token += len(ids)

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        self._write(ids)
        self._n_unknown += int(np.count_nonzero(ids == UNKNOWN))
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
            row = np.array([self._n_token, self.n_byte, self._words.count], INDEX_DTYPE).tobytes()
            self._index.write(row)
            self._index_sha256.update(row)

    def finish(self) -> Split:
        """The counts, once the files are closed."""
        n_byte = self._n_token * DTYPE.itemsize
        return Split(
            n_token=self._n_token,
            n_document=self._n_document,
            n_byte=self.n_byte,
            n_word=self._words.count,
            sha256=self._sha256.hexdigest(),
            gzip_bytes=self._gzip_bytes + len(self._gzip.flush()) if self._zips else None,
            n_unknown=self._n_unknown,
            index_sha256=self._index_sha256.hexdigest(),
            blocks_sha256=_hash_of_blocks(self._path, n_byte) if n_byte > HASHED_WHOLE else None,
        )


def _hash_of_blocks(path: epath.Path, n_byte: int) -> str:
    """SHA-256 of blocks from the first to the last, of a file that is larger than all of them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(N_BLOCK):
            file.seek(i * (n_byte - BLOCK) // (N_BLOCK - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def write(
    folder: epath.Path,
    pieces: Iterable[Piece],
    form: Form,
    source: dict[str, Any],
    *,
    n_thread: int = 0,
    progress: Callable[[int], Any] = lambda n_byte: None,
) -> dict[str, Split]:
    """Fills an existing empty folder, `n_thread` pieces at a time; 0 encodes in this thread.

    The pieces of a document follow one another. `source` (JSON values) says where they came from. `progress`
    is called with the bytes so far. InputError: a document cannot be read. OSError: the folder cannot be
    written.
    """
    with ExitStack() as files:
        writers = {split: _Writer(folder, split, form, files) for split in SPLITS}
        for piece, ids in _encoded(pieces, form.encode, n_thread):
            writers[piece.split].add(piece, ids)
            progress(sum(writer.n_byte for writer in writers.values()))
    splits = {split: writer.finish() for split, writer in writers.items()}
    if form.vocabulary.model:
        (folder / MODEL).write_bytes(form.vocabulary.model)
    manifest = {
        "version": VERSION,
        "vocabulary": describe(form.vocabulary),
        "image_size": form.image_size,
        "source": source,
        "splits": {split: dataclasses.asdict(info) for split, info in splits.items()},
    }
    # Last, so that a folder with a manifest is whole.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return splits


def check_train(splits: dict[str, Split]) -> None:
    """InputError: there is nothing to train on."""
    if splits["train"].is_empty:
        counts = ", ".join(f"{split} {info.n_byte}" for split, info in splits.items())
        n_document = sum(info.n_document for info in splits.values())
        raise InputError(
            f"the {n_document} documents hold no training text (bytes: {counts}); a file's name decides"
            " its split: add files, or give one file, which is cut 90/5/5 %"
        )


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
    """The manifest, checked against the files.

    `where` names the config field and the folder, `remedy` says how to fix it, for the messages. InputError:
    not a prepared folder, damaged, of another version, or of an unknown vocabulary.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            remedy = f"update tvq, or {remedy}" if manifest["version"] > VERSION else remedy
            raise InputError(
                f"{where} has format version {manifest['version']}, this tvq reads {VERSION}; {remedy}"
            )
        splits = {split: Split(**manifest["splits"][split]) for split in SPLITS}
        vocabulary = _vocabulary(folder, f"{where} was made with", remedy, **manifest["vocabulary"])
        for split, info in splits.items():
            _check_files(folder, split, info, f"{where} is damaged", remedy)
        return Manifest(
            vocabulary=vocabulary, image_size=manifest["image_size"], source=manifest["source"], splits=splits
        )
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{where} is not a prepared folder: cannot read {MANIFEST} ({error.strerror}); {remedy}"
        ) from error
    except Exception as error:  # whatever the file holds
        raise InputError(f"{where} has a damaged {MANIFEST} ({error!r}); {remedy}") from error


def _check_files(folder: epath.Path, split: str, info: Split, damaged: str, remedy: str) -> None:
    """InputError: the sizes, the end of the index, or, in a local folder, the contents differ."""
    tokens, index = tokens_path(folder, split), index_path(folder, split)
    wanted = {tokens: info.n_token * DTYPE.itemsize, index: info.n_document * 3 * INDEX_DTYPE.itemsize}
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
    if is_bucket(folder):
        return
    hashes = {index: (_hash, info.index_sha256), tokens: (_hash, info.sha256)}
    if wanted[tokens] > HASHED_WHOLE:
        hashes[tokens] = (lambda path: _hash_of_blocks(path, wanted[tokens]), info.blocks_sha256)
    for path, (hashed, known) in hashes.items():
        if known is not None and wanted[path] and (now := hashed(path)) != known:
            raise InputError(
                f"{damaged}: {path.name} has sha256 {now}, its manifest says {known}: its contents changed;"
                f" {remedy}"
            )


def _hash(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    actual = hashlib.sha256(model).hexdigest()
    if actual != sha256:
        raise InputError(f"{made_with} a {MODEL} of sha256 {sha256}, the one there has {actual}; {remedy}")
    vocabulary = VOCABULARIES[name](model)
    if vocabulary.size != size:
        raise InputError(f"{made_with} {size} ids of {name!r}, which has {vocabulary.size}; {remedy}")
    return vocabulary
