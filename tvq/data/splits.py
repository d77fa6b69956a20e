"""Documents, and the split that each belongs to: as published, or by a hash of its name.

With the hash, a file's split stays the same when other files come and go.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from tvq.data.files import shown, unpacked_suffix
from tvq.errors import InputError

SPLITS = ("train", "validation", "test")
NAMED = "by the name of the folder or file: train, val..., test"
SIDE = "whose name tells no split"  # why a file was left out
HASHED = "98/1/1 % by sha256 of the name, and of the row of a table"
WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# `train`, `train-00000-of-00002`, `train_64x64`, `train1`; of a file also `wiki.train`, `books_train_03`.
BEGINS = re.compile(rf"({'|'.join(WORDS)})\d*(?:[-_. ].*)?")
ENDS = re.compile(rf".*[-_.]({'|'.join(WORDS)})(?:\d+|[-_.]\d.*)?")


class Piece(NamedTuple):
    """A stretch of a document: `raw` is some of its text, or an image."""

    split: str
    document: str
    raw: bytes
    last: bool


def hashed_split(name: str) -> str:
    """The split of the document called `name`: of 100 names 98 train, one validates, one tests."""
    percent = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) % 100
    return "train" if percent < 98 else "validation" if percent == 98 else "test"


def named_split(name: str) -> str:
    """The split told by the first folder with such a name, or else by the file; or nothing."""
    *folders, file = name.lower().split("/")
    for part in (*folders, file):
        if told := BEGINS.fullmatch(part):
            return WORDS[told[1]]
    suffix = unpacked_suffix(file)
    told = ENDS.fullmatch(file[: file.rindex(suffix)] if suffix else file)
    return WORDS[told[1]] if told else ""


def told_splits(
    names: Collection[str], choice: str, kinds: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The split of each file whose name tells it, where the files have a published split; otherwise nothing.

    `choice` is names, hash, or empty: names where they tell what trains and what does not. Names that tell
    nothing are then left out, if they are of another kind (suffix) or few. InputError: it is unclear
    whether there is a published split.
    """
    told = {name: split for name in names if (split := named_split(name))}
    splits, kinds = set(told.values()), kinds or {name: unpacked_suffix(name) for name in names}
    if choice == "hash" or not told:
        if choice == "names":
            raise InputError("no name tells a split (train, val..., test)")
        return {}
    silent = [n for n in names if n not in told and kinds[n] in {kinds[other] for other in told}]
    if choice == "names" or (splits > {"train"} and len(silent) < len(told)):
        return told
    if splits == {"train"}:
        return {}
    known = ", ".join(f"{shown(n)} ({split})" for n, split in sorted(told.items())[:3])
    other = f"{len(silent)} others tell none, such as {shown(silent[0])}" if silent else "none of them trains"
    raise InputError(
        f"{len(told)} names tell a split, such as {known}, and {other}; name all by their splits, or use"
        " --split=hash (a split of your own by a hash of each name) or --split=names (leave the others out)"
    )
