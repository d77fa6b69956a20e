"""Text in pieces is the text at once, for any ids in any pieces, and its cost is that of the ids."""

import io

import numpy as np
import pytest

from tests.data import books
from tvq.data import detokenize
from tvq.data.vocabulary import END, ByteVocabulary, SentencePieceVocabulary


def sentencepiece(**options) -> SentencePieceVocabulary:
    package, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(books.book(0).split("\n")), model_writer=model, model_type="bpe",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **options,
    )  # fmt: skip
    return SentencePieceVocabulary(model.getvalue())


VOCABULARIES: dict = {
    "bytes": lambda: ByteVocabulary(),
    "plain": lambda: sentencepiece(vocab_size=120),
    "with bytes": lambda: sentencepiece(vocab_size=400, byte_fallback=True),
    "spaces kept": lambda: sentencepiece(
        vocab_size=400, byte_fallback=True, remove_extra_whitespaces=False, user_defined_symbols=["  ", "<a>"]
    ),
    "spaces behind": lambda: sentencepiece(
        vocab_size=400, byte_fallback=True, treat_whitespace_as_suffix=True, add_dummy_prefix=False
    ),
}
TEXTS = ("aé漢😀z", "  two  spaces", "Привет, мир", "\ufffd written out \ufffd\ufffd", "", " ", "a\nb")


def texts(vocabulary, rng):
    """Ids of texts, cut anywhere, and random ones: among them single bytes, spaces and special ids."""
    for text in TEXTS:
        ids = vocabulary.encode(text.encode()).astype(np.int64)
        yield from (ids, ids[:-1], ids[1:], ids[::-1])
        if isinstance(vocabulary, SentencePieceVocabulary):  # written byte by byte; unknown without bytes
            yield np.array([vocabulary.processor.piece_to_id(f"<0x{b:02X}>") for b in text.encode()], int)
    low = min(vocabulary.size, 259)
    spaces = vocabulary.encode(b" ").tolist() or [3]
    for _ in range(150):
        n = int(rng.integers(1, 40))
        yield rng.integers(0, vocabulary.size, n)
        yield rng.integers(0, low, n)  # nearly all of them bytes, where it has bytes
        yield np.concatenate([rng.choice([*spaces, END], n // 2), rng.integers(3, low, n)])


@pytest.mark.parametrize("name", VOCABULARIES)
def test_pieces_are_the_whole(name):
    vocabulary, rng = VOCABULARIES[name](), np.random.default_rng(0)
    for ids in texts(vocabulary, rng):
        want = vocabulary.decode(ids).decode(errors="replace")
        for size in (1, 3, 16):
            cut = [ids[i : i + size] for i in range(0, len(ids), size)]
            assert "".join(detokenize.stream(vocabulary, cut)) == want, (name, ids.tolist(), size)


@pytest.mark.parametrize("name", ["plain", "with bytes"])
def test_what_is_certain_is_said_at_once(name):
    vocabulary = VOCABULARIES[name]()
    ids = vocabulary.encode(b"one two three")
    said = list(detokenize.stream(vocabulary, [ids[i : i + 1] for i in range(len(ids))]))
    assert "".join(said[:-1]) == vocabulary.decode(ids).decode()
    assert all(len(text) < 8 for text in said)


def test_a_character_is_said_with_its_last_byte():
    vocabulary = VOCABULARIES["with bytes"]()
    ids = [vocabulary.processor.piece_to_id(f"<0x{b:02X}>") for b in "мир😀".encode()]
    given = iter(ids)
    stream = detokenize.stream(vocabulary, (np.array([i]) for i in given))
    for n_left, character in zip((8, 6, 4, 0), "мир😀", strict=True):
        assert next(stream) == character
        assert given.__length_hint__() == n_left


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_cost_does_not_grow_with_the_text(name, monkeypatch):
    """Ids decoded, whatever they are, stay within a small multiple of the ids given."""
    vocabulary, decoded = VOCABULARIES[name](), []
    decode = type(vocabulary).decode
    monkeypatch.setattr(
        type(vocabulary), "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids)
    )
    for low in (vocabulary.size, 259):
        ids = np.random.default_rng(0).integers(3, low, 4000) if low <= vocabulary.size else np.full(4000, 3)
        decoded.clear()
        list(detokenize.stream(vocabulary, [ids[i : i + 16] for i in range(0, 4000, 16)]))
        assert sum(decoded) < 30 * len(ids)


def cut_by_hand(text: str, start: int, stops: list[str]) -> str:
    """The text before the first place, from `start` on, where any of the stop strings stands."""
    for i in range(start, len(text)):
        if any(text[i : i + len(stop)] == stop for stop in stops):
            return text[:i]
    return text


def test_a_text_ends_before_a_stop_string():
    """At once and in pieces of any size; nothing is shown that the stop string takes back."""
    rng, n_cut = np.random.default_rng(0), 0
    for _ in range(500):
        text = "".join(rng.choice(["a", "b", "\n"], rng.integers(0, 30)))
        start = int(rng.integers(0, len(text) + 1))
        stops = ["".join(rng.choice(["a", "b", "\n"], rng.integers(1, 5))) for _ in range(rng.integers(0, 4))]
        want = cut_by_hand(text, start, stops)
        assert detokenize.before_stop(text, start, stops) == want
        n_cut += want != text
        for size in (1, 3, 16):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            assert "".join(detokenize.until_stop(pieces, start, stops)) == want, (text, start, stops, size)
    assert 100 < n_cut < 400


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    pieces = list(detokenize.until_stop(["ab", "x", "\n", "\n", "c", "\nd"], 1, ["\n\n\n", "bx\n\nd"]))
    assert pieces[0] == "a"
    assert "".join(pieces) == "abx\n\nc\nd"
