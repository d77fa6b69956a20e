import pickle

import numpy as np
import pytest

from tests.data import books
from tvq.data import optional, vocabulary
from tvq.data.prepared import encode_text
from tvq.data.splits import Piece
from tvq.data.vocabulary import END, PAD, UNKNOWN, ByteVocabulary, SentencePieceVocabulary

BOTH = [ByteVocabulary(), books.vocabulary()]


def test_special_ids():
    assert (PAD, END, UNKNOWN) == (0, 1, 2)


def test_byte_b_is_id_b_plus_three():
    text = bytes(range(256))
    ids = ByteVocabulary().encode(text)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, np.arange(3, 259))
    assert ByteVocabulary().size == 259
    assert ByteVocabulary().decode(ids) == text


def test_special_ids_decode_to_nothing():
    assert ByteVocabulary().decode(np.array([1, 107, 0, 108, 2], np.int32)) == b"hi"
    ids = books.vocabulary().encode(b"kalo mi")
    assert books.vocabulary().decode([END, *ids, PAD, UNKNOWN]) == b"kalo mi"


@pytest.mark.parametrize("vocabulary", BOTH, ids=lambda v: v.name)
def test_ids_outside_do_not_decode(vocabulary):
    for strange in (-1, vocabulary.size):
        with pytest.raises(ValueError, match=f"id {strange} is outside .* {vocabulary.size} ids"):
            vocabulary.decode(np.array([5, strange]))


@pytest.mark.parametrize("known", BOTH, ids=lambda v: v.name)
def test_travels_whole(known):
    assert vocabulary.from_json(vocabulary.to_json(known)) == known
    assert pickle.loads(pickle.dumps(known)) == known
    assert vocabulary.describe(known)["size"] == known.size


def test_pieces():
    pieces = books.vocabulary()
    assert pieces.size == 120
    text = "pekalo  shé\n\n vontar."
    ids = pieces.encode(text.encode())
    assert ids.dtype == np.uint16
    assert len(ids) < len(text) / 2
    assert ids.min() >= 3
    # As the paper's: line ends and runs of spaces are one space.
    assert pieces.decode(ids).decode() == "pekalo shé vontar."
    assert UNKNOWN in pieces.encode("日".encode())


def test_text_may_be_cut_at_spaces():
    pieces = books.vocabulary()
    assert pieces.splits_at_spaces
    text = books.book(1)
    for n in range(1, 60):
        at = n * len(text) // 60
        at += next(i for i, letter in enumerate(text[at:]) if letter in " \n")
        parts = [pieces.encode(part.encode()) for part in (text[:at], text[at:])]
        np.testing.assert_array_equal(np.concatenate(parts), pieces.encode(text.encode()))


def test_training_is_repeatable():
    again = vocabulary.train_sentencepiece(iter(books.book(0).split("\n")), 120)
    assert again == books.vocabulary()


def test_too_little_text_for_the_pieces():
    for text in ([], ["a b"]):
        with pytest.raises(
            ValueError, match=r"cannot train 120 pieces on this text \(.+\); give more text, or"
        ):
            vocabulary.train_sentencepiece(iter(text), 120)


def test_not_a_model():
    with pytest.raises(ValueError, match="of 3 bytes is not a SentencePiece model"):
        SentencePieceVocabulary(b"abc")


def test_other_special_ids(monkeypatch):
    monkeypatch.setattr(vocabulary, "PAD", 5)
    with pytest.raises(ValueError, match=r"has pad, end, unknown and begin ids \(0, 1, 2, -1\), it needs"):
        SentencePieceVocabulary(books.vocabulary().model)


def test_text_that_is_not_utf8():
    piece = Piece("train", "book.txt", b"kalo \xff\xfe mi \xc3", last=True)
    assert len(encode_text(ByteVocabulary(), piece)) == len(piece.raw)
    with pytest.raises(ValueError, match=r"book\.txt is not UTF-8: 3 invalid places, the first after b.kalo"):
        encode_text(books.vocabulary(), piece)


def test_a_package_that_is_missing():
    with pytest.raises(ValueError, match=r"needs the package 'absent', .* not installed; pip install"):
        optional.load("absent.part")
