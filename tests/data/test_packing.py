import pickle

import numpy as np
import pytest

from tvq.data.packing import Sequences, Streams


def test_by_hand(corpus_of):
    # a = 100, b = 101, ... ; tokens: a b 1 | c 1 1 | d 1
    sequences = Sequences(corpus_of(train=[b"ab", b"c", b"", b"d"]), "train", 3)
    a = 97 + 3
    wanted = [
        {"inputs": [1, a, a + 1], "targets": [a, a + 1, 1], "loss_mask": [1, 1, 1]},
        {"inputs": [1, a + 2, 1], "targets": [a + 2, 1, 1], "loss_mask": [1, 1, 1]},
        {"inputs": [1, a + 3, 1], "targets": [a + 3, 1, 0], "loss_mask": [1, 1, 0]},
    ]
    assert len(sequences) == 3
    for i, row in enumerate(wanted):
        for name, values in row.items():
            assert sequences[i][name].dtype == np.int32
            np.testing.assert_array_equal(sequences[i][name], values, err_msg=f"{name} of {i}")


def test_one_long_sequence_is_padded(corpus_of):
    sequences = Sequences(corpus_of(train=[b"x"]), "train", 4)
    assert len(sequences) == 1
    np.testing.assert_array_equal(sequences[0]["targets"], [123, 1, 0, 0])
    np.testing.assert_array_equal(sequences[0]["loss_mask"], [1, 1, 0, 0])


def test_a_batch_is_its_sequences(random_corpus):
    sequences = Sequences(random_corpus, "train", 16)
    order = [10, 0, 3, 3]
    batch = sequences.batch(order)
    for row, index in enumerate(order):
        for name, values in sequences[index].items():
            assert batch[name].dtype == np.int32
            np.testing.assert_array_equal(batch[name][row], values)


@pytest.mark.parametrize("sequence_len", [1, 2, 7, 16, 1000])
def test_every_token_once_in_order(random_corpus, sequence_len):
    sequences = Sequences(random_corpus, "train", sequence_len)
    rows = [sequences[i] for i in range(len(sequences))]
    tokens = np.concatenate([row["targets"][row["loss_mask"] == 1] for row in rows])
    np.testing.assert_array_equal(tokens, random_corpus.folders[0].tokens("train"))
    assert all(row["inputs"][0] == 1 for row in rows)


def test_index_outside(random_corpus):
    sequences = Sequences(random_corpus, "train", 16)
    for index in (-1, len(sequences)):
        with pytest.raises(IndexError):
            sequences[index]


def test_pickles_without_its_tokens(random_corpus):
    sequences = Sequences(random_corpus, "train", 16)
    unread = len(pickle.dumps(sequences))
    sequences[0]
    assert len(pickle.dumps(sequences)) == unread < 2000
    copy = pickle.loads(pickle.dumps(sequences))
    np.testing.assert_array_equal(copy[3]["targets"], sequences[3]["targets"])


def test_token_outside_the_vocabulary(random_corpus):
    path = random_corpus.folders[0].tokens_path("train")
    tokens = np.fromfile(path, "<u2")
    tokens[37] = 259
    tokens.tofile(path)
    sequences = Sequences(random_corpus, "train", 16)
    sequences[1]
    with pytest.raises(ValueError, match=r"token 37 of .*train\.tokens is id 259, .* 259 ids"):
        sequences[2]


def test_sequence_len_of_nothing(random_corpus):
    with pytest.raises(ValueError, match=r"sequence_len must be at least 1, not 0"):
        Sequences(random_corpus, "train", 0)


def test_empty_split(random_corpus):
    with pytest.raises(ValueError, match=r"the test split of .* is empty; .*"):
        Sequences(random_corpus, "test", 16)


def documents(corpus, split: str) -> list[np.ndarray]:
    return np.split(corpus.folders[0].tokens(split), corpus.folders[0].documents(split)[:-1, 0].astype(int))


@pytest.mark.parametrize("n_row", [1, 2, 3, 43, 60])
@pytest.mark.parametrize(("sequence_len", "length"), [(5, 5), (16, 4)])
def test_streams_of_sequences_are_those_of_training(random_corpus, n_row, sequence_len, length):
    """Row r of each batch in order, the last filled up with masked rows, whatever rows are asked for."""
    for split in ("train", "validation"):
        sequences = Sequences(random_corpus, split, sequence_len)
        streams = Streams(random_corpus, split, n_row, length, sequence_len)
        n_piece = sequence_len // length
        n_batch = -(-len(sequences) // n_row)
        assert [streams.begins(i) for i in range(len(streams))] == n_batch * [True, *[False] * (n_piece - 1)]
        for batch in range(n_batch):
            numbers = range(batch * n_piece, (batch + 1) * n_piece)
            pieces = [streams.piece(number, range(n_row)) for number in numbers]
            whole = {name: np.concatenate([piece[name] for piece in pieces], 1) for name in pieces[0]}
            context = np.concatenate([streams.contexts(number) for number in numbers], 1)
            first = batch * n_row
            want = sequences.batch(range(first, min(first + n_row, len(sequences))))
            n = len(want["targets"])
            np.testing.assert_array_equal(whole["loss_mask"], context >= 0)
            for name, values in want.items():
                assert whole[name].dtype == np.int32
                if name == "inputs":  # behind the last token nothing is read
                    values, whole[name] = values * want["loss_mask"], whole[name] * whole["loss_mask"]
                np.testing.assert_array_equal(whole[name][:n], values)
                assert not whole[name][n:].any()
            np.testing.assert_array_equal(
                streams.piece(numbers[0], [n - 1])["targets"], pieces[0]["targets"][n - 1 : n]
            )


@pytest.mark.parametrize(("n_row", "length"), [(1, 7), (3, 8), (9, 5)])
def test_streams_hold_whole_documents(random_corpus, n_row, length):
    """Each once, from an end id on, in one row; whatever rows are asked for."""
    streams = Streams(random_corpus, "train", n_row, length)
    pieces = [streams.piece(number, range(n_row)) for number in range(len(streams))]
    whole = {name: np.concatenate([piece[name] for piece in pieces], 1) for name in pieces[0]}
    context = np.concatenate([streams.contexts(number) for number in range(len(streams))], 1)
    np.testing.assert_array_equal(whole["loss_mask"], context >= 0)
    found = []
    for row in range(n_row):
        ends = np.flatnonzero(context[row] == 0)
        for start, stop in zip(ends, [*ends[1:], (context[row] >= 0).sum()], strict=False):
            np.testing.assert_array_equal(context[row, start:stop], np.arange(stop - start))
            targets, inputs = whole["targets"][row, start:stop], whole["inputs"][row, start:stop]
            np.testing.assert_array_equal(inputs, [1, *targets[:-1]])
            found.append(tuple(targets))
    assert sorted(found) == sorted(tuple(tokens) for tokens in documents(random_corpus, "train"))
    part = streams.piece(1, [n_row - 1])
    np.testing.assert_array_equal(part["targets"], pieces[1]["targets"][-1:])


def test_streams_are_of_like_lengths(corpus_of):
    streams = Streams(corpus_of(train=[b"x" * n for n in (9, 1, 4, 3, 5, 8)]), "train", 3, 4)
    assert [int(offsets[-1]) for offsets in streams.offsets] == [12, 13, 11]
    assert len(streams) == 4


def test_streams_are_of_the_vocabulary(corpus_of):
    corpus = corpus_of(train=[b"abc"])
    np.memmap(corpus.folders[0].tokens_path("train"), "<u2", mode="r+")[2] = 259
    with pytest.raises(ValueError, match=r"token 2 of .*train.tokens is id 259"):
        Streams(corpus, "train", 1, 2).piece(1, [0])
