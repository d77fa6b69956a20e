"""Made-up books and the vocabulary of their pieces."""

import functools
import random

from tvq.data.vocabulary import SentencePieceVocabulary, train_sentencepiece

SYLLABLES = ["ka", "lo", "mi", "en", "tar", "su", "pe", "ri", "von", "da", "shé", "qu"]


def book(seed: int, n_word: int = 400) -> str:
    """Lines of words of a language that does not exist."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(n_word)]
    return "".join(word + rng.choice([" ", " ", ", ", ".\n", "\n\n"]) for word in words)


@functools.cache
def vocabulary() -> SentencePieceVocabulary:
    """120 pieces."""
    return train_sentencepiece(iter(book(0).split("\n")), 120)
