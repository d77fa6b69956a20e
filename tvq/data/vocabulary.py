"""Token ids: three special ones, then what a vocabulary makes of text."""

import base64
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from tvq.data import optional
from tvq.errors import InputError
from tvq.schema import END, PAD, UNKNOWN

N_SPECIAL = len((PAD, END, UNKNOWN))


class Vocabulary(Protocol):
    """Text to ids and back. `name`, `size` and `model` describe it completely."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def model(self) -> bytes: ...

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """Byte b is id b + 3."""

    name: str = "bytes"
    size: int = N_SPECIAL + 256
    model: bytes = b""

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [len(text)], without an end id."""
        return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(N_SPECIAL)

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of integer ids of any shape, in order; special ids give nothing.

        InputError: an id is outside the vocabulary.
        """
        ids = _checked(ids, self)
        return (ids[ids >= N_SPECIAL] - N_SPECIAL).astype(np.uint8).tobytes()


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """The pieces of a SentencePiece model, whose file is `model`. Safe to use from several threads.

    InputError: the package is missing, or the model has other special ids or more pieces than fit uint16.
    """

    model: bytes = dataclasses.field(repr=False)
    name: str = "sentencepiece"
    processor: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        package = optional.load("sentencepiece")
        try:
            processor = package.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise InputError(
                f"the vocabulary of {len(self.model)} bytes is not a SentencePiece model"
            ) from error
        object.__setattr__(self, "processor", processor)
        special = (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id())
        if special != (PAD, END, UNKNOWN, -1):
            raise InputError(
                f"the SentencePiece model has pad, end, unknown and begin ids {special}, it needs"
                f" {(PAD, END, UNKNOWN, -1)}; train it with pad_id=0, eos_id=1, unk_id=2 and bos_id=-1"
            )
        if self.size > 1 << 16:
            raise InputError(f"the SentencePiece model has {self.size} pieces, tokens have room for 65536")

    def __reduce__(self) -> tuple:
        return SentencePieceVocabulary, (self.model,)

    @property
    def size(self) -> int:
        return self.processor.vocab_size()

    @property
    def splits_at_spaces(self) -> bool:
        """Whether text may be cut at any white space and encoded in parts, with the same result."""
        encode = self.processor.encode
        return encode("a b\n\n c") == encode("a") + encode("b") + encode("c")

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 ids of UTF-8 text, without an end id. UnicodeDecodeError: it is not UTF-8."""
        return np.array(self.processor.encode(text.decode()), np.uint16)

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of integer ids of any shape, in order; special ids give nothing.

        InputError: an id is outside the vocabulary.
        """
        ids = _checked(ids, self)
        return self.processor.decode(ids[ids >= N_SPECIAL].tolist()).encode()


def _checked(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    ids = np.asarray(ids)
    strange = (ids < 0) | (ids >= vocabulary.size)
    if strange.any():
        raise InputError(
            f"id {ids[strange][0]} is outside the vocabulary {vocabulary.name!r} of {vocabulary.size} ids"
        )
    return ids


def train_sentencepiece(sentences: Iterator[str], n_piece: int) -> SentencePieceVocabulary:
    """A BPE vocabulary, as in the paper, from sentences (text between line ends), which must fit in memory.

    InputError: the package is missing, or there is too little text for so many pieces; or what `sentences`
    raise.
    """
    model = io.BytesIO()
    failed: list[InputError] = []

    def watched() -> Iterator[str]:  # SentencePiece would hide the error in one of its own
        try:
            yield from sentences
        except InputError as error:
            failed.append(error)
            raise

    try:
        optional.load("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            vocab_size=n_piece,
            model_type="bpe",
            character_coverage=1.0,
            pad_id=PAD,
            eos_id=END,
            unk_id=UNKNOWN,
            bos_id=-1,
            max_sentence_length=1 << 30,  # or longer lines would be left out
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        reason = str(error).rpartition("]")[2].strip() or "no text"
        raise InputError(
            f"cannot train {n_piece} pieces on this text ({reason}); give more text, or another --pieces"
        ) from error
    return SentencePieceVocabulary(model.getvalue())


VOCABULARIES: dict[str, Callable[[bytes], Vocabulary]] = {
    "bytes": lambda model: ByteVocabulary(),
    "sentencepiece": SentencePieceVocabulary,
}


def describe(vocabulary: Vocabulary) -> dict[str, Any]:
    """What identifies a vocabulary, for JSON."""
    sha256 = hashlib.sha256(vocabulary.model).hexdigest()
    return {"name": vocabulary.name, "size": vocabulary.size, "sha256": sha256}


def to_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """All of a vocabulary, for a checkpoint."""
    return describe(vocabulary) | {"model": base64.b64encode(vocabulary.model).decode()}


def from_json(entry: dict[str, Any]) -> Vocabulary:
    """The vocabulary that `to_json` described."""
    return VOCABULARIES[entry["name"]](base64.b64decode(entry["model"]))
