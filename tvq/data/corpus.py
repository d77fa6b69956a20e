"""The text of a run as memory-mapped tokens, prepared at first use and found again later."""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tvq import config
from tvq.data import documents, prepared
from tvq.data.documents import Document
from tvq.data.vocabulary import ByteVocabulary, Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """An opened prepared folder: plain values, so it pickles in a few hundred bytes."""

    folder: Path
    vocabulary: Vocabulary
    source: dict[str, Any]
    splits: dict[str, prepared.Split]

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens in the same splits, wherever they lie."""
        return hashlib.sha256("".join(info.sha256 for info in self.splits.values()).encode()).hexdigest()

    def info(self, split: str) -> prepared.Split:
        """Counts of a split. ValueError: it is empty."""
        info = self.splits[split]
        if not info.n_token:
            way_out = (
                "config.data.path needs more files (a file's name decides its split) or a longer file"
                if self.source.get("name") == "text"
                else "prepare it from more text"
            )
            raise ValueError(f"config.data: the {split} split of {self.folder} is empty; {way_out}")
        return info

    def tokens_path(self, split: str) -> Path:
        return prepared.tokens_path(self.folder, split)

    def tokens(self, split: str) -> np.memmap:
        """uint16 [n_token], mapped anew at each call. ValueError: the split is empty."""
        n_token = self.info(split).n_token
        return np.memmap(self.tokens_path(split), prepared.DTYPE, mode="r", shape=(n_token,))


def open_corpus(data: config.Data) -> Corpus:
    """Opens what `data` names, in constant time; a source of text is prepared into the cache first.

    ValueError: nothing is there, it is unreadable, damaged, of a newer format, or has nothing to train on.
    """
    if data.source == "tokens":
        remedy = "prepare it again, or use config.data.source=text for plain text"
        return _open(Path(data.path).expanduser(), "config.data.path", remedy)
    found = documents.find(data)
    source = {"name": data.source, "path": data.path, "n_file": len({document.path for document in found})}
    if data.source == "stdlib":
        source["python"] = sys.version.split()[0]
    vocabulary = ByteVocabulary()
    folder = cache_folder(data) / _key(found, vocabulary)
    if not folder.exists():
        try:
            _prepare(folder, found, vocabulary, source)
        except OSError as error:
            raise ValueError(
                f"config.data.cache: cannot write {folder} ({error.strerror}); choose another folder"
            ) from error
    return _open(folder, "config.data.cache", "delete this folder and it is made again")


def cache_folder(data: config.Data) -> Path:
    """`data.cache`, or tvq's folder in the user's cache."""
    if data.cache:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tvq"


def _open(folder: Path, field: str, remedy: str) -> Corpus:
    where = f"{field}: {folder}"
    manifest = prepared.read(folder, where, remedy)
    if not manifest.splits["train"].n_token:
        raise ValueError(f"{where} has an empty train split; {remedy}")
    return Corpus(
        folder=folder, vocabulary=manifest.vocabulary, source=manifest.source, splits=manifest.splits
    )


def _key(found: list[Document], vocabulary: Vocabulary) -> str:
    """Names the prepared folder after all that decides its contents."""
    key = hashlib.sha256(
        json.dumps([prepared.VERSION, documents.SPLIT_RULE, vocabulary.name, vocabulary.size]).encode()
    )
    for document in found:
        span = json.dumps([document.split, document.start, document.stop, document.mtime_ns])
        key.update(os.fsencode(document.path) + b"\0" + span.encode() + b"\0")
    return key.hexdigest()[:32]


def _prepare(folder: Path, found: list[Document], vocabulary: Vocabulary, source: dict[str, Any]) -> None:
    """Makes `folder` whole or not at all. Of processes that make it at once the first to finish wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="preparing-", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)
        made.mkdir()
        prepared.write(made, found, vocabulary, source)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
