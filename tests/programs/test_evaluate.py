"""Evaluation: every token once, whatever the batch, the devices and the pieces."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from tests.data import books
from tests.model import small
from tvq import schema, sharding
from tvq.data import prepared
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.packing import Streams
from tvq.data.splits import Piece
from tvq.data.vocabulary import ByteVocabulary, to_json, train_sentencepiece
from tvq.model import transformer
from tvq.programs import evaluate

MODEL = dataclasses.replace(small.MODEL, p_dropemb=0.5, p_dropsin=0.5, p_dropres=0.5, p_droplyr=0.5)
T, N_SEQUENCE = 16, 5
UNREAD = {"sha256": "", "gzip_bytes": None}


@functools.cache
def split() -> dict[str, np.ndarray]:
    """Five sequences, the last of them padded after 7 tokens."""
    rng = np.random.default_rng(0)
    text = rng.integers(3, MODEL.n_vocab, (N_SEQUENCE, T + 1)).astype(np.int32)
    mask = np.ones((N_SEQUENCE, T), np.int32)
    mask[-1, 7:] = 0
    return {
        "inputs": text[:, :-1] * mask,
        "targets": text[:, 1:] * mask,
        "loss_mask": mask,
    }


class Sequences:
    """Those sequences as `Streams` gives them, `size` side by side; the last batch has masked rows."""

    def __init__(self, data: dict, size: int, length: int) -> None:
        n_more = -N_SEQUENCE % size
        self.data = {name: np.concatenate([x, np.zeros((n_more, T), np.int32)]) for name, x in data.items()}
        self.length, self.rows = length, range(size)

    def __len__(self) -> int:
        return len(self.data["inputs"]) // len(self.rows) * T // self.length

    def begins(self, number: int) -> bool:
        return number * self.length % T == 0

    def piece(self, number: int, rows: range) -> dict[str, np.ndarray]:
        batch, start = divmod(number * self.length, T)
        numbers = [batch * len(self.rows) + row for row in rows]
        return {name: x[numbers, start : start + self.length] for name, x in self.data.items()}

    def contexts(self, number: int) -> np.ndarray:
        return self.piece(number, self.rows)["loss_mask"] - 1


@functools.cache
def compiled(n_device: int):
    mesh = sharding.make(schema.Mesh(), jax.devices()[:n_device])
    return mesh, *evaluate.reader(MODEL, mesh)


def total(
    n_device: int, batch_size: int, piece_len: int = 8, data: dict | None = None, **more: Any
) -> tuple[float, int]:
    devices, *reader = compiled(n_device)
    whole = jax.device_put(small.parameters(MODEL), sharding.sharding(devices, sharding.WHOLE))
    sequences = Sequences(data or split(), batch_size, piece_len)
    found = evaluate.read_all(*reader, whole, sequences, devices, **more)
    return found.total, int(found.n_token.sum())


@functools.cache
def by_hand() -> tuple[float, int]:
    """One sequence after the other from the empty state, one token's loss after the other; no dropout."""
    data, nats, n_token = split(), 0.0, 0
    weights = small.parameters(MODEL)
    for b in range(N_SEQUENCE):
        inputs = data["inputs"][b : b + 1]
        empty = transformer.start(MODEL, 1)
        log_probs = np.asarray(small.log_probs(weights, inputs, empty, small.MODEL)[0], np.float64)
        for t in range(T):
            if data["loss_mask"][b, t]:
                nats -= log_probs[0, t, data["targets"][b, t]]
                n_token += 1
    return nats, n_token


def test_every_token_counts_once():
    nats, n_token = total(1, 2)
    assert n_token == by_hand()[1] == 4 * T + 7
    # Losses in float32, added up exactly.
    assert nats == pytest.approx(by_hand()[0], rel=1e-6)


def test_the_result_does_not_depend_on_the_batch_size():
    for size in (4, 5):
        nats, n_token = total(1, size)
        assert n_token == by_hand()[1]
        # XLA orders the sums of a product by its shape.
        assert nats == pytest.approx(total(1, 2)[0], rel=1e-6)


def test_the_result_does_not_depend_on_the_devices():
    nats, n_token = total(4, 4)
    assert n_token == by_hand()[1]
    assert nats == pytest.approx(total(1, 4)[0], rel=1e-6)
    # With one row on each device even the order of sums is the same.
    assert total(2, 2) == total(4, 4)


@pytest.mark.parametrize("piece_len", [4, 16])
def test_the_result_does_not_depend_on_the_pieces(piece_len):
    nats, n_token = total(1, 2, piece_len)
    assert n_token == by_hand()[1]
    assert nats == pytest.approx(total(1, 2)[0], rel=1e-6)


def test_padding_does_not_matter():
    data = {name: array.copy() for name, array in split().items()}
    data["inputs"][-1, 8:] = data["targets"][-1, 7:] = 5
    assert total(1, 2, data=data) == total(1, 2)
    data["targets"][-1, 6] ^= 1
    assert total(1, 2, data=data) != total(1, 2)


def test_progress_counts_pieces():
    seen: list[int] = []
    total(1, 2, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


def info(**counts: int) -> prepared.Split:
    return prepared.Split(**{"n_token": 0, "n_document": 1, "n_byte": 250, "n_word": 0} | counts, **UNREAD)


def test_result():
    got = evaluate.result(nats=300.0, n_token=200, info=info())
    assert got == {
        "loss": 1.5,
        "bits_per_token": pytest.approx(1.5 / math.log(2)),
        "bits_per_byte": pytest.approx(1.2 / math.log(2)),
        "n_token": 200,
        "n_byte": 250,
    }
    got = evaluate.result(nats=300.0, n_token=200, info=info(n_word=60))
    assert got["word_perplexity"] == pytest.approx(math.exp(5.0))
    # Without spaces there is only one word, and its perplexity is not a number.
    assert "word_perplexity" not in evaluate.result(nats=1e4, n_token=200, info=info(n_word=1))


@dataclasses.dataclass(frozen=True)
class Described:
    """What the line asks a corpus for."""

    image_size: int
    split: prepared.Split
    vocabulary: ByteVocabulary

    def info(self, name: str) -> prepared.Split:
        return self.split


def test_the_line_is_in_the_units_of_the_data():
    found = {"loss": 1.0, "bits_per_byte": 2.0}
    images = Described(64, info(), ByteVocabulary())
    assert evaluate.line("test", found, images) == "test loss 1.0000, 2.000 bits per dimension"
    text, found = Described(0, info(), ByteVocabulary("pieces")), found | {"word_perplexity": 26.634}
    want = "test loss 1.0000, 2.000 bits per byte, word perplexity 26.63"
    assert evaluate.line("test", found, text) == want


LENGTHS = (37, 3, 21, 0, 12)
CARRIED = dataclasses.replace(MODEL, n_vocab=259)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("corpus")
    pieces = [Piece("train", "0", b"x", last=True)]
    pieces += [Piece("test", str(i), rng.bytes(n), last=True) for i, n in enumerate(LENGTHS)]
    prepared.write(epath.Path(folder), pieces, prepared.text_form(ByteVocabulary()), {"name": "made"})
    return open_corpus(schema.Data(source="tokens", path=str(folder)))


def carried(made: Corpus, shape: schema.Mesh, n_row: int, length: int) -> evaluate.ByContext:
    mesh = sharding.make(shape, jax.devices()[: shape.devices * shape.sequence])
    whole = jax.device_put(small.parameters(CARRIED), sharding.sharding(mesh, sharding.WHOLE))
    streams = Streams(made, "test", n_row, length)
    return evaluate.read_all(*evaluate.reader(evaluate.apart(CARRIED), mesh), whole, streams, mesh)


@pytest.fixture(scope="module")
def by_place(made: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Each document alone in one call, one token's loss after the other, by its place in the document."""
    nats, n_token = np.zeros(64), np.zeros(64, np.int64)
    weights = small.parameters(CARRIED)
    ends = made.folders[0].documents("test")[:-1, 0].astype(int)
    for targets in np.split(made.folders[0].tokens("test").astype(np.int32), ends):
        inputs = np.zeros((1, 40), np.int32)
        inputs[0, : len(targets)] = [1, *targets[:-1]]
        model = dataclasses.replace(CARRIED, p_dropemb=0, p_dropsin=0, p_dropres=0, p_droplyr=0)
        log_probs, _ = small.log_probs(weights, inputs, transformer.start(model, 1), model)
        for t, target in enumerate(targets):
            nats[t] -= float(log_probs[0, t, target])
            n_token[t] += 1
    return nats, n_token


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "n_row", "length"),
    [(schema.Mesh(devices=1), 2, 8), (schema.Mesh(devices=2, sequence=2), 6, 16)],
)
def test_carried_is_each_document_alone(made, by_place, shape, n_row, length):
    """Though the model was trained across documents."""
    found, (nats, n_token) = carried(made, shape, n_row, length), by_place
    rows = found.table()
    assert [(row["context_from"], row["context_to"]) for row in rows] == [
        (0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63),
    ]  # fmt: skip
    for row in rows:
        span = slice(row["context_from"], row["context_to"] + 1)
        assert row["n_token"] == n_token[span].sum()
        assert row["loss"] == pytest.approx(nats[span].sum() / n_token[span].sum(), rel=1e-5)
    assert found.total == pytest.approx(nats.sum(), rel=1e-6)
    assert found.nats.sum() == pytest.approx(found.total, rel=1e-12)
    assert found.n_token.sum() == made.info("test").n_token == sum(LENGTHS) + len(LENGTHS)


def test_the_table_by_context():
    found = evaluate.ByContext()
    found.add(np.asarray([[1.0, 2.0, 3.0, 9.0]], np.float32), np.asarray([[0, 2, 3, -1]]))
    found.add(np.asarray([[4.0]], np.float32), np.asarray([[5]]))
    assert evaluate.show(found.table()).splitlines()[1:] == [
        "                       0   1.0000        1.4427              1",
        "                  2 to 3   2.5000        3.6067              2",
        "                  4 to 7   4.0000        5.7708              1",
    ]


def test_data_of_another_vocabulary(tmp_path):
    trained, other = books.vocabulary(), train_sentencepiece(iter(books.book(7).split("\n")), 120)
    folder = epath.Path(tmp_path)
    prepared.write(folder, [Piece("train", "a", b"kalo mi", last=True)], prepared.text_form(trained), {})
    corpus = open_corpus(schema.Data(source="tokens", path=str(folder)))
    data = lambda known: {"vocabulary": to_json(known)}
    evaluate.check_same_vocabulary(corpus, 3, data(trained))
    with pytest.raises(ValueError, match=r"has the vocabulary .*, checkpoint 3 was trained on"):
        evaluate.check_same_vocabulary(corpus, 3, data(other))


def test_what_is_unknown_is_said():
    got = evaluate.result(nats=300.0, n_token=200, info=dataclasses.replace(info(), n_unknown=50))
    assert got["n_unknown"] == 50
    pieces = Described(0, info(n_token=200, n_unknown=50), ByteVocabulary("pieces"))
    assert "; 50 tokens, 25 %, are the unknown piece" in evaluate.line("test", got, pieces)


def test_no_byte():
    with pytest.raises(ValueError, match="or only end ids"):
        evaluate.result(1.0, 3, info(n_byte=0))


def test_no_token():
    assert evaluate.ByContext().total == 0.0
    with pytest.raises(ValueError, match="no token"):
        evaluate.result(0.0, 0, info())
