"""Documents end to end, cut into sequences of equal length."""

import functools
from typing import Any

import numpy as np

from tvq.data.corpus import Corpus
from tvq.data.vocabulary import END, PAD

Example = dict[str, np.ndarray]


def example(tokens: np.ndarray, sequence_len: int) -> Example:
    """What the model is given for at most T tokens: `inputs, targets, doc_ids, loss_mask`, int32 [T].

    `targets` are the tokens, then padding, which `loss_mask` marks with 0. `inputs` are the targets shifted
    right behind an end id. `doc_ids` counts the end ids in `inputs`.
    """
    targets = np.full(sequence_len, PAD, np.int32)
    targets[: len(tokens)] = tokens
    inputs = np.empty_like(targets)
    inputs[0], inputs[1:] = END, targets[:-1]
    return {
        "inputs": inputs,
        "targets": targets,
        "doc_ids": np.cumsum(inputs == END, dtype=np.int32),
        "loss_mask": (np.arange(sequence_len) < len(tokens)).astype(np.int32),
    }


class Sequences:
    """Random access to the T-token sequences of a split; the last is padded. Pickles without its tokens.

    ValueError: the split is empty; when a sequence is read, a token is outside the vocabulary.
    """

    def __init__(self, corpus: Corpus, split: str, sequence_len: int) -> None:
        if sequence_len < 1:
            raise ValueError(f"config.train.sequence_len must be at least 1, not {sequence_len}")
        self.corpus, self.split, self.sequence_len = corpus, split, sequence_len
        self.n_token = corpus.info(split).n_token

    @functools.cached_property
    def _tokens(self) -> np.memmap:
        return self.corpus.tokens(self.split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __len__(self) -> int:
        return -(-self.n_token // self.sequence_len)

    def __getitem__(self, index: int) -> Example:
        """`example` of sequence `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.sequence_len
        tokens = self._tokens[start : start + self.sequence_len]
        size = self.corpus.vocabulary.size
        if tokens.max() >= size:
            at = int(np.argmax(tokens >= size))
            raise ValueError(
                f"config.data.path: token {start + at} of {self.corpus.tokens_path(self.split)} is id"
                f" {tokens[at]}, outside the vocabulary {self.corpus.vocabulary.name!r} of {size} ids;"
                " prepare the folder again, with this vocabulary"
            )
        return example(tokens, self.sequence_len)
