"""The prepared folder: `manifest.json`, and for each split `<split>.tokens`, bare little-endian uint16.

Every document ends with the end id.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tvq.data.documents import SPLITS, Document
from tvq.data.vocabulary import END, VOCABULARIES, Vocabulary

VERSION = 1
DTYPE = np.dtype("<u2")
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """What a prepared folder says of one split.

    `n_byte` counts the original text, without end ids; `gzip_bytes` is what gzip -9 makes of that text (None
    for train); `sha256` is that of the token file.
    """

    n_token: int
    n_document: int
    n_byte: int
    sha256: str
    gzip_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    vocabulary: Vocabulary
    source: dict[str, Any]
    splits: dict[str, Split]


def tokens_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.tokens"


class _Writer:
    """Writes the tokens of one split and keeps its counts; memory does not grow with the text."""

    def __init__(self, file: BinaryIO, vocabulary: Vocabulary, *, gzip: bool) -> None:
        self._file, self._vocabulary = file, vocabulary
        self._sha256 = hashlib.sha256()
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS) if gzip else None
        self._n_token = self._n_document = self._n_byte = self._gzip_bytes = 0

    def _write(self, ids: np.ndarray) -> None:
        raw = ids.astype(DTYPE).tobytes()
        self._file.write(raw)
        self._sha256.update(raw)
        self._n_token += len(ids)

    def add(self, document: Document) -> None:
        for chunk in document.chunks():
            self._write(self._vocabulary.encode(chunk))
            self._n_byte += len(chunk)
            if self._gzip:
                self._gzip_bytes += len(self._gzip.compress(chunk))
        self._write(np.array([END]))
        self._n_document += 1

    def finish(self) -> Split:
        if self._gzip:
            self._gzip_bytes += len(self._gzip.flush())
        return Split(
            n_token=self._n_token,
            n_document=self._n_document,
            n_byte=self._n_byte,
            sha256=self._sha256.hexdigest(),
            gzip_bytes=self._gzip_bytes if self._gzip else None,
        )


def write(
    folder: Path, documents: Iterable[Document], vocabulary: Vocabulary, source: dict[str, Any]
) -> None:
    """Fills an existing empty folder. `source` (JSON values) says where the documents came from.

    ValueError: a document cannot be read. OSError: the folder cannot be written.
    """
    splits = {}
    by_split: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        by_split[document.split].append(document)
    for split in SPLITS:
        with tokens_path(folder, split).open("wb") as file:
            writer = _Writer(file, vocabulary, gzip=split != "train")
            for document in by_split[split]:
                writer.add(document)
            splits[split] = dataclasses.asdict(writer.finish())
    manifest = {
        "version": VERSION,
        "vocabulary": {"name": vocabulary.name, "size": vocabulary.size},
        "source": source,
        "splits": splits,
    }
    # Last, so that a folder with a manifest is whole.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read(folder: Path, where: str, remedy: str) -> Manifest:
    """The manifest, checked against the sizes of the token files; their contents are not read.

    `where` names the config field and the folder, `remedy` the way out, for the messages. ValueError: not a
    prepared folder, damaged, of a newer version, or of an unknown vocabulary.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] > VERSION:
            raise ValueError(
                f"{where} has format version {manifest['version']}, this tvq reads up to {VERSION};"
                f" update tvq, or {remedy}"
            )
        vocabulary = _vocabulary(f"{where} was made with", remedy, **manifest["vocabulary"])
        splits = {split: Split(**manifest["splits"][split]) for split in SPLITS}
        source = manifest["source"]
    except OSError as error:
        raise ValueError(
            f"{where} is not a prepared folder: cannot read {MANIFEST} ({error.strerror}); {remedy}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has a damaged {MANIFEST} ({error!r}); {remedy}") from error
    for split, info in splits.items():
        path, wanted = tokens_path(folder, split), info.n_token * DTYPE.itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != wanted:
            raise ValueError(
                f"{where} is damaged: {path.name} has {size} bytes, its manifest says {wanted}; {remedy}"
            )
    return Manifest(vocabulary=vocabulary, source=source, splits=splits)


def _vocabulary(made_with: str, remedy: str, name: str, size: int) -> Vocabulary:
    if name not in VOCABULARIES:
        known = ", ".join(VOCABULARIES)
        raise ValueError(
            f"{made_with} the vocabulary {name!r}, this tvq knows {known}; update tvq, or {remedy}"
        )
    vocabulary = VOCABULARIES[name]()
    if vocabulary.size != size:
        raise ValueError(f"{made_with} {size} ids of {name!r}, which has {vocabulary.size}; {remedy}")
    return vocabulary
