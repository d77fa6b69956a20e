"""Token ids: three special ones, then what a vocabulary makes of text."""

import dataclasses
from typing import Protocol

import numpy as np

PAD, END, UNKNOWN = 0, 1, 2
N_SPECIAL = 3


class Vocabulary(Protocol):
    """Text to ids and back. `name` and `size` are what a prepared folder remembers of it."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """Byte b is id b + 3."""

    name: str = "bytes"
    size: int = N_SPECIAL + 256

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [len(text)], without an end id."""
        return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(N_SPECIAL)

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of integer ids of any shape, in order; special ids give nothing.

        ValueError: an id is outside the vocabulary.
        """
        ids = np.asarray(ids)
        strange = (ids < 0) | (ids >= self.size)
        if strange.any():
            raise ValueError(f"id {ids[strange][0]} is outside the byte vocabulary of {self.size} ids")
        return (ids[ids >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()


VOCABULARIES: dict[str, type[ByteVocabulary]] = {"bytes": ByteVocabulary}
