"""Small corpora made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tvq import schema
from tvq.data import prepared
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.splits import Piece
from tvq.data.vocabulary import ByteVocabulary


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[..., Corpus]:
    """Builds a corpus from the documents of each split: `corpus_of(train=[b"ab"], validation=[])`."""

    def build(**texts: list[bytes]) -> Corpus:
        folder = tmp_path / "prepared"
        folder.mkdir()
        pieces = [
            Piece(split, f"{split}{i}.txt", text, last=True)
            for split, found in texts.items()
            for i, text in enumerate(found)
        ]
        prepared.write(epath.Path(folder), pieces, prepared.text_form(ByteVocabulary()), {"name": "made"})
        return open_corpus(schema.Data(source="tokens", path=str(folder)))

    return build


@pytest.fixture
def random_corpus(corpus_of: Callable[..., Corpus]) -> Corpus:
    """169 tokens to train on, 80 to validate on."""
    rng = np.random.default_rng(0)
    return corpus_of(train=[rng.bytes(n) for n in (37, 0, 100, 28)], validation=[rng.bytes(79)])
