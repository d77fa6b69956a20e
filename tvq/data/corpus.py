"""The text of a run as memory-mapped tokens, prepared at first use and reused later."""

import dataclasses
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

from tvq import config, paths
from tvq.data import files, prepared, texts, walk
from tvq.data.documents import HASHED
from tvq.data.files import Meter
from tvq.data.vocabulary import ByteVocabulary, Vocabulary, describe
from tvq.errors import InputError

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """An opened prepared folder: plain values, so it pickles in a few hundred bytes plus its vocabulary."""

    folder: epath.Path
    vocabulary: Vocabulary
    image_size: int
    source: dict[str, Any]
    splits: dict[str, prepared.Split]

    @property
    def parts(self) -> tuple["Corpus", ...]:
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens in the same splits, wherever they are stored."""
        return hashlib.sha256("".join(info.sha256 for info in self.splits.values()).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Of the text to train on."""
        return self.splits["train"].n_byte / self.splits["train"].n_token

    def info(self, split: str) -> prepared.Split:
        """Counts of a split. InputError: it is empty."""
        info = self.splits[split]
        if info.is_empty:
            remedy = (
                "config.data.path needs more files (a file's name decides its split) or a longer file"
                if self.source.get("name") == "text"
                else "prepare it from more text"
            )
            raise InputError(f"config.data: the {split} split of {self.folder} is empty; {remedy}")
        return info

    def tokens_path(self, split: str) -> epath.Path:
        return prepared.tokens_path(self.folder, split)

    def tokens(self, split: str) -> np.memmap:
        """uint16 [n_token], newly mapped at each call, of a local folder. InputError: the split is empty."""
        n_token = self.info(split).n_token
        return np.memmap(self.tokens_path(split), prepared.DTYPE, mode="r", shape=(n_token,))

    def documents(self, split: str) -> np.ndarray:
        """uint64 [n_document, 3]: the tokens, bytes and words up to the end of each document."""
        raw = prepared.index_path(self.folder, split).read_bytes()
        return np.frombuffer(raw, prepared.INDEX_DTYPE).reshape(-1, 3)

    def reader(self, split: str) -> Callable[[Sequence[Span]], list[np.ndarray]]:
        """Reads spans `(start, stop)` of the tokens: from a memory map, or only those ranges of a bucket."""
        self.info(split)
        if not files.is_bucket(self.folder):
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
class Mixture:
    """Several prepared folders with their shares of the training sequences; evaluation reads all of each."""

    parts: tuple[Corpus, ...]
    weights: tuple[float, ...]

    @property
    def folder(self) -> str:
        """For messages."""
        shares = zip(self.parts, self.weights, strict=True)
        return ", ".join(f"{part.folder} ({weight:.3g})" for part, weight in shares)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.parts[0].vocabulary

    @property
    def image_size(self) -> int:
        return self.parts[0].image_size

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens with the same shares."""
        shares = [[part.fingerprint, weight] for part, weight in zip(self.parts, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(shares).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """Of the text to train on."""
        return sum(w * part.bytes_per_token for part, w in zip(self.parts, self.weights, strict=True))

    def info(self, split: str) -> prepared.Split:
        """Counts of a split of all folders together. InputError: it is empty in all."""
        infos = [part.splits[split] for part in self.parts]
        if all(info.is_empty for info in infos):
            raise InputError(f"config.data.mix: the {split} split of {self.folder} is empty; use another")
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


AnyCorpus = Corpus | Mixture


def open_mixture(text: str) -> Mixture:
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
    parts = tuple(
        _open(_folder("config.data.mix", folder), "config.data.mix", "prepare it again") for folder in folders
    )
    for part in parts:
        ours, theirs = describe(part.vocabulary), describe(parts[0].vocabulary)
        if (ours, part.image_size) != (theirs, parts[0].image_size):
            raise InputError(
                f"config.data.mix: {parts[0].folder} and {part.folder} have the vocabularies {theirs} and"
                f" {ours}; prepare one of them again, with the other's --model"
            )
    return Mixture(parts=parts, weights=tuple(weight / sum(weights) for weight in weights))


def _folder(field: str, name: str) -> epath.Path:
    return epath.Path(paths.expand(field, name))


def open_corpus(data: config.Data) -> AnyCorpus:
    """Opens and checks what `data` names, by its hashes; a source of text is prepared into the cache first.

    InputError: it is missing, unreadable, damaged, of a newer format, or has nothing to train on.
    """
    if data.mix:
        return open_mixture(data.mix)
    if data.source == "tokens":
        remedy = "prepare it again (tvq prepare), or use config.data.source=text for plain text"
        return _open(_folder("config.data.path", data.path), "config.data.path", remedy)
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
    corpus = _open(epath.Path(folder), "config.data.cache", "delete this folder, it is then made again")
    left_out = {"left_out": listed.left_out} if listed.left_out else {}
    return dataclasses.replace(corpus, source=corpus.source | left_out)


def _listed(data: config.Data) -> tuple[walk.Walk, bool]:
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


def cache_folder(data: config.Data) -> Path:
    """`data.cache`, or tvq's folder in the user's cache."""
    if data.cache:
        return Path(paths.expand("config.data.cache", data.cache))
    return paths.cache_folder()


def _open(folder: epath.Path, field: str, remedy: str) -> Corpus:
    where = f"{field}: {folder}"
    manifest = prepared.read(folder, where, remedy)
    if manifest.splits["train"].is_empty:
        raise InputError(f"{where} has an empty train split; {remedy}")
    return Corpus(
        folder=folder,
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
    folder: Path, made_of: texts.Texts | texts.OneText, data: config.Data, vocabulary: Vocabulary
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
