"""Documents end to end, cut into sequences of equal length; or each kept whole, in rows read side by side."""

import functools
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tvq.data.corpus import AnyCorpus, Corpus, Span
from tvq.data.vocabulary import END, PAD
from tvq.errors import InputError

Example = dict[str, np.ndarray]
FILLER = -1  # the number of a sequence that is padding alone
STREAMED = ("inputs", "targets", "loss_mask")


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

    def __init__(self, corpus: AnyCorpus, split: str, sequence_len: int) -> None:
        if sequence_len < 1:
            raise InputError(f"config.train.sequence_len must be at least 1, not {sequence_len}")
        self.corpus, self.split, self.sequence_len = corpus, split, sequence_len
        self.n_token = corpus.info(split).n_token
        counts = [-(-part.splits[split].n_token // sequence_len) for part in corpus.parts]
        self.starts = [0, *np.cumsum(counts).tolist()]  # the number of the first sequence of each folder

    @functools.cached_property
    def _readers(self) -> list[Callable[[Sequence[Span]], list[np.ndarray]] | None]:
        parts = self.corpus.parts
        return [part.reader(self.split) if part.splits[self.split].n_token else None for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example:
        """`features` of sequence `index`, int32 [T] each."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(self, indices: Sequence[int]) -> Example:
        """`features` of the sequences of these numbers, in order; `FILLER` is one of padding alone."""
        targets_BT = np.full((len(indices), self.sequence_len), PAD, np.int32)
        n_token_B = np.zeros(len(indices), np.int64)
        for part, (first, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            rows = [row for row, index in enumerate(indices) if first <= index < end]
            if rows:
                sequences = self._read(part, [indices[row] - first for row in rows])
                for row, tokens in zip(rows, sequences, strict=True):
                    targets_BT[row, : len(tokens)] = tokens
                    n_token_B[row] = len(tokens)
        return features(targets_BT, n_token_B)

    def _read(self, part: int, indices: list[int]) -> list[np.ndarray]:
        """The tokens of sequences of one folder."""
        corpus, read = self.corpus.parts[part], self._readers[part]
        assert read is not None, "a sequence of an empty split"
        starts = [index * self.sequence_len for index in indices]
        n_token = corpus.splits[self.split].n_token
        sequences = read([(start, min(start + self.sequence_len, n_token)) for start in starts])
        for start, tokens in zip(starts, sequences, strict=True):
            check_ids(corpus, self.split, start, tokens)
        return sequences


def check_ids(corpus: Corpus, split: str, start: int, tokens: np.ndarray) -> None:
    """InputError: one of the tokens, which begin at `start` in the split, is outside the vocabulary."""
    size = corpus.vocabulary.size
    if tokens.max() >= size:
        at = int(np.argmax(tokens >= size))
        raise InputError(
            f"config.data.path: token {start + at} of {corpus.tokens_path(split)} is id"
            f" {tokens[at]}, outside the vocabulary {corpus.vocabulary.name!r} of {size} ids;"
            " prepare the folder again, with this vocabulary"
        )


class Streams:
    """The documents of a split, each whole, in rows that are read side by side, `length` tokens at a time.

    The longest documents go first, each to the row that has the fewest tokens. InputError: the split is
    empty; when a piece is read, a token is outside the vocabulary.
    """

    def __init__(self, corpus: AnyCorpus, split: str, n_row: int, length: int) -> None:
        self.corpus, self.split, self.length = corpus, split, length
        self.n_token = corpus.info(split).n_token
        documents = []
        for part, folder in enumerate(corpus.parts):
            stops = folder.documents(split)[:, 0].astype(np.int64)
            for start, stop in zip([0, *stops[:-1].tolist()], stops.tolist(), strict=False):
                documents.append((stop - start, part, start))
        rows: list[list[tuple[int, int, int]]] = [[] for _ in range(n_row)]
        shortest = [(0, row) for row in range(n_row)]
        for n, part, start in sorted(documents, key=lambda document: -document[0]):
            n_row_token, row = heapq.heappop(shortest)
            rows[row].append((n, part, start))
            heapq.heappush(shortest, (n_row_token + n, row))
        # For each row, the place of every document in it, its folder and its place there.
        self.rows = [np.array(row, np.int64).reshape(-1, 3) for row in rows]
        self.offsets = [np.concatenate([[0], np.cumsum(row[:, 0])]) for row in self.rows]
        self._readers = [part.reader(split) if part.splits[split].n_token else None for part in corpus.parts]

    def __len__(self) -> int:
        """Pieces until the longest row has ended."""
        return -(-max(int(offsets[-1]) for offsets in self.offsets) // self.length)

    def piece(self, number: int, rows: Sequence[int]) -> Example:
        """`inputs, targets, loss_mask` int32 [rows, length] of some rows. An end id begins each document."""
        piece = {name: np.full((len(rows), self.length), PAD, np.int32) for name in STREAMED}
        for i, row in enumerate(rows):
            for place, n, context, part, start in self._spans(number, row):
                read, before = self._readers[part], min(context, 1)
                assert read is not None, "a document of an empty split"
                (tokens,) = read([(start - before, start + n)])
                check_ids(self.corpus.parts[part], self.split, start - before, tokens)
                piece["targets"][i, place : place + n] = tokens[before:]
                piece["inputs"][i, place] = tokens[0] if before else END
                piece["inputs"][i, place + 1 : place + n] = tokens[before:-1]
                piece["loss_mask"][i, place : place + n] = 1
        return piece

    def contexts(self, number: int) -> np.ndarray:
        """int64 [n_row, length]: how many tokens of its document come before each; -1 for padding."""
        contexts = np.full((len(self.rows), self.length), -1)
        for row in range(len(self.rows)):
            for place, n, context, *_ in self._spans(number, row):
                contexts[row, place : place + n] = np.arange(context, context + n)
        return contexts

    def _spans(self, number: int, row: int) -> Iterator[tuple[int, int, int, int, int]]:
        """The part of each document in a piece: place in it, tokens, those before, folder, place there."""
        first, offsets = number * self.length, self.offsets[row]
        i = int(np.searchsorted(offsets, first, "right")) - 1
        while i < len(self.rows[row]) and offsets[i] < first + self.length:
            begin, end = max(first, int(offsets[i])), min(first + self.length, int(offsets[i + 1]))
            if begin < end:
                _, part, start = self.rows[row][i].tolist()
                context = begin - int(offsets[i])
                yield begin - first, end - begin, context, part, start + context
            i += 1
