"""Images that a model draws: whole ones, or the lower halves of given ones, as PNG and on a contact sheet."""

import io
from typing import Any

import jax
import numpy as np
from etils import epath

from tvq import atomic
from tvq import model as lm
from tvq.data import images, optional
from tvq.data.splits import Piece
from tvq.data.vocabulary import N_SPECIAL, ByteVocabulary
from tvq.errors import InputError
from tvq.run import draw
from tvq.schema import Config

GAP = 2  # pixels between the images of a sheet


def upper_halves(path: epath.Path, size: int) -> list[np.ndarray]:
    """The ids of the upper half of an image file, or of each in a folder, scaled and cut to `size`."""
    paths = sorted(x for x in path.iterdir() if images.is_image(x.name)) if path.is_dir() else [path]
    if not paths or not all(x.is_file() for x in paths):
        raise InputError(f"--prompts={path}: there is no image; give one, or a folder of them")
    n_byte = size // 2 * size * 3
    pixels = [images.pixels(Piece("test", str(x), x.read_bytes(), last=True), size, fit=True) for x in paths]
    return [ByteVocabulary().encode(x[:n_byte]) for x in pixels]


def drawn(
    weights: lm.Weights,
    config: Config,
    size: int,
    halves: list[np.ndarray],
    options: dict[str, Any],
    tell: draw.Tell = lambda line: None,
) -> np.ndarray:
    """`n_sample` images of each half `[N,size,size,3]` uint8; a special id, which none should hold, is 0."""
    options = options | {"length": size * size * 3 - len(halves[0]), "end": None}  # an image has no ends
    rows = draw.answers(
        weights,
        draw.empty(options["model"]),
        halves,
        config.sample.n_sample,
        jax.random.key(config.sample.seed),
        batch_size=config.sample.batch_size,
        tell=tell,
        **options,
    )
    ids = np.stack(rows)
    return np.maximum(ids.astype(np.int32) - N_SPECIAL, 0).astype(np.uint8).reshape(-1, size, size, 3)


def sheet(pictures: np.ndarray) -> np.ndarray:
    """All images `[N,size,size,3]` side by side in rows, as near to a square as they go, on white."""
    n, size = pictures.shape[:2]
    n_column = int(np.ceil(np.sqrt(n)))
    n_row = -(-n // n_column)
    canvas = np.full((n_row * (size + GAP) - GAP, n_column * (size + GAP) - GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // n_column) * (size + GAP), (i % n_column) * (size + GAP)
        canvas[top : top + size, left : left + size] = picture
    return canvas


def png(picture: np.ndarray) -> bytes:
    """An image `[height,width,3]` uint8 as a PNG."""
    content = io.BytesIO()
    optional.load("PIL.Image").fromarray(picture).save(content, format="png")
    return content.getvalue()


def write(pictures: np.ndarray, folder: epath.Path) -> str:
    """A PNG of each image and `sheet.png` with all; what to say of them."""
    for i, picture in enumerate(pictures):
        atomic.write(folder / f"{i + 1:04}.png", png(picture))
    atomic.write(folder / "sheet.png", png(sheet(pictures)))
    return f"{len(pictures)} images in {folder}, all on sheet.png"
