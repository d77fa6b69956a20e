"""Documents end to end, cut into sequences of equal length; or each kept whole, in rows read side by side."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from tvq.data.corpus import Corpus, Tokens
from tvq.data.vocabulary import END, PAD
from tvq.errors import InputError

Example = dict[str, np.ndarray]


def features(targets_BT: np.ndarray, n_token_B: np.ndarray) -> Example:
    """What the model is given: `inputs, targets, loss_mask`, int32 [B, T].

    `targets_BT` int32 are the `n_token_B` tokens of each sequence, then padding, which `loss_mask` marks with
    0. `inputs` are an end id, then the targets shifted right.
    """
    inputs_BT = np.empty_like(targets_BT)
    inputs_BT[:, :1], inputs_BT[:, 1:] = END, targets_BT[:, :-1]
    return {
        "inputs": inputs_BT,
        "targets": targets_BT,
        "loss_mask": (np.arange(targets_BT.shape[1]) < n_token_B[:, None]).astype(np.int32),
    }


class Sequences:
    """Random access to the T-token sequences of a split; the last of each folder is padded.

    Those of a mixture's folders follow one another. Pickles without its tokens. InputError: the split is
    empty; when a sequence is read, a token is outside the vocabulary.
    """

    def __init__(self, corpus: Corpus, split: str, sequence_len: int) -> None:
        _check_length(sequence_len)
        self.n_token = corpus.info(split).n_token
        self.corpus, self.sequence_len = corpus, sequence_len
        self._tokens, self._sizes = Tokens(corpus, split), _sizes(corpus, split)
        counts = [-(-n // sequence_len) for n in self._sizes]
        self.starts = [0, *np.cumsum(counts).tolist()]  # the number of the first sequence of each folder

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example:
        """`features` of sequence `index`, int32 [T] each."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> Example:
        """`features` of the sequences of these numbers, in order."""
        targets_BT = np.full((len(indices), self.sequence_len), PAD, np.int32)
        n_token_B = np.zeros(len(indices), np.int64)
        for number, (first, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            rows = [row for row, index in enumerate(indices) if first <= index < end]
            starts = [(indices[row] - first) * self.sequence_len for row in rows]
            spans = [(start, min(start + self.sequence_len, self._sizes[number])) for start in starts]
            for row, tokens in zip(rows, self._tokens.read(number, spans) if rows else [], strict=True):
                targets_BT[row, : len(tokens)] = tokens
                n_token_B[row] = len(tokens)
        return features(targets_BT, n_token_B)


def _check_length(sequence_len: int) -> None:
    if sequence_len < 1:
        raise InputError(f"config.train.sequence_len must be at least 1, not {sequence_len}")


def _sizes(corpus: Corpus, split: str) -> list[int]:
    """The tokens of a split in each folder."""
    return [folder.splits[split].n_token for folder in corpus.folders]


class Streams:
    """The texts of a split in rows that are read side by side, `length` tokens at a time: random access.

    With `sequence_len` the texts are the sequences that training reads, in order; `begins` tells where all
    rows begin a new one. Without, they are documents, each whole: the longest go first, each to the row that
    has the fewest tokens. InputError: the split is empty; when a piece is read, a token is outside the
    vocabulary.
    """

    def __init__(self, corpus: Corpus, split: str, n_row: int, length: int, sequence_len: int = 0) -> None:
        assert sequence_len % length == 0, "a sequence is whole pieces"
        self.n_token = corpus.info(split).n_token
        self.length, self._sequence_len = length, sequence_len
        self._tokens = Tokens(corpus, split)
        # For each row, the texts in it: tokens, folder, the first token there.
        self.rows = (
            _sequences(corpus, split, n_row, sequence_len) if sequence_len else _whole(corpus, split, n_row)
        )
        # And the place of each in the row.
        size = lambda row: np.full(len(row), sequence_len) if sequence_len else row[:, 0]
        self.offsets = [np.concatenate([[0], np.cumsum(size(row))]) for row in self.rows]

    def __len__(self) -> int:
        """Pieces until the longest row has ended."""
        return -(-max(int(offsets[-1]) for offsets in self.offsets) // self.length)

    def begins(self, number: int) -> bool:
        """Whether a piece is read from the empty state."""
        period = self._sequence_len or len(self) * self.length
        return number * self.length % period == 0

    def piece(self, number: int, rows: Sequence[int]) -> Example:
        """`inputs, targets, loss_mask` int32 [rows, length] of some rows. An end id begins each text."""
        names = "inputs", "targets", "loss_mask"
        piece = {name: np.full((len(rows), self.length), PAD, np.int32) for name in names}
        spans = [(i, *span) for i, row in enumerate(rows) for span in self._spans(number, row)]
        for folder in sorted({span[4] for span in spans}):
            here = [span for span in spans if span[4] == folder]
            read = self._tokens.read(folder, [(at - min(before, 1), at + n) for *_, n, before, _, at in here])
            for (i, place, n, before, *_), tokens in zip(here, read, strict=True):
                piece["targets"][i, place : place + n] = tokens[-n:]
                piece["inputs"][i, place] = tokens[0] if before else END
                piece["inputs"][i, place + 1 : place + n] = tokens[-n:-1]
                piece["loss_mask"][i, place : place + n] = 1
        return piece

    def contexts(self, number: int) -> np.ndarray:
        """int64 [n_row, length]: how many tokens of its text come before each; -1 for padding."""
        contexts = np.full((len(self.rows), self.length), -1)
        for row in range(len(self.rows)):
            for place, n, before, *_ in self._spans(number, row):
                contexts[row, place : place + n] = np.arange(before, before + n)
        return contexts

    def _spans(self, number: int, row: int) -> Iterator[tuple[int, int, int, int, int]]:
        """The part of each text in a piece: place in it, tokens, those before, folder, place there."""
        first, offsets = number * self.length, self.offsets[row]
        i = int(np.searchsorted(offsets, first, "right")) - 1
        while i < len(self.rows[row]) and offsets[i] < first + self.length:
            n, folder, start = self.rows[row][i].tolist()
            begin, end = max(first, int(offsets[i])), min(first + self.length, int(offsets[i]) + n)
            if begin < end:
                before = begin - int(offsets[i])
                yield begin - first, end - begin, before, folder, start + before
            i += 1


def _sequences(corpus: Corpus, split: str, n_row: int, sequence_len: int) -> list[np.ndarray]:
    """Row r has the sequences r, r + n_row, ..."""
    texts = []
    for folder, n_token in enumerate(_sizes(corpus, split)):
        starts = np.arange(0, n_token, sequence_len)
        sizes = np.minimum(n_token - starts, sequence_len)
        texts.append(np.stack([sizes, np.full_like(starts, folder), starts], 1))
    joined = np.concatenate(texts)
    return [joined[row::n_row] for row in range(n_row)]


def _whole(corpus: Corpus, split: str, n_row: int) -> list[np.ndarray]:
    """Documents in rows of like lengths."""
    documents = []
    for number, folder in enumerate(corpus.folders):
        stops = folder.documents(split)[:, 0].astype(np.int64)
        for start, stop in zip([0, *stops[:-1].tolist()], stops.tolist(), strict=False):
            documents.append((stop - start, number, start))
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(n_row)]
    shortest = [(0, row) for row in range(n_row)]
    for document in sorted(documents, key=lambda document: -document[0]):
        n_token, row = heapq.heappop(shortest)
        rows[row].append(document)
        heapq.heappush(shortest, (n_token + document[0], row))
    return [np.array(row, np.int64).reshape(-1, 3) for row in rows]
