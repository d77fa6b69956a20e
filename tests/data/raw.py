"""Small data in the raw forms that are published: enwik8, PG-19, ImageNet64."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import zstandard

from tests.data import books

XML = "".join(f"<page><id>{i}</id>{books.book(i, 20)}</page>\n" for i in range(40)).encode()


def packed(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(name.removesuffix(".zip"), content)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif name.endswith(".zst"):
        half = len(content) // 2
        path.write_bytes(b"".join(zstandard.compress(part) for part in (content[:half], content[half:])))
    else:
        path.write_bytes(content)
    return path


def library(root: Path, n_train: int = 6) -> Path:
    """A few books in the folders of PG-19, and its metadata."""
    for split, n in (("train", n_train), ("validation", 2), ("test", 2)):
        (root / split).mkdir(parents=True)
        for i in range(n):
            (root / split / f"{i}.txt").write_text(books.book(10 * n + i))
    (root / "metadata.csv").write_text("0,a book,1900,http://example.com\n")
    (root / "train_files.txt").write_text("train/0.txt\n")
    return root


def picture(seed: int) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)


def planes(pictures: list[np.ndarray]) -> np.ndarray:
    """As the official batches have them: red, green and blue, each row after row."""
    return np.stack([image.transpose(2, 0, 1).reshape(-1) for image in pictures])


def batches(root: Path, n_test: int = 3) -> Path:
    """Eleven training images in two files, of which the second sorts after the tenth by letters."""
    root.mkdir()
    np.savez(root / "train_data_batch_10.npz", data=planes([picture(i) for i in range(6, 11)]), labels=[0])
    np.savez_compressed(root / "train_data_batch_9.npz", data=planes([picture(i) for i in range(6)]))
    np.savez(root / "val_data.npz", data=planes([picture(100 + i) for i in range(n_test)]))
    return root
