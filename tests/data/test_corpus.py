import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tvq import config, schema
from tvq.data import files, prepared, walk
from tvq.data.corpus import cache_folder, open_corpus
from tvq.data.splits import SPLITS
from tvq.data.vocabulary import END, ByteVocabulary


@pytest.fixture
def text(tmp_path) -> schema.Data:
    """A file of 1000 bytes: 900 train, 50 validate, 50 test."""
    path = tmp_path / "text"
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    return schema.Data(source="text", path=str(path), cache=str(tmp_path / "cache"))


@pytest.fixture
def tokens(text) -> schema.Data:
    return schema.Data(source="tokens", path=str(open_corpus(text).folders[0].path))


NO_MODEL = hashlib.sha256(b"").hexdigest()


def edit_manifest(data: schema.Data, **changes: object) -> None:
    path = Path(data.path, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tokens_are_the_text_then_the_end(text):
    corpus, content = open_corpus(text), Path(text.path).read_bytes()
    for split, part in zip(SPLITS, (content[:900], content[900:950], content[950:]), strict=True):
        tokens, info = corpus.folders[0].tokens(split), corpus.info(split)
        assert tokens.dtype == np.uint16
        assert isinstance(tokens, np.memmap)
        assert tokens[-1] == END
        assert corpus.vocabulary.decode(tokens) == part
        assert (info.n_token, info.n_document, info.n_byte) == (len(part) + 1, 1, len(part))
        assert info.gzip_bytes == (None if split == "train" else len(gzip.compress(part, 9)))


def test_folder_of_documents(tmp_path):
    for name in ("b", "a", "c/d"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / "empty").touch()
    data = schema.Data(source="text", path=str(tmp_path / "in"), cache=str(tmp_path / "cache"))
    corpus = open_corpus(data)
    encode = ByteVocabulary().encode
    wanted = np.concatenate([encode(b"a"), [1], encode(b"b"), [1], encode(b"c/d"), [1, 1]])
    np.testing.assert_array_equal(corpus.folders[0].tokens("train"), wanted)
    with pytest.raises(
        ValueError, match=r"the validation split of .* is empty; config\.data\.path needs more"
    ):
        corpus.info("validation")


def test_reading_in_small_chunks_changes_nothing(text, tmp_path, monkeypatch):
    whole = open_corpus(text)
    monkeypatch.setattr(files, "CHUNK", 13)
    pieces = open_corpus(schema.Data(source="text", path=text.path, cache=str(tmp_path / "other")))
    assert pieces.fingerprint == whole.fingerprint
    assert pieces.folders[0].splits == whole.folders[0].splits


def test_made_once(text, monkeypatch):
    first = open_corpus(text)
    monkeypatch.setattr(prepared, "write", None)
    again = open_corpus(text)
    assert again == first
    assert again == open_corpus(schema.Data(source="tokens", path=str(first.folders[0].path)))


def test_made_again_when_the_text_changes(text):
    first, path = open_corpus(text), Path(text.path)
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(0, 1))
    second = open_corpus(text)
    assert second.folders[0].path != first.folders[0].path
    assert second.fingerprint != first.fingerprint


def test_fingerprint_does_not_depend_on_the_place(text, tmp_path):
    copy = tmp_path / "copy"
    copy.write_bytes(Path(text.path).read_bytes())
    other = open_corpus(schema.Data(source="text", path=str(copy), cache=text.cache))
    assert other.folders[0].path != open_corpus(text).folders[0].path
    assert other.fingerprint == open_corpus(text).fingerprint


def test_default_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(schema.Data()) == Path("/somewhere/tvq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(schema.Data()) == Path.home() / ".cache" / "tvq"


def test_another_process_was_first(text, monkeypatch):
    write = prepared.write

    def slow_write(folder: epath.Path, *rest: object) -> dict[str, prepared.Split]:
        written = write(folder, *rest)
        monkeypatch.setattr(prepared, "write", write)
        open_corpus(text)
        return written

    monkeypatch.setattr(prepared, "write", slow_write)
    corpus = open_corpus(text)
    assert os.listdir(text.cache) == [corpus.folders[0].path.name]


def test_processes_at_once(text):
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        corpora = list(pool.map(open_corpus, [text] * 4))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert os.listdir(text.cache) == [corpora[0].folders[0].path.name]


def test_a_failed_preparation_leaves_nothing(text, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("config.data.path: broken")

    monkeypatch.setattr(prepared, "write", fail)
    with pytest.raises(ValueError, match="broken"):
        open_corpus(text)
    assert os.listdir(text.cache) == []


def test_cache_that_cannot_be_written(text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"config\.data\.cache: cannot write .*\(File exists\); choose another"
    ):
        open_corpus(schema.Data(source="text", path=text.path, cache=str(tmp_path / "file")))


def test_damaged_cache(text):
    path = open_corpus(text).folders[0].tokens_path("validation")
    path.write_bytes(path.read_bytes()[:-1])
    wanted = (
        r"config\.data\.cache: .* damaged: validation\.tokens has 101 bytes, .* says 102; delete this folder"
    )
    with pytest.raises(ValueError, match=wanted):
        open_corpus(text)


def test_cache_without_manifest(text):
    (open_corpus(text).folders[0].path / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"config\.data\.cache: .* is not a prepared folder: .*; delete this"
    ):
        open_corpus(text)


def test_pickles_small(text):
    corpus = open_corpus(text)
    corpus.folders[0].tokens("train")
    data = pickle.dumps(corpus)
    assert len(data) < 2000
    assert pickle.loads(data) == corpus


def test_not_a_prepared_folder(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        wanted = r"config\.data\.path: .* is not a prepared folder: cannot read manifest\.json .*source=text"
        with pytest.raises(ValueError, match=wanted):
            open_corpus(schema.Data(source="tokens", path=str(path)))


def test_missing_token_file(tokens):
    Path(tokens.path, "test.tokens").unlink()
    with pytest.raises(ValueError, match=r"config\.data\.path: .* test\.tokens has 0 bytes, .* 102; prepare"):
        open_corpus(tokens)


def test_other_format(tokens):
    edit_manifest(tokens, version=3)
    with pytest.raises(ValueError, match=r"format version 3, this tvq reads 2; update tvq, or prepare it"):
        open_corpus(tokens)
    edit_manifest(tokens, version=1)
    with pytest.raises(ValueError, match=r"format version 1, this tvq reads 2; prepare it again"):
        open_corpus(tokens)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"version": "1"}'])
def test_damaged_manifest(tokens, content):
    Path(tokens.path, "manifest.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"config\.data\.path: .* has a damaged manifest\.json .*; prepare it"
    ):
        open_corpus(tokens)


@pytest.mark.parametrize(
    ("vocabulary", "wanted"),
    [
        (
            {"name": "runes", "size": 9, "sha256": ""},
            r"made with the vocabulary 'runes', this tvq knows bytes, sentencepiece; update",
        ),
        (
            {"name": "bytes", "size": 260, "sha256": NO_MODEL},
            r"made with 260 ids of 'bytes', which has 259; prepare",
        ),
        ({"name": "bytes"}, r"damaged manifest\.json"),
    ],
)
def test_other_vocabulary(tokens, vocabulary, wanted):
    edit_manifest(tokens, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=wanted):
        open_corpus(tokens)


def test_empty_train_split(corpus_of):
    with pytest.raises(
        ValueError, match=r"config\.data\.path: .* has an empty train split; prepare it again"
    ):
        corpus_of(validation=[b"text"])


@pytest.mark.parametrize("name", ["train.tokens", "test.tokens", "validation.documents"])
@pytest.mark.parametrize("whole", [True, False])
def test_contents_that_changed_at_equal_size(corpus_of, tmp_path, monkeypatch, name, whole):
    if not whole:  # a large file: some blocks of it
        monkeypatch.setattr(prepared, "HASHED_WHOLE", 100)
        monkeypatch.setattr(prepared, "BLOCK", 2)
    rng = np.random.default_rng(0)
    corpus = corpus_of(**{split: [rng.bytes(3000), rng.bytes(10)] for split in SPLITS})
    data = schema.Data(source="tokens", path=str(corpus.folders[0].path))
    assert (corpus.info("train").blocks_sha256 is None) == whole
    path = Path(corpus.folders[0].path, name)
    content = bytearray(path.read_bytes())
    content[: len(content) // 2 - 20] = content[: len(content) // 2 - 20][::-1]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"is damaged: {name} has sha256 .* says .*: its contents changed"):
        open_corpus(data)


def test_a_folder_from_before_these_hashes(tokens):
    manifest = json.loads(Path(tokens.path, "manifest.json").read_text())
    for info in manifest["splits"].values():
        del info["index_sha256"], info["blocks_sha256"], info["n_unknown"]
    edit_manifest(tokens, splits=manifest["splits"])
    assert open_corpus(tokens).info("train").n_unknown is None


def test_emptiness_is_bytes(corpus_of):
    corpus = corpus_of(train=[b"text"], validation=[b"", b""])
    assert corpus.folders[0].splits["validation"].n_token == 2
    with pytest.raises(ValueError, match=r"the validation split of .* is empty"):
        corpus.info("validation")


def test_training_text_that_is_empty(corpus_of):
    with pytest.raises(ValueError, match="has an empty train split"):
        corpus_of(train=[b"", b""], test=[b"text"])


def test_a_folder_and_its_only_file_are_not_the_same(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(bytes(1000))
    found = [
        open_corpus(schema.Data(source="text", path=str(path), cache=str(tmp_path / "cache")))
        for path in (tmp_path / "in", tmp_path / "in" / "a.txt")
    ]
    assert [corpus.folders[0].splits["train"].n_byte for corpus in found] == [1000, 900]


def test_what_tvq_makes_inside_the_data_is_no_data(tmp_path):
    """Otherwise a run whose workdir, cache or prepared data are there could not resume."""
    (tmp_path / "a.txt").write_text("text" * 100)
    data = schema.Data(source="text", path=str(tmp_path), cache=str(tmp_path / "cache"))
    first = open_corpus(data)
    for name in ("runs/a/config.json", "runs/a/metrics.jsonl", "runs/b/logs/process_1.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    shutil.copytree(first.folders[0].path, tmp_path / "prepared")
    (tmp_path / "half.preparing").mkdir()
    (tmp_path / "half.preparing" / walk.PREPARING).touch()
    again = open_corpus(data)
    assert again.fingerprint == first.fingerprint
    assert again.folders[0].source["left_out"] == ["half.preparing/", "prepared/", "runs/a/", "runs/b/"]
    (tmp_path / "runs" / "note.txt").write_text("text")
    assert open_corpus(data).fingerprint != first.fingerprint


def test_an_index_that_does_not_match_its_tokens(tokens):
    path = Path(tokens.path, "validation.documents")
    rows = np.fromfile(path, "<u8")
    (rows + 1).tofile(path)
    with pytest.raises(ValueError, match=r"validation\.documents ends at token, byte and word \[52, 51, "):
        open_corpus(tokens)
    rows[:2].tofile(path)
    with pytest.raises(ValueError, match=r"validation\.documents has 16 bytes, its manifest says 24; "):
        open_corpus(tokens)


def test_stdlib(tmp_path):
    corpus = open_corpus(schema.Data(cache=str(tmp_path)))
    for split in SPLITS:
        info = corpus.info(split)
        assert len(corpus.folders[0].tokens(split)) == info.n_token == info.n_byte + info.n_document
    train, validation = corpus.info("train"), corpus.info("validation")
    assert train.n_byte > 5_000_000
    assert 0 < validation.n_document < train.n_document
    assert 0 < validation.gzip_bytes < validation.n_byte / 2
    assert corpus.vocabulary.decode(corpus.folders[0].tokens("train")[:2000]).isascii()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"source": "tokens"}, r"config\.data\.source=tokens needs config\.data\.path, a prepared folder"),
        ({"source": "text"}, r"config\.data\.source=text needs config\.data\.path"),
        ({"path": "book.txt"}, r"stdlib does not read config\.data\.path 'book\.txt'; use .*=text, or leave"),
        ({"source": "texts", "path": "x"}, r"one of stdlib, text, tokens, not 'texts'; did you mean text"),
    ],
)
def test_source_and_path_belong_together(data, wanted):
    settings = config.base()
    settings.data.update(data)
    with pytest.raises(ValueError, match=wanted):
        config.build(settings)
