"""Small corpora made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvq import config
from tvq.data import prepared
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.documents import SPLITS, Document
from tvq.data.vocabulary import ByteVocabulary


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[..., Corpus]:
    """Builds a corpus from the documents of each split: `corpus_of(train=[b"ab"], validation=[])`."""

    def build(**texts: list[bytes]) -> Corpus:
        documents = []
        for split in SPLITS:
            for i, text in enumerate(texts.get(split, [])):
                path = tmp_path / f"{split}{i}.txt"
                path.write_bytes(text)
                documents.append(
                    Document(split=split, name=path.name, path=path, start=0, stop=len(text), mtime_ns=0)
                )
        folder = tmp_path / "prepared"
        folder.mkdir()
        prepared.write(folder, documents, ByteVocabulary(), {"name": "made"})
        return open_corpus(config.Data(source="tokens", path=str(folder)))

    return build


@pytest.fixture
def random_corpus(corpus_of: Callable[..., Corpus]) -> Corpus:
    """169 tokens to train on, 80 to validate on."""
    rng = np.random.default_rng(0)
    return corpus_of(train=[rng.bytes(n) for n in (37, 0, 100, 28)], validation=[rng.bytes(79)])
