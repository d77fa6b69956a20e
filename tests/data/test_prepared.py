"""The prepared folder: its index and counts, and what does not depend on how it was written."""

import random
from collections.abc import Iterable

import numpy as np
import pytest
from etils import epath

from tvq import schema
from tvq.data import prepared
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.prepared import Form, text_form
from tvq.data.splits import Piece
from tvq.data.vocabulary import ByteVocabulary

TEXTS = [b"one two\n three ", b"", b"\n\n", b"four", b" \xff five\tsix\r\n"]


def written(folder: epath.Path, pieces: Iterable[Piece], form: Form, n_thread: int = 0) -> Corpus:
    folder.mkdir()
    prepared.write(folder, pieces, form, {"name": "made"}, n_thread=n_thread)
    return open_corpus(schema.Data(source="tokens", path=str(folder)))


def cut(texts: Iterable[bytes], size: int) -> Iterable[Piece]:
    for i, text in enumerate(texts):
        for start in range(0, len(text), size):
            yield Piece("train", f"{i}", text[start : start + size], last=False)
        yield Piece("train", f"{i}", b"", last=True)


@pytest.mark.parametrize("end_ids", [True, False])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_index_and_counts(tmp_path, end_ids, size):
    form = text_form(ByteVocabulary(), end_ids=end_ids)
    corpus = written(epath.Path(tmp_path / "made"), cut(TEXTS, size), form)
    n_byte = np.cumsum([len(text) for text in TEXTS])
    n_word = np.cumsum([len(text.split()) for text in TEXTS])
    n_token = n_byte + end_ids * np.arange(1, 6)
    np.testing.assert_array_equal(
        corpus.folders[0].documents("train"), np.stack([n_token, n_byte, n_word], 1)
    )
    info = corpus.info("train")
    assert (info.n_token, info.n_byte, info.n_word, info.n_document) == (n_token[-1], n_byte[-1], 7, 5)
    assert corpus.vocabulary.decode(corpus.folders[0].tokens("train")) == b"".join(TEXTS)


def test_threads_change_nothing(tmp_path):
    rng = random.Random(0)
    pieces = list(cut([rng.randbytes(rng.randrange(200)) for _ in range(50)], 16))
    form = text_form(ByteVocabulary())
    alone = written(epath.Path(tmp_path / "alone"), pieces, form)
    threads = written(epath.Path(tmp_path / "threads"), iter(pieces), form, n_thread=3)
    assert threads.folders[0].splits == alone.folders[0].splits


@pytest.mark.parametrize("n_thread", [0, 2])
def test_an_error_of_one_piece_ends_it(tmp_path, n_thread):
    def fail(piece: Piece) -> np.ndarray:
        raise ValueError(f"no {piece.document}")

    with pytest.raises(ValueError, match="no 0"):
        written(epath.Path(tmp_path / "made"), cut(TEXTS * 9, 3), Form(encode=fail), n_thread)
    assert not (tmp_path / "made" / "manifest.json").exists()


def test_progress_counts_bytes(tmp_path):
    seen: list[int] = []
    form = text_form(ByteVocabulary())
    prepared.write(epath.Path(tmp_path), cut([b"abcde"], 2), form, {}, progress=seen.append)
    assert seen == [2, 4, 5, 5]
