"""Several prepared folders as one: shares, order, evaluation, and what is rejected."""

import contextlib
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tests.data import books
from tvq import config, schema
from tvq.data import prepared
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.packing import Sequences, Streams
from tvq.data.pipeline import evaluation_pieces, training_batches
from tvq.data.splits import Piece
from tvq.data.vocabulary import ByteVocabulary, Vocabulary

T = 4


def put(folder: Path, splits: dict[str, bytes], vocabulary: Vocabulary) -> Path:
    folder.mkdir()
    pieces = [Piece(split, "a", text, last=True) for split, text in splits.items()]
    prepared.write(epath.Path(folder), pieces, prepared.text_form(vocabulary), {"name": "made"})
    return folder


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Of 80 and 50 sequences to train on; the first alone has something to test on."""
    rng = np.random.default_rng(0)
    a = {"train": rng.bytes(319), "validation": rng.bytes(9), "test": rng.bytes(5)}
    b = {"train": rng.bytes(199), "validation": rng.bytes(6)}
    return put(tmp_path / "a", a, ByteVocabulary()), put(tmp_path / "b", b, ByteVocabulary())


def mixed(folders: tuple[Path, Path], weights: tuple[float, float] = (3, 1)) -> Corpus:
    mix = ",".join(f"{folder}:{weight}" for folder, weight in zip(folders, weights, strict=True))
    return open_corpus(schema.Data(source="tokens", mix=mix))


def numbers(mixture: Corpus, n: int, start: int = 0, rows: slice = slice(None)) -> list[int]:
    """Of the sequences in the batches of 8 from `start` on."""
    sequences = Sequences(mixture, "train", T)
    known = {sequences[i]["targets"].tobytes(): i for i in range(len(sequences))}
    with contextlib.closing(
        training_batches(sequences, batch_size=8, seed=0, start=start, rows=rows)
    ) as batches:
        return [known[row.tobytes()] for _ in range(n) for row in next(batches)["targets"]]


def test_shares(folders):
    order = numbers(mixed(folders), 40)
    assert [sum(i < 80 for i in order[at : at + 8]) for at in range(0, 320, 8)] == [6] * 40
    assert sorted(i for i in order if i < 80)[::3] == list(range(80)), "three epochs of the first"
    assert set(Counter(i for i in order if i >= 80).values()) <= {1, 2}


def test_folders_of_one_size_have_orders_of_their_own(folders):
    order = numbers(mixed((folders[0], folders[0]), (1, 1)), 20)
    assert order[::2] != order[1::2]


def test_batch_t_is_a_function_of_t(folders):
    mixture = mixed(folders)
    order = numbers(mixture, 12)
    assert numbers(pickle.loads(pickle.dumps(mixture)), 5, start=7) == order[56:]
    assert numbers(mixture, 3, start=2, rows=slice(2, 4)) == [
        i for at in (16, 24, 32) for i in order[at + 2 : at + 4]
    ]


def test_evaluation_reads_all_of_each(folders):
    mixture = mixed(folders)
    for split, n_token in (("validation", 17), ("test", 6)):
        streams = Streams(mixture, split, 1, T, T)
        batches = list(evaluation_pieces(streams, [0]))
        seen = np.concatenate([b["targets"][b["loss_mask"] == 1] for b in batches])
        parts = [folder.tokens(split) for folder in mixture.folders if folder.splits[split].n_token]
        np.testing.assert_array_equal(seen, np.concatenate(parts))
        assert len(seen) == streams.n_token == mixture.info(split).n_token == n_token


def test_counts(folders):
    mixture = mixed(folders)
    info = mixture.info("train")
    assert (info.n_token, info.n_byte, info.n_document) == (520, 518, 2)
    assert mixture.bytes_per_token == pytest.approx(0.75 * 319 / 320 + 0.25 * 199 / 200)


def test_the_fingerprint_covers_folders_and_weights(folders):
    found = [mixed(folders), mixed(folders[::-1]), mixed(folders, (1, 1))]
    assert len({mixture.fingerprint for mixture in found}) == 3
    assert mixed(folders, (6, 2)).fingerprint == found[0].fingerprint


@pytest.mark.parametrize("mix", ["a", "a:0", "a:-1,b:1", ":1", "a:1,", "a:nan", "a:inf"])
def test_written_otherwise(mix):
    with pytest.raises(ValueError, match=r"config\.data\.mix must be FOLDER:WEIGHT,FOLDER:WEIGHT with pos"):
        open_corpus(schema.Data(source="tokens", mix=mix))


def test_a_folder_that_is_none(folders, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.mix: .*gone is not a prepared folder"):
        mixed((folders[0], tmp_path / "gone"))


def test_other_vocabulary(folders, tmp_path):
    other = put(tmp_path / "c", {"train": b"kalo mi"}, books.vocabulary())
    with pytest.raises(ValueError, match=r"mix: .*a and .*c have the vocabularies .*bytes.* and .*sentencep"):
        mixed((folders[0], other))
    manifest = folders[1] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"image_size": 64}))
    with pytest.raises(ValueError, match=r"config\.data\.mix: .*a and .*b have"):
        mixed(folders)


def test_an_empty_split(folders):
    with pytest.raises(ValueError, match=r"config\.data\.mix: the test split of .*b \(0\.75\).* is empty"):
        mixed((folders[1], folders[1])).info("test")


def test_mix_stands_alone():
    for changes in ({"path": "x", "source": "tokens"}, {"source": "text", "path": "x"}, {}):
        settings = config.base()
        settings.data.update({"mix": "a:1,b:1"} | changes)
        with pytest.raises(ValueError, match=r"config\.data\.mix names prepared folders: it needs"):
            config.build(settings)
