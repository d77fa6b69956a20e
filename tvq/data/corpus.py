"""The text of a run as memory-mapped tokens, prepared at first use and reused later."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from etils import epath

from tvq import paths, schema
from tvq.data import files, prepared, texts, walk
from tvq.data.files import Meter
from tvq.data.splits import HASHED
from tvq.data.vocabulary import ByteVocabulary, Vocabulary, describe
from tvq.errors import InputError

Span = tuple[int, int]
Reader = Callable[[Sequence[Span]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """An opened prepared folder: plain values, so it pickles in a few hundred bytes plus its vocabulary."""

    path: epath.Path
    vocabulary: Vocabulary
    image_size: int
    source: dict[str, Any]
    splits: dict[str, prepared.Split]

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens in the same splits, wherever they are stored."""
        return hashlib.sha256("".join(info.sha256 for info in self.splits.values()).encode()).hexdigest()

    def tokens_path(self, split: str) -> epath.Path:
        return prepared.tokens_path(self.path, split)

    def tokens(self, split: str) -> np.memmap:
        """uint16 [n_token], newly mapped at each call, of a local folder whose split is not empty."""
        n_token = self.splits[split].n_token
        return np.memmap(self.tokens_path(split), prepared.DTYPE, mode="r", shape=(n_token,))

    def documents(self, split: str) -> np.ndarray:
        """uint64 [n_document, 3]: the tokens, bytes and words up to the end of each document."""
        raw = prepared.index_path(self.path, split).read_bytes()
        return np.frombuffer(raw, prepared.INDEX_DTYPE).reshape(-1, 3)

    def reader(self, split: str) -> Reader:
        """Reads spans `(start, stop)` of the tokens: from a memory map, or only those ranges of a bucket."""
        if self.splits[split].is_empty:
            return lambda spans: [np.empty(0, prepared.DTYPE) for _ in spans]
        if not files.is_bucket(self.path):
            tokens = self.tokens(split)
            return lambda spans: [tokens[start:stop] for start, stop in spans]
        bucket, name = fsspec.core.url_to_fs(os.fspath(self.tokens_path(split)))
        size = prepared.DTYPE.itemsize

        def read(spans: Sequence[Span]) -> list[np.ndarray]:
            starts, stops = ([size * span[i] for span in spans] for i in (0, 1))
            parts = bucket.cat_ranges([name] * len(spans), starts, stops, on_error="raise")
            return [np.frombuffer(raw, prepared.DTYPE) for raw in parts]

        return read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """One or more prepared folders with their shares of the training sequences; all are evaluated whole."""

    folders: tuple[Folder, ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def where(self) -> str:
        """For messages."""
        if len(self.folders) == 1:
            return str(self.folders[0].path)
        shares = zip(self.folders, self.weights, strict=True)
        return ", ".join(f"{folder.path} ({weight:.3g})" for folder, weight in shares)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.folders[0].vocabulary

    @property
    def image_size(self) -> int:
        return self.folders[0].image_size

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens with the same shares."""
        if len(self.folders) == 1:
            return self.folders[0].fingerprint
        shares = [[f.fingerprint, weight] for f, weight in zip(self.folders, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(shares).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Of the text to train on."""
        trained = [folder.splits["train"] for folder in self.folders]
        return sum(w * info.n_byte / info.n_token for info, w in zip(trained, self.weights, strict=True))

    def info(self, split: str) -> prepared.Split:
        """Counts of a split, of all folders together. InputError: it is empty."""
        infos = [folder.splits[split] for folder in self.folders]
        if all(info.is_empty for info in infos):
            field, remedy = self._remedy()
            raise InputError(f"{field}: the {split} split of {self.where} is empty; {remedy}")
        if len(infos) == 1:
            return infos[0]
        zipped = [info.gzip_bytes for info in infos if info.gzip_bytes is not None]
        return prepared.Split(
            n_token=sum(info.n_token for info in infos),
            n_document=sum(info.n_document for info in infos),
            n_byte=sum(info.n_byte for info in infos),
            n_word=sum(info.n_word for info in infos),
            sha256=hashlib.sha256("".join(info.sha256 for info in infos).encode()).hexdigest(),
            gzip_bytes=sum(zipped) if len(zipped) == len(infos) else None,
            n_unknown=sum(info.n_unknown or 0 for info in infos),
        )

    def _remedy(self) -> tuple[str, str]:
        """Which field, and what fills an empty split."""
        if len(self.folders) > 1:
            return "config.data.mix", "use another"
        if self.folders[0].source.get("name") == "text":
            more = "config.data.path needs more files (a file's name decides its split) or a longer file"
            return "config.data", more
        return "config.data", "prepare it from more text"


class Tokens:
    """The tokens of a split, read folder by folder. Pickles without them."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.corpus, self.split = corpus, split

    @functools.cached_property
    def _readers(self) -> list[Reader]:
        return [folder.reader(self.split) for folder in self.corpus.folders]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def read(self, number: int, spans: Sequence[Span]) -> list[np.ndarray]:
        """The tokens of spans of one folder. InputError: one is outside the vocabulary."""
        folder, parts = self.corpus.folders[number], self._readers[number](spans)
        size = folder.vocabulary.size
        for (start, _), tokens in zip(spans, parts, strict=True):
            if tokens.max() >= size:
                at = int(np.argmax(tokens >= size))
                raise InputError(
                    f"config.data.path: token {start + at} of {folder.tokens_path(self.split)} is id"
                    f" {tokens[at]}, outside the vocabulary {folder.vocabulary.name!r} of {size} ids;"
                    " prepare the folder again, with this vocabulary"
                )
        return parts


def open_mixture(text: str) -> Corpus:
    """`FOLDER:WEIGHT,FOLDER:WEIGHT`; weights are scaled to add up to 1.

    InputError: it has another form, a folder cannot be opened, or their vocabularies differ.
    """
    folders, weights = [], []
    for item in text.split(","):
        folder, _, number = item.strip().rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not folder or not 0 < weight < math.inf:
            raise InputError(
                f"config.data.mix must be FOLDER:WEIGHT,FOLDER:WEIGHT with positive weights, not {item!r}"
            )
        folders.append(folder)
        weights.append(weight)
    opened = tuple(
        _open(_folder("config.data.mix", folder), "config.data.mix", "prepare it again") for folder in folders
    )
    for other in opened:
        ours, theirs = describe(other.vocabulary), describe(opened[0].vocabulary)
        if (ours, other.image_size) != (theirs, opened[0].image_size):
            raise InputError(
                f"config.data.mix: {opened[0].path} and {other.path} have the vocabularies {theirs} and"
                f" {ours}; prepare one of them again, with the other's --model"
            )
    return Corpus(folders=opened, weights=tuple(weight / sum(weights) for weight in weights))


def _folder(field: str, name: str) -> epath.Path:
    return epath.Path(paths.expand(field, name))


def open_corpus(data: schema.Data) -> Corpus:
    """Opens and checks what `data` names, by its hashes; a source of text is prepared into the cache first.

    InputError: it is missing, unreadable, damaged, of a newer format, or has nothing to train on.
    """
    if data.mix:
        return open_mixture(data.mix)
    if data.source == "tokens":
        remedy = "prepare it again (tvq prepare), or use config.data.source=text for plain text"
        return Corpus(folders=(_open(_folder("config.data.path", data.path), "config.data.path", remedy),))
    listed, is_file = _listed(data)
    vocabulary = ByteVocabulary()
    folder = cache_folder(data) / _key(listed, is_file, vocabulary)
    if not folder.exists():
        try:
            with files.naming("config.data.path"):
                source = texts.cut(listed.files[0]) if is_file else texts.Texts(listed.files, column="")
                _prepare(folder, source, data, vocabulary)
        except OSError as error:
            raise InputError(
                f"config.data.cache: cannot write {folder} ({error.strerror}); choose another folder"
            ) from error
    opened = _open(epath.Path(folder), "config.data.cache", "delete this folder, it is then made again")
    left_out = {"left_out": listed.left_out} if listed.left_out else {}
    return Corpus(folders=(dataclasses.replace(opened, source=opened.source | left_out),))


def _listed(data: schema.Data) -> tuple[walk.Walk, bool]:
    """The files of source stdlib or text, and whether it is one file. InputError: there are none."""
    if data.source == "stdlib":
        return texts.stdlib(), False
    root = Path(paths.expand("config.data.path", data.path))
    cache = cache_folder(data)
    with files.naming("config.data.path"), files.reading(root):
        is_file = root.is_file()
        # The cache depends on the path; that of a pipe leads nowhere.
        root = root.resolve() if is_file or root.is_dir() else root
        return walk.walk(epath.Path(root), leave_out=[cache]), is_file


def cache_folder(data: schema.Data) -> Path:
    """`data.cache`, or tvq's folder in the user's cache."""
    if data.cache:
        return Path(paths.expand("config.data.cache", data.cache))
    return paths.cache_folder()


def _open(folder: epath.Path, field: str, remedy: str) -> Folder:
    where = f"{field}: {folder}"
    manifest = prepared.read(folder, where, remedy)
    if manifest.splits["train"].is_empty:
        raise InputError(f"{where} has an empty train split; {remedy}")
    return Folder(
        path=folder,
        vocabulary=manifest.vocabulary,
        image_size=manifest.image_size,
        source=manifest.source,
        splits=manifest.splits,
    )


def _key(listed: walk.Walk, is_file: bool, vocabulary: Vocabulary) -> str:
    """Names the prepared folder by everything that determines its contents."""
    rule = texts.CUT if is_file else HASHED
    key = hashlib.sha256(json.dumps([prepared.VERSION, rule, vocabulary.name, vocabulary.size]).encode())
    for file in listed.files:
        key.update(os.fsencode(file.path) + b"\0" + json.dumps([file.size, file.mtime_ns]).encode() + b"\0")
    return key.hexdigest()[:32]


def _prepare(
    folder: Path, made_of: texts.Texts | texts.OneText, data: schema.Data, vocabulary: Vocabulary
) -> None:
    """Makes `folder` whole or not at all. If several processes make it at once, the first to finish wins."""
    source = {"name": data.source, "path": data.path, "n_file": len(made_of.files)}
    if data.source == "stdlib":
        source["python"] = sys.version.split()[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="preparing-", dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)
        made.mkdir()
        pieces = made_of.pieces(Meter())
        prepared.check_train(prepared.write(epath.Path(made), pieces, prepared.text_form(vocabulary), source))
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
