"""tvq prepare on raw files that are made here: what they become, and what is rejected."""

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from PIL import Image

from tests.data import books
from tests.data.raw import XML, batches, library, packed, picture, planes
from tvq import schema
from tvq.data import files, images, texts
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.splits import Piece
from tvq.data.vocabulary import END, SentencePieceVocabulary
from tvq.programs import prepare

Made = Callable[..., Corpus]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """`made(kind, input, option=value)` prepares and opens it."""

    def run(kind: str, raw: Path, **options: object) -> Corpus:
        folder = tmp_path / "out" / str(len(list((tmp_path / "out").glob("*"))))
        prepare.prepare(prepare.Options(kind=kind, input=str(raw), output=str(folder), threads=2, **options))
        return open_corpus(schema.Data(source="tokens", path=str(folder)))

    return run


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """`refused(kind, input, option=value)` is the message; nothing is there afterwards."""

    def run(kind: str, raw: Path, **options: object) -> str:
        folder = tmp_path / "refused"
        with pytest.raises(ValueError, match=r".") as error:
            prepare.prepare(prepare.Options(kind=kind, input=str(raw), output=str(folder / "out"), **options))
        assert not folder.exists() or list(folder.iterdir()) == []
        return str(error.value)

    return run


def texts_of(corpus: Corpus, split: str) -> list[bytes]:
    """Each document, decoded."""
    ends = corpus.folders[0].documents(split)[:, 0].tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [corpus.vocabulary.decode(corpus.folders[0].tokens(split)[start:end]) for start, end in spans]


@pytest.mark.parametrize("name", ["enwik8.zip", "enwik8.gz", "enwik8.zst", "enwik8"])
def test_enwik8(made, tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1000)
    corpus = made("enwik8", packed(tmp_path, name, XML), n_train=5000)
    half = 5000 + (len(XML) - 5000) // 2
    parts = {"train": XML[:5000], "validation": XML[5000:half], "test": XML[half:]}
    for split, part in parts.items():
        assert corpus.vocabulary.decode(corpus.folders[0].tokens(split)) == part
        assert END not in corpus.folders[0].tokens(split)
        info = corpus.info(split)
        assert (info.n_token, info.n_document, info.n_byte, info.n_word) == (
            len(part), 1, len(part), len(part.split()),
        )  # fmt: skip


def test_enwik8_is_checked(refused, tmp_path, monkeypatch):
    message = refused("enwik8", packed(tmp_path, "enwik8.zip", XML))
    assert (
        f"enwik8.zip holds {len(XML)} bytes of SHA-1 {hashlib.sha1(XML).hexdigest()}, enwik8 has 1" in message
    )
    assert "--n_train" in message
    monkeypatch.setattr(texts, "ENWIK8_BYTES", len(XML))
    assert "of 57b8363b814821dc9d47aa4d41f58733519076b2; fetch it again" in refused(
        "enwik8", tmp_path / "enwik8.zip"
    )


def test_enwik8_whole(made, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "ENWIK8_BYTES", len(XML))
    monkeypatch.setattr(texts, "ENWIK8_SHA1", hashlib.sha1(XML).hexdigest())
    monkeypatch.setattr(texts, "ENWIK8_TRAIN", 4000)
    assert made("enwik8", packed(tmp_path, "enwik8", XML)).info("train").n_byte == 4000


@pytest.mark.parametrize("name", ["enwik8.zip", "enwik8.gz", "enwik8.zst"])
def test_truncated(refused, tmp_path, name):
    path = packed(tmp_path, name, XML)
    path.write_bytes(path.read_bytes()[: -len(XML) // 20])
    assert f"{path} is damaged or incomplete" in refused("enwik8", path, n_train=100)
    path.write_bytes(b"no such format" * 9)
    assert f"{path} is damaged or incomplete" in refused("enwik8", path, n_train=100)


def test_pg19(made, tmp_path):
    corpus = made("pg19", library(tmp_path / "pg19"), pieces=120)
    assert isinstance(corpus.vocabulary, SentencePieceVocabulary)
    assert corpus.vocabulary.size == 120
    for split, n in (("train", 6), ("validation", 2), ("test", 2)):
        raw = [(tmp_path / "pg19" / split / f"{i}.txt").read_text() for i in range(n)]
        assert [text.decode().split() for text in texts_of(corpus, split)] == [text.split() for text in raw]
        info = corpus.info(split)
        assert (info.n_document, info.n_word) == (n, sum(len(text.split()) for text in raw))
        assert info.n_byte == sum(len(text.encode()) for text in raw)
        assert (np.sum(corpus.folders[0].tokens(split) == END), corpus.folders[0].tokens(split)[-1]) == (
            n,
            END,
        )
    hashes = Path(corpus.folders[0].path, "sources.sha256").read_text().splitlines()
    first = hashlib.sha256((tmp_path / "pg19/train/0.txt").read_bytes()).hexdigest()
    assert f"{first}  train/0.txt" in hashes
    assert len(hashes) == corpus.folders[0].source["n_file"] == 10


def test_pg19_with_a_given_model_and_small_pieces(made, tmp_path, monkeypatch):
    model = tmp_path / "books.model"
    model.write_bytes(books.vocabulary().model)
    whole = made("pg19", library(tmp_path / "pg19"), model=str(model))
    assert whole.vocabulary == books.vocabulary()
    monkeypatch.setattr(texts.at_spaces, "__defaults__", (50,))
    assert made("pg19", tmp_path / "pg19", model=str(model)).folders[0].splits == whole.folders[0].splits


def test_another_model_in_the_folder(made, tmp_path):
    folder = Path(made("pg19", library(tmp_path / "pg19"), pieces=120).folders[0].path)
    for model in (books.vocabulary().model, b""):
        (folder / "vocabulary.model").write_bytes(model)
        with pytest.raises(
            ValueError, match=r"made with a vocabulary\.model of sha256 .*, the one there has"
        ):
            open_corpus(schema.Data(source="tokens", path=str(folder)))


def test_pg19_tables(made, tmp_path):
    library(tmp_path / "pg19")
    (tmp_path / "tables").mkdir()
    for split in ("train", "validation", "test"):
        rows = [path.read_text() for path in sorted((tmp_path / "pg19" / split).iterdir())]
        table = pyarrow.table({"title": ["a"] * len(rows), "text": rows})
        pyarrow.parquet.write_table(table, tmp_path / "tables" / f"{split}-00000-of-00001.parquet")
    by_files = made("pg19", tmp_path / "pg19", vocabulary="bytes")
    assert (
        made("pg19", tmp_path / "tables", vocabulary="bytes").folders[0].splits == by_files.folders[0].splits
    )


def test_pg19_without_its_folders(refused, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.txt").write_text("kalo")
    assert "needs folders or tables whose names begin with train, val and test" in refused(
        "pg19", tmp_path / "raw"
    )


def jsonl(path: Path, rows: list[object]) -> Path:
    return packed(path.parent, path.name, "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_rows_of_a_table(made, tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    rows = [{"body": books.book(i, 3), "n": i} for i in range(300)]
    corpus = made("text", jsonl(tmp_path / name, rows), column="body")
    found = {split: [text.decode() for text in texts_of(corpus, split)] for split in corpus.folders[0].splits}
    assert sorted(text for part in found.values() for text in part) == sorted(row["body"] for row in rows)
    assert len(found["train"]) > 280


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "line 2 of {} has no text in 'text' (Expecting property"),
        ("3", "line 2 of {} has no text in 'text'"),
        ('{"text": 3}', "line 2 of {} has no text in 'text'"),
        ('{"text": "\\ud800"}', "line 2 of {} has no text in 'text'"),
        ('{"body": "x"}', "line 2 of {} has no column 'text', it has ['body']; use --column"),
    ],
)
def test_rows_that_are_wrong(refused, tmp_path, line, wanted):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "kalo"}\n' + line)
    assert wanted.format(path) in refused("text", path)


def test_parquet_that_is_wrong(refused, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [3]}), path)
    assert f"{path} has no column 'text', it has ['body', 'n']; use --column" in refused("text", path)
    assert f"row 1 of {path} has no text in 'n', but a value of type int" in refused("text", path, column="n")
    path.write_bytes(path.read_bytes()[:-9])
    assert f"cannot read {path} (ArrowInvalid: " in refused("text", path, column="body")


def test_text_folder_and_file(made, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for i in range(120):
        packed(root, f"{i}.txt" + (".gz" if i % 2 else ""), b"book %d" % i)
    corpus = made("text", root)
    assert texts_of(corpus, "train")[:3] == [b"book 0", b"book 1", b"book 2"], "in natural order"
    assert sum(info.n_document for info in corpus.folders[0].splits.values()) == 120
    corpus = made("text", packed(tmp_path, "one.zst", b"x" * 1000))
    assert [corpus.info(split).n_byte for split in corpus.folders[0].splits] == [900, 50, 50]
    assert corpus.folders[0].tokens("test")[-1] == END


def test_text_that_is_not_utf8(refused, made, tmp_path):
    root = library(tmp_path / "raw")
    (root / "test" / "1.txt").write_bytes(b"kalo \xff\xfe mi")
    model = tmp_path / "books.model"
    model.write_bytes(books.vocabulary().model)
    message = refused("pg19", root, model=str(model))
    wanted = "--input: test/1.txt is not UTF-8: 2 invalid places, the first after b'kalo '; fix it, or use"
    assert message == f"{wanted} --vocabulary=bytes"
    (root / "train" / "1.txt").write_bytes(b"kalo \xff")
    assert refused("pg19", root).startswith("--input: train/1.txt is not UTF-8: 1 invalid places")
    assert made("pg19", root, vocabulary="bytes").info("test").n_document == 2


def test_imagenet64(made, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ROWS", 2)
    corpus = made("imagenet64", batches(tmp_path / "raw"), n_train=8)
    assert corpus.image_size == 64
    for split, seeds in (("train", range(8)), ("validation", range(8, 11)), ("test", range(100, 103))):
        tokens = corpus.folders[0].tokens(split).reshape(-1, 64, 64, 3)
        np.testing.assert_array_equal(tokens, np.stack([picture(i) for i in seeds]) + 3.0)
        info = corpus.info(split)
        assert (info.n_document, info.n_byte, info.n_word) == (len(seeds), 12_288 * len(seeds), 0)
        assert info.gzip_bytes is None


def test_imagenet64_in_other_forms(made, tmp_path):
    wanted = made("imagenet64", batches(tmp_path / "raw"), n_train=8).folders[0].splits
    (tmp_path / "pickled").mkdir()
    for name, seeds in (("train_data_batch_1", range(11)), ("val_data", range(100, 103))):
        content = {"data": planes([picture(i) for i in seeds]), "labels": [1, 2]}
        (tmp_path / "pickled" / name).write_bytes(pickle.dumps(content))
    assert made("imagenet64", tmp_path / "pickled", n_train=8).folders[0].splits == wanted
    for name, seeds in (("train_64x64", range(11)), ("valid_64x64", range(100, 103))):
        (tmp_path / "png" / name).mkdir(parents=True)
        for i in seeds:
            Image.fromarray(picture(i)).save(tmp_path / "png" / name / f"{i}.png")
    assert made("imagenet64", tmp_path / "png", n_train=8).folders[0].splits == wanted


def test_imagenet64_of_another_size(refused, tmp_path):
    root = batches(tmp_path / "raw")
    np.savez(root / "train_data_batch_9.npz", data=np.zeros((4, 3072), np.uint8))
    message = refused("imagenet64", root, n_train=3)
    assert "train_data_batch_9.npz are uint8 [4, 3072] in C order, not uint8 [N, 12288]" in message
    np.savez(root / "train_data_batch_9.npz", images=np.zeros((4, 12288), np.uint8))
    assert "has no array 'data', it has ['images.npy']" in refused("imagenet64", root, n_train=3)
    (root / "train_data_batch_9.npz").write_bytes((root / "val_data.npz").read_bytes()[:9999])
    assert "train_data_batch_9.npz is damaged or incomplete" in refused("imagenet64", root, n_train=3)


def test_imagenet64_with_too_few_images(refused, tmp_path):
    root = batches(tmp_path / "raw")
    message = refused("imagenet64", root)
    assert "has 11 images to train on, and the first 1200000 would train, none validate" in message
    (root / "val_data.npz").unlink()
    assert "holds 2 files to train and 0 to test on" in refused("imagenet64", root)


def test_a_pickle_that_runs_a_program(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "raw").mkdir()
    for name in ("train_data_batch_1", "val_data"):
        (tmp_path / "raw" / name).write_bytes(pickle.dumps({"data": Evil()}))
    assert "is not a pickled batch with an array 'data'" in refused("imagenet64", tmp_path / "raw", n_train=3)
    assert not (tmp_path / "ran").exists()


def test_images_of_any_size(made, tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(150):
        colour = Image.new("RGB", (20, 10 + i % 5), (i, 2, 3))
        colour.save(tmp_path / "raw" / f"{i}.{'png' if i % 2 else 'gif'}")
    (tmp_path / "raw" / "notes.txt").write_text("not an image")
    corpus = made("images", tmp_path / "raw", size=8)
    assert corpus.image_size == 8
    assert sum(info.n_document for info in corpus.folders[0].splits.values()) == 150
    first = corpus.folders[0].tokens("train")[: 2 * 192].reshape(2, 8, 8, 3) - 3
    assert (first[1] == (1, 2, 3)).all()
    assert END not in corpus.folders[0].tokens("train")


@pytest.mark.parametrize("content", [b"text", b""])
def test_an_image_that_is_not_one(refused, tmp_path, content):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").write_bytes(content)
    assert refused("images", tmp_path / "raw").startswith("--input: a.png cannot be read as an image (")
    whole = io.BytesIO()
    Image.fromarray(picture(0)).save(whole, "PNG")
    (tmp_path / "raw" / "a.png").write_bytes(whole.getvalue()[:-900])
    assert refused("images", tmp_path / "raw").startswith("--input: a.png cannot be read as an image (")


def test_a_png_of_another_size():
    whole = io.BytesIO()
    Image.new("L", (64, 32)).save(whole, "PNG")
    with pytest.raises(ValueError, match=r"a\.png has 64 x 32 pixels, not 64 x 64"):
        images.pixels(Piece("test", "a.png", whole.getvalue(), last=True), 64, fit=False)


MANIFEST = """{
  "version": 2,
  "vocabulary": {
    "name": "bytes",
    "size": 259,
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
  },
  "image_size": 0,
  "source": {
    "name": "enwik8",
    "split": "train, validation and test end at bytes 5000, 5511 and 6022",
    "n_file": 1,
    "n_byte": 6022,
    "sha256": "8d0481b60180ed4b16e14cd4169f838842ed533b76f3e7feaf573b600a106725"
  },
  "splits": {
    "train": {
      "n_token": 5000,
      "n_document": 1,
      "n_byte": 5000,
      "n_word": 699,
      "sha256": "b2d71c4a4cb93d40afbf6801821b1a585d4de6dd023447e400e565515f45d8be",
      "gzip_bytes": null,
      "n_unknown": 0,
      "index_sha256": "539a444218e8ed7f441cd5f3732add7e4d70040831306ad1477d80fd8c895ed3",
      "blocks_sha256": null
    },
    "validation": {
      "n_token": 511,
      "n_document": 1,
      "n_byte": 511,
      "n_word": 71,
      "sha256": "4cad9b52bd27af362bc6b84b5e0fda8015f6b58534626036841c47a9ed488ec5",
      "gzip_bytes": 0,
      "n_unknown": 0,
      "index_sha256": "a8a89ac5df4ce829585b8d305e82a47e697387c525d3f35cfecdcc043df211a4",
      "blocks_sha256": null
    },
    "test": {
      "n_token": 511,
      "n_document": 1,
      "n_byte": 511,
      "n_word": 71,
      "sha256": "918b66e7a68b678557c8dcb1a611cc84e48076c548c6f0e5a49e4268b9fcbd55",
      "gzip_bytes": 0,
      "n_unknown": 0,
      "index_sha256": "a8a89ac5df4ce829585b8d305e82a47e697387c525d3f35cfecdcc043df211a4",
      "blocks_sha256": null
    }
  }
}
"""


def test_the_manifest_never_changes(made, tmp_path):
    # Recorded: runs resume only with the same tokens, and what reads a manifest relies on its names.
    corpus = made("enwik8", packed(tmp_path, "enwik8", XML), n_train=5000)
    manifest = Path(corpus.folders[0].path, "manifest.json").read_text()
    # The size that gzip gives depends on zlib.
    assert re.sub(r'"gzip_bytes": \d+', '"gzip_bytes": 0', manifest) == MANIFEST
    assert corpus.fingerprint == "e587cdfac777c1c4c38f8e0341b37cbd8f918a8afc9c0abeee86e94a21a4991d"
    index = np.fromfile(Path(corpus.folders[0].path, "train.documents"), "<u8")
    assert index.tolist() == [5000, 5000, 699]


def test_a_full_disk(refused, tmp_path):
    path = packed(tmp_path, "enwik8", XML * 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        message = refused("enwik8", path, n_train=500_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"--output: cannot write {tmp_path / 'refused' / 'out'} (File too large); make")


def test_a_killed_start_is_started_clean(tmp_path):
    path, output = packed(tmp_path, "enwik8", XML), tmp_path / "out"
    making = tmp_path / "out.preparing"
    making.mkdir()
    (making / ".tvq-preparing").touch()
    (making / "train.tokens").write_bytes(b"torn" * 10**4)
    (making / "vocabulary.model").touch()
    options = prepare.Options(kind="enwik8", input=str(path), output=str(output), n_train=5000)
    with prepare.whole_or_not(epath.Path(output)), pytest.raises(ValueError, match="another process is"):
        prepare.prepare(options)
    making.mkdir()
    for name in (".tvq-preparing", "vocabulary.model"):
        (making / name).touch()
    shutil.rmtree(output)
    prepare.prepare(options)
    assert not making.exists()
    assert not {"vocabulary.model", ".tvq-preparing"} & set(os.listdir(output))
    assert open_corpus(schema.Data(source="tokens", path=str(output))).info("train").n_token == 5000


@pytest.mark.parametrize("content", [[], ["train.tokens", "notes.txt"]])
def test_a_folder_of_the_users_with_the_temporary_name(tmp_path, content):
    path, making = packed(tmp_path, "enwik8", XML), tmp_path / "out.preparing"
    making.mkdir()
    for name in content:
        (making / name).touch()
    options = prepare.Options(kind="enwik8", input=str(path), output=str(tmp_path / "out"), n_train=5000)
    with pytest.raises(ValueError, match=r"out\.preparing is in the way, and tvq did not make it; move it"):
        prepare.prepare(options)
    assert sorted(os.listdir(making)) == sorted(content)


def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"--output=.*mine already exists; use another folder"):
        prepare.prepare(prepare.Options(kind="text", input=__file__, output=str(tmp_path / "mine")))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kind": "text", "download": True}, "--download can fetch enwik8 and pg19, not text"),
        ({"vocabulary": "words"}, "--vocabulary must be bytes or sentencepiece, not 'words'"),
        ({"kind": "images", "model": "x"}, "--vocabulary of images is bytes; omit"),
        ({"vocabulary": "bytes", "model": "x"}, "--model is for --vocabulary=sentencepiece, not for bytes"),
        ({"size": 0}, "--size must be at least 1, not 0"),
        ({"input": "gone"}, "--input: cannot read gone"),
        (
            {"kind": "pg19", "input": "gone"},
            "--input: cannot read gone (No such file or directory): it does not exist",
        ),
        ({"kind": "enwik8", "input": "/dev"}, "--input: cannot read /dev (Is a directory)"),
        ({"model": "gone"}, "--model: cannot read gone (No such file or directory)"),
        ({"n_train": 10**9}, "--n_train=1000000000 must be between 0 and the "),
        (
            {"input": "tests", "n_train": 3},
            "--n_train=3 counts bytes of one file, but tests is",
        ),
        ({"model": "Makefile"}, "--model: the vocabulary of "),
        ({"pieces": 70_000, "vocabulary": "sentencepiece"}, "--pieces must be at most 65536, for tokens of"),
        ({"pieces": 150}, "--pieces has no effect here: the vocabulary is bytes; it is for --vocabulary=sen"),
        ({"sample": 9, "model": "x"}, "--sample has no effect here: a model is given with --model"),
        ({"kind": "images", "n_train": 5}, "--n_train has no effect here: images is split by names"),
        ({"kind": "enwik8", "column": "x"}, "--column has no effect here: enwik8 has no tables"),
        ({"column": "body"}, "--column=body has no effect here: no file of README.md is a table"),
        ({"size": 32}, "--size has no effect here"),
        ({"url": "http://localhost"}, "--url has no effect here: nothing is fetched without --download"),
        ({"kind": "pg19", "split": "hash"}, "--split has no effect here: pg19 is split as published"),
        ({"split": "hash"}, "--split=hash is for a folder, but README.md is a file"),
        ({"split": "other"}, "--split must be names or hash, not 'other'"),
        ({"input": "/dev/null"}, "--input: /dev/null is neither a file nor a folder"),
        ({"kind": "images", "input": "configs"}, "--input: configs holds no images (.png, "),
    ],
)
def test_options(tmp_path, monkeypatch, options, wanted):
    monkeypatch.chdir(Path(__file__).parents[2])
    known = {"kind": "text", "input": "README.md", "output": str(tmp_path / "out")} | options
    with pytest.raises(ValueError, match=re.escape(wanted)):
        prepare.prepare(prepare.Options(**known))
    assert os.listdir(tmp_path) == []


def test_progress_is_shown_a_few_times_a_second(monkeypatch):
    now = iter([100.0, 100.1, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    said = []
    show = prepare.showing(SimpleNamespace(progress=lambda line, brief: said.append(line)), "fetching")
    for done in (10_000, 20_000, 30_000):
        show(done, 40_000)
    assert said == ["fetching: 10,000 of 40,000 bytes", "fetching: 30,000 of 40,000 bytes, 0 s left"]
