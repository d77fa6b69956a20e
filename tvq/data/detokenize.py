"""Ids to text piece by piece, in linear time: exactly the text that decoding all at once gives."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from tvq.data.vocabulary import N_SPECIAL, SentencePieceVocabulary, Vocabulary

MAX_BYTES = 4  # of a character in UTF-8
BROKEN = "\ufffd"


def stream(vocabulary: Vocabulary, pieces: Iterable[np.ndarray]) -> Iterator[str]:
    """The text of ids that arrive in pieces, each part as soon as no later id can change it."""
    if isinstance(vocabulary, SentencePieceVocabulary):
        reader = _Reader(vocabulary)
        for ids in pieces:
            yield from reader.add(ids)
        yield reader.rest()
    else:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for ids in pieces:
            yield decoder.decode(vocabulary.decode(ids))
        yield decoder.decode(b"", final=True)


def before_stop(text: str, start: int, stops: list[str]) -> str:
    """The text before the first stop string that begins at `start` or later."""
    places = [text.find(stop, start) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def until_stop(pieces: Iterable[str], start: int, stops: list[str]) -> Iterator[str]:
    """The same of a text that comes in pieces; what may be the beginning of a stop string is held back."""
    text, shown = "", 0
    begins = lambda n: any(text.endswith(stop[:n]) for stop in stops if n < len(stop))
    for piece in pieces:
        text += piece
        whole = before_stop(text, start, stops)
        if whole != text:
            yield whole[shown:]
            return
        n_held = range(min(max(map(len, stops), default=0), len(text) - start), 0, -1)
        certain = len(text) - next(filter(begins, n_held), 0)
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    yield text[shown:]


class _Reader:
    """Decodes SentencePiece ids. The text of an id depends on its neighbours in only two ways.

    Before there is any text a space may be dropped, so ids that gave none are decoded again with the next
    ones; once there is text, what follows is decoded after an anchor, a piece that has text, and does not
    depend on what came before. And bytes (of characters that are not pieces) are read together, as UTF-8.
    """

    def __init__(self, vocabulary: SentencePieceVocabulary) -> None:
        self._vocabulary, self._is_byte = vocabulary, vocabulary.processor.is_byte
        every = range(N_SPECIAL, vocabulary.size)
        self._anchor = next([i] for i in every if not self._is_byte(i) and self._decode([i]).strip())
        self._before: list[int] = []  # ids without text, then the anchor
        self._bytes: list[int] = []  # that may be the beginning of a character

    def add(self, ids: np.ndarray) -> Iterator[str]:
        waiting = self._bytes + [i for i in np.asarray(ids).tolist() if i >= N_SPECIAL]
        n_byte = next((n for n, i in enumerate(reversed(waiting)) if not self._is_byte(i)), len(waiting))
        certain, self._bytes = waiting[: len(waiting) - n_byte], waiting[len(waiting) - n_byte :]
        text = self._text(certain)
        if text:
            yield self._said(text)
        else:
            self._before += certain
        yield from self._characters()

    def rest(self) -> str:
        return self._text(self._bytes)

    def _characters(self) -> Iterator[str]:
        """Those of the waiting bytes that are whole, or certainly invalid: one for each byte."""
        text = self._text(self._bytes)
        if text and not text.endswith(BROKEN):
            self._bytes = []
            yield self._said(text)
            return
        done = 0
        while len(self._bytes) - done >= MAX_BYTES:
            next_bytes = self._bytes[done : done + MAX_BYTES]
            character = self._text(next_bytes)[0]
            # U+FFFD may also be in the text itself, as three bytes, of which two alone are no character.
            is_byte = character == BROKEN and self._text(next_bytes[:3]) != BROKEN
            done += 1 if is_byte else len(character.encode())
            yield self._said(character)
        self._bytes = self._bytes[done:]

    def _text(self, ids: list[int]) -> str:
        return self._decode(self._before + ids)[len(self._decode(self._before)) :]

    def _said(self, text: str) -> str:
        self._before = self._anchor
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(np.asarray(ids, np.int64)).decode()
