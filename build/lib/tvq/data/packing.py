"""Documents end to end, cut into sequences of equal length."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tvq.data.corpus import AnyCorpus, Span
from tvq.data.vocabulary import END, PAD

Example = dict[str, np.ndarray]
FILLER = -1  # the number of a sequence that is padding alone


def features(targets_BT: np.ndarray, n_token_B: np.ndarray) -> Example:
    """What the model is given: `inputs, targets, doc_ids, loss_mask`, int32 [B, T].

    `targets_BT` int32 are the `n_token_B` tokens of each sequence, then padding, which `loss_mask` marks with
    0. `inputs` are the targets shifted right behind an end id. `doc_ids` counts the end ids in `inputs`.
    """
    inputs_BT = np.empty_like(targets_BT)
    inputs_BT[:, :1], inputs_BT[:, 1:] = END, targets_BT[:, :-1]
    return {
        "inputs": inputs_BT,
        "targets": targets_BT,
        "doc_ids": np.cumsum(inputs_BT == END, axis=1, dtype=np.int32),
        "loss_mask": (np.arange(targets_BT.shape[1]) < n_token_B[:, None]).astype(np.int32),
    }


class Sequences:
    """Random access to the T-token sequences of a split, of each folder the last is padded.

    Those of a mixture's folders follow one another. Pickles without its tokens. ValueError: the split is
    empty; when a sequence is read, a token is outside the vocabulary.
    """

    def __init__(self, corpus: AnyCorpus, split: str, sequence_len: int) -> None:
        if sequence_len < 1:
            raise ValueError(f"config.train.sequence_len must be at least 1, not {sequence_len}")
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
                found = self._read(part, [indices[row] - first for row in rows])
                for row, tokens in zip(rows, found, strict=True):
                    targets_BT[row, : len(tokens)] = tokens
                    n_token_B[row] = len(tokens)
        return features(targets_BT, n_token_B)

    def _read(self, part: int, indices: list[int]) -> list[np.ndarray]:
        """The tokens of sequences of one folder."""
        corpus, read = self.corpus.parts[part], self._readers[part]
        assert read is not None, "a sequence of an empty split"
        starts = [index * self.sequence_len for index in indices]
        n_token, size = corpus.splits[self.split].n_token, corpus.vocabulary.size
        found = read([(start, min(start + self.sequence_len, n_token)) for start in starts])
        for start, tokens in zip(starts, found, strict=True):
            if tokens.max() >= size:
                at = int(np.argmax(tokens >= size))
                raise ValueError(
                    f"config.data.path: token {start + at} of {corpus.tokens_path(self.split)} is id"
                    f" {tokens[at]}, outside the vocabulary {corpus.vocabulary.name!r} of {size} ids;"
                    " prepare the folder again, with this vocabulary"
                )
        return found
