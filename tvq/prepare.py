"""Preparing data: from the raw form that a user downloads to the folder that runs read."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from etils import epath

from tvq import metrics
from tvq.data import download, files, images, prepared, texts
from tvq.data.documents import Piece
from tvq.data.files import Meter
from tvq.data.prepared import Form
from tvq.data.vocabulary import (
    VOCABULARIES,
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    train_sentencepiece,
)
from tvq.errors import InputError
from tvq.schema import field

KINDS = {
    "enwik8": "enwik8.zip, .gz or unpacked",
    "pg19": "folders train, validation and test of .txt, or tables (jsonl, parquet) of those names",
    "imagenet64": "batch files (.npz, pickled) or folders of images whose names begin with train and val",
    "text": "a file, a folder of files, or tables; also .gz, .zst and .zip",
    "images": "a folder of images",
}
IMAGES = ("imagenet64", "images")
Source = texts.Texts | texts.OneText | images.Images | images.ImageNet64
EVERY = 0.25  # seconds between looks at the progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `tvq prepare` is told."""

    kind: str = field("text", "what the input is")
    input: str = field("", "the raw file or folder; with --download, where it goes")
    output: str = field("", "the folder to make")
    download: bool = field(False, "fetch the input first, if it is not there (enwik8, pg19)")
    url: str = field("", "where to fetch it from; empty: its public address")
    vocabulary: str = field("", "bytes or sentencepiece; empty: sentencepiece for pg19, otherwise bytes")
    model: str = field("", "a SentencePiece model to use; empty: one is trained on the training split")
    pieces: int = field(32_000, "pieces of the model to train", at_least=4)
    sample: int = field(
        1_000_000_000, "bytes of the training split to train it on, which must fit memory", at_least=1
    )
    column: str = field("text", "column or key of the text in tables")
    size: int = field(64, "pixels on a side that images are scaled and cut to", at_least=1)
    n_train: int = field(
        0,
        "bytes (enwik8, a file of text) or images (imagenet64) that train; 0: as published, 90 % of a file",
        at_least=0,
    )
    threads: int = field(0, "threads that encode; 0: one a core", at_least=0)


def prepare(options: Options) -> int:
    """Makes the folder whole or not at all, and prints what is in it.

    InputError: the input is wrong or the output cannot be written; nothing is left there then.
    """
    check(options)
    output, raw = epath.Path(options.output).expanduser(), epath.Path(options.input).expanduser()
    n_thread = options.threads or os.cpu_count() or 1
    with metrics.Console() as console:
        if options.download:
            fetch(options, raw, console)
        source = find(options, raw)
        console.progress("hashing the input", brief=True)
        hashes, n_raw = files.hashes(source.files, raw, n_thread)
        facts = {
            "name": options.kind,
            "split": source.rule,
            "n_file": len(source.files),
            "n_byte": n_raw,
            "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        }
        form = form_of(options, source, vocabulary_of(options, source, console))
        meter = Meter()
        pieces = cut(source.pieces(meter), form.vocabulary)
        began = time.monotonic()
        with whole_or_not(output) as folder:
            (folder / prepared.SOURCES).write_text(hashes)
            show = progress(console, meter, n_raw)
            prepared.write(folder, pieces, form, facts, n_thread=n_thread, progress=show)
        seconds = time.monotonic() - began
        console.progress("", brief=True)
        console.say(summary(output, seconds))
    return 0


def check(options: Options) -> None:
    """InputError: an option is impossible, or the output is there."""
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if isinstance(value, int) and value < f.metadata["at_least"]:
            raise InputError(f"--{f.name} must be at least {f.metadata['at_least']}, not {value}")
    if options.download and options.kind not in download.FETCH:
        raise InputError(f"--download can fetch {' and '.join(download.FETCH)}, not {options.kind}")
    if options.vocabulary not in ("", *VOCABULARIES):
        raise InputError(f"--vocabulary must be {' or '.join(VOCABULARIES)}, not {options.vocabulary!r}")
    if options.kind in IMAGES and (options.vocabulary == "sentencepiece" or options.model):
        raise InputError(f"--vocabulary of {options.kind} is bytes; leave --vocabulary and --model out")
    if options.model and options.vocabulary == "bytes":
        raise InputError("--model is for --vocabulary=sentencepiece, not for bytes; leave one of them out")
    output = epath.Path(options.output).expanduser()
    if (output / prepared.MANIFEST).exists() or (output.exists() and not is_bucket(output)):
        raise InputError(f"--output={output} is there already; use another folder, or remove it")


def is_bucket(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def fetch(options: Options, raw: epath.Path, console: metrics.Console) -> None:
    """Downloads the input. InputError: it cannot be fetched."""
    if is_bucket(raw):
        raise InputError(f"--download needs a local --input, not {raw}")
    rate = Rate()

    def show(done: int, total: int) -> None:
        if rate.due():
            console.progress(f"fetching: {rate.line(done, done, total)}", brief=True)

    url = options.url or download.URLS[options.kind]
    console.say(f"fetching {url} to {raw}")
    try:
        download.FETCH[options.kind](url.rstrip("/"), Path(raw), show)
    except OSError as error:
        raise InputError(f"--input: cannot write {raw} ({error.strerror}); use another place") from error


def find(options: Options, raw: epath.Path) -> Source:
    """The documents of the input. InputError: it is something else."""
    match options.kind:
        case "enwik8":
            return texts.enwik8(raw, options.n_train)
        case "pg19":
            return texts.Texts(raw, options.column, named=True)
        case "imagenet64":
            return images.ImageNet64(raw, options.n_train)
        case "images":
            return images.Images(raw)
    return texts.text(raw, options.column, options.n_train)


def vocabulary_of(options: Options, source: Source, console: metrics.Console) -> Vocabulary:
    """Bytes, a given model, or one that is trained. InputError: there is no such model."""
    default = "sentencepiece" if options.kind == "pg19" or options.model else "bytes"
    if (options.vocabulary or default) == "bytes":
        return ByteVocabulary()
    if options.model:
        path = epath.Path(options.model).expanduser()
        with files.explained(path):
            return SentencePieceVocabulary(path.read_bytes())
    console.progress(f"training {options.pieces:,} pieces", brief=True)
    return train_sentencepiece(texts.sentences(source.pieces(Meter()), options.sample), options.pieces)


def form_of(options: Options, source: Source, vocabulary: Vocabulary) -> Form:
    """How the pieces of the source become tokens."""
    if options.kind not in IMAGES:
        return prepared.text_form(vocabulary, end_ids=options.kind != "enwik8")
    size = options.size if options.kind == "images" else 64
    if isinstance(source, images.ImageNet64) and source.in_batches:
        encode = lambda piece: vocabulary.encode(piece.raw)
    else:
        fit = options.kind == "images"
        encode = lambda piece: vocabulary.encode(images.pixels(piece, size, fit=fit))
    return Form(encode=encode, vocabulary=vocabulary, end_ids=False, image_size=size)


def cut(pieces: Iterable[Piece], vocabulary: Vocabulary) -> Iterable[Piece]:
    """Pieces that the vocabulary makes the same tokens of as of the whole document."""
    if isinstance(vocabulary, SentencePieceVocabulary):
        return texts.at_spaces(pieces) if vocabulary.splits_at_spaces else texts.whole(pieces)
    return pieces


@contextlib.contextmanager
def whole_or_not(output: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill, which is `output` at the end or not at all. What a killed start left is removed.

    In a bucket it is `output` itself, which counts as nothing until it has a manifest. InputError: it
    cannot be written, or another process is at it.
    """
    making = output if is_bucket(output) else output.with_name(f"{output.name}.preparing")
    try:
        making.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if not is_bucket(output):
                locked(making, stack)
                stack.callback(shutil.rmtree, making, ignore_errors=True)
                for path in making.iterdir():
                    path.unlink()
            yield making
            if not is_bucket(output):
                making.rename(output)
    except OSError as error:
        raise InputError(
            f"--output: cannot write {output} ({error.strerror or error}); make room, or use another folder"
        ) from error


def locked(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    """Holds the folder until the stack is left, or the process is gone. InputError: another holds it."""
    number = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, number)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--output: another process is writing {folder}; wait for it, or stop it") from error


class Rate:
    """Lines of progress, not too many."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another line."""
        now = time.monotonic()
        if now - self._last < EVERY:
            return False
        self._last = now
        return True

    def line(self, n_byte: int, done: int, total: int) -> str:
        """Megabytes, and how fast they come; the time left if `done` of `total` are read."""
        seconds = time.monotonic() - self._began
        text = f"{n_byte / 1e6:,.1f} MB, {n_byte / 1e6 / seconds:,.1f} MB/s"
        if 0 < done < total:
            text += f", {metrics.duration(seconds * (total - done) / done)} left"
        return text


def progress(console: metrics.Console, meter: Meter, n_raw: int) -> Callable[[int], None]:
    """Shows how far a preparation is."""
    rate = Rate()

    def show(n_byte: int) -> None:
        if rate.due():
            console.progress(f"preparing: {rate.line(n_byte, meter.n_byte, n_raw)}", brief=True)

    return show


def summary(output: epath.Path, seconds: float) -> str:
    """What a folder holds, for the console."""
    manifest = prepared.read(output, f"--output: {output}", "prepare it again")
    n_byte = sum(info.n_byte for info in manifest.splits.values())
    rows = [
        f"{split:10} {info.n_token:,} tokens of {info.n_byte:,} bytes in {info.n_document:,} documents"
        for split, info in manifest.splits.items()
    ]
    rows.append(f"split      {manifest.source['split']}")
    rows.append(f"vocabulary {manifest.vocabulary.name}, {manifest.vocabulary.size:,} ids")
    rows.append(f"prepared   {output}, at {n_byte / 1e6 / seconds:,.1f} MB/s")
    return "\n".join(rows)
