"""Preparing data: from the raw files that a user downloads to the folder that runs read."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from tvq.data import download, files, images, prepared, texts, walk
from tvq.data.files import Meter
from tvq.data.prepared import Form
from tvq.data.splits import Piece
from tvq.data.vocabulary import (
    VOCABULARIES,
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    train_sentencepiece,
)
from tvq.errors import InputError
from tvq.run import metrics
from tvq.schema import Prepare as Options

IMAGES = ("imagenet64", "images")
Source = texts.Texts | texts.OneText | images.Images | images.ImageNet64
MAX_PIECES = 1 << 16
EVERY = 0.25  # seconds between progress lines


def start(**options: Any) -> int:
    """`tvq prepare`, with the options of the command line."""
    return prepare(Options(**options))


def prepare(options: Options) -> int:
    """Makes the folder whole or not at all, and prints what is in it.

    InputError: the input is wrong or the output cannot be written; then nothing is left there.
    """
    check(options)
    output, raw = epath.Path(options.output).expanduser(), epath.Path(options.input).expanduser()
    n_thread = options.threads or os.cpu_count() or 1
    given = given_model(options)
    with metrics.Console() as console:
        if options.download:
            fetch(options, raw, console)
        with files.naming("--input"):
            source = find(options, raw)
        check_column(options, source)
        with whole_or_not(output) as folder, files.naming("--input"):
            console.progress("hashing the input", brief=True)
            hashes, n_raw = files.hashes(source.files, n_thread)
            facts = {
                "name": options.kind,
                "split": source.rule,
                "n_file": len(source.files),
                "n_byte": n_raw,
                "sha256": hashlib.sha256(hashes).hexdigest(),
            }
            form = form_of(options, source, given or vocabulary_of(options, source, console))
            meter = Meter()
            pieces = cut(source.pieces(meter), form.vocabulary)
            began = time.monotonic()
            (folder / prepared.SOURCES).write_bytes(hashes)
            show = showing(console, "preparing")
            progress = lambda _: show(meter.n_byte, n_raw)
            splits = prepared.write(folder, pieces, form, facts, n_thread=n_thread, progress=progress)
            prepared.check_train(splits)
        seconds = time.monotonic() - began
        console.progress("", brief=True)
        console.say(summary(output, source, seconds))
    return 0


def check(options: Options) -> None:
    """InputError: an option is invalid or has no effect, or the output exists."""
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if isinstance(value, int) and value < f.metadata["at_least"]:
            raise InputError(f"--{f.name} must be at least {f.metadata['at_least']}, not {value}")
    if options.pieces > MAX_PIECES:
        raise InputError(
            f"--pieces must be at most {MAX_PIECES}, for tokens of 16 bits, not {options.pieces}"
        )
    if options.download and options.kind not in download.FETCH:
        raise InputError(f"--download can fetch {' and '.join(download.FETCH)}, not {options.kind}")
    if options.vocabulary not in ("", *VOCABULARIES):
        raise InputError(f"--vocabulary must be {' or '.join(VOCABULARIES)}, not {options.vocabulary!r}")
    if options.split not in ("", "names", "hash"):
        raise InputError(f"--split must be names or hash, not {options.split!r}")
    if options.kind in IMAGES and (options.vocabulary == "sentencepiece" or options.model):
        raise InputError(f"--vocabulary of {options.kind} is bytes; omit --vocabulary and --model")
    if options.model and options.vocabulary == "bytes":
        raise InputError("--model is for --vocabulary=sentencepiece, not for bytes; omit one of them")
    check_effect(options)
    output = epath.Path(options.output).expanduser()
    if (output / prepared.MANIFEST).exists() or (output.exists() and not files.is_bucket(output)):
        raise InputError(f"--output={output} already exists; use another folder, or remove it")


def check_effect(options: Options) -> None:
    """InputError: an option was set that has no effect."""
    kind, trains = options.kind, options.in_pieces and not options.model
    pieces = "a model is given with --model" if options.model else "the vocabulary is bytes"
    useless = {
        "url": not options.download and "nothing is fetched without --download",
        "pieces": not trains and f"{pieces}; it is for --vocabulary=sentencepiece without --model",
        "sample": not trains and f"{pieces}; it is for --vocabulary=sentencepiece without --model",
        "column": kind not in ("text", "pg19") and f"{kind} has no tables",
        "split": kind not in ("text", "images") and f"{kind} is split as published",
        "size": kind != "images" and "it is for images of any size (tvq prepare images)",
        "n_train": kind in ("pg19", "images") and f"{kind} is split by names",
    }
    for f in dataclasses.fields(options):
        reason = getattr(options, f.name) != f.default and useless.get(f.name)
        if reason:
            raise InputError(f"--{f.name} has no effect here: {reason}; omit it")


def check_column(options: Options, source: Source) -> None:
    """InputError: a column was given, but there is no table."""
    default = next(f.default for f in dataclasses.fields(options) if f.name == "column")
    if options.column != default and not any(texts.is_table(file.name) for file in source.files):
        raise InputError(
            f"--column={options.column} has no effect here: no file of {options.input} is a table"
            f" ({', '.join(files.JSON_LINES)}, compressed or not, or .parquet)"
        )


def fetch(options: Options, raw: epath.Path, console: metrics.Console) -> None:
    """Downloads the input. InputError: it cannot be fetched."""
    if files.is_bucket(raw):
        raise InputError(f"--download needs a local --input, not {raw}")
    url = options.url or download.URLS[options.kind]
    console.say(f"fetching {url} to {raw}")
    try:
        download.FETCH[options.kind](url.rstrip("/"), Path(raw), showing(console, "fetching"))
    except OSError as error:
        raise InputError(f"--input: cannot write {raw} ({error.strerror}); use another place") from error


def find(options: Options, raw: epath.Path) -> Source:
    """The documents of the input. InputError: it is not of that kind."""
    match options.kind:
        case "enwik8":
            return texts.enwik8(raw, options.n_train, whole_letters=options.in_pieces)
        case "pg19":
            return texts.pg19(raw, options.column)
        case "imagenet64":
            return images.ImageNet64(raw, options.n_train)
        case "images":
            return images.Images(raw, options.split)
    return texts.text(raw, options.column, options.n_train, options.split, whole_letters=options.in_pieces)


def given_model(options: Options) -> Vocabulary | None:
    """The vocabulary of --model. InputError: it is missing, or not a SentencePiece model."""
    if not options.model:
        return None
    path = epath.Path(options.model).expanduser()
    with files.naming("--model"), files.reading(path):
        return SentencePieceVocabulary(path.read_bytes())


def vocabulary_of(options: Options, source: Source, console: metrics.Console) -> Vocabulary:
    """Bytes, or newly trained pieces."""
    if not options.in_pieces:
        return ByteVocabulary()
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
    """Pieces that give the same tokens as the whole document."""
    if isinstance(vocabulary, SentencePieceVocabulary):
        return texts.at_spaces(pieces) if vocabulary.splits_at_spaces else texts.whole(pieces)
    return pieces


@contextlib.contextmanager
def whole_or_not(output: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill, which becomes `output` at the end or not at all. What a killed start left is removed.

    In a bucket it is `output` itself, which does not count until it has a manifest. InputError: it cannot
    be written, another process is writing it, or a folder that tvq did not make has its temporary name.
    """
    is_bucket = files.is_bucket(output)
    making = output if is_bucket else output.with_name(f"{output.name}.preparing")
    try:
        if is_bucket:
            making.mkdir(parents=True, exist_ok=True)
            yield making
            return
        mark = making / walk.PREPARING
        if not making.exists():
            making.mkdir(parents=True)
            mark.touch()
        elif not mark.exists():
            raise InputError(
                f"--output: {making} is in the way, and tvq did not make it; move it, or use another --output"
            )
        with contextlib.ExitStack() as stack:
            locked(making, stack)
            stack.callback(shutil.rmtree, making, ignore_errors=True)
            for path in making.iterdir():
                if path != mark:
                    path.unlink()
            yield making
            making.rename(output)
            (output / walk.PREPARING).unlink()
    except OSError as error:
        raise InputError(
            f"--output: cannot write {output} ({error.strerror or error}); make room, or use another folder"
        ) from error


def locked(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    """Locks the folder until the stack is closed or the process ends. InputError: another holds it."""
    number = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, number)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--output: another process is writing {folder}; wait for it, or stop it") from error


def showing(console: metrics.Console, what: str) -> Callable[[int, int], None]:
    """Shows how many of the bytes are done, a few times a second."""
    so_far, last = metrics.Progress(what, "bytes"), 0.0

    def show(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            console.progress(so_far.line(done, of), brief=True)

    return show


def summary(output: epath.Path, source: Source, seconds: float) -> str:
    """What a folder holds, and what is unusual about it, for the console."""
    manifest = prepared.read(output, f"--output: {output}", "prepare it again")
    n_byte = sum(info.n_byte for info in manifest.splits.values())
    rows = [
        f"{split:10} {info.n_token:,} tokens of {info.n_byte:,} bytes in {info.n_document:,} documents"
        + ("; it is EMPTY, and cannot be evaluated" if info.is_empty else "")
        for split, info in manifest.splits.items()
    ]
    rows.append(f"split      {manifest.source['split']}")
    for reason in dict.fromkeys(why for _, why in source.left_out):
        names = [name for name, why in source.left_out if why == reason]
        rows.append(f"left out   {len(names):,} {reason}: {files.listed(names)}")
    rows.append(f"vocabulary {manifest.vocabulary.name}, {manifest.vocabulary.size:,} ids")
    rows += [
        f"UNKNOWN    {prepared.unknown(info)} of {split}"
        for split, info in manifest.splits.items()
        if prepared.unknown(info)
    ]
    rows.append(f"prepared   {output}, at {n_byte / 1e6 / seconds:,.1f} MB/s")
    return "\n".join(rows)
