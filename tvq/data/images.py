"""Sources of images for `tvq prepare`: ImageNet64 in its official batches or as files, and any folder.

An image becomes the bytes of its pixels in raster order, red, green and blue of each together.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from tvq.data import files, optional, walk
from tvq.data.files import File, Meter, shown
from tvq.data.splits import HASHED, NAMED, SIDE, Piece, hashed_split, named_split, told_splits
from tvq.errors import InputError

IMAGENET64_TRAIN = 1_200_000
ROWS = 512  # images of a batch file read at a time
NO_READER = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow knows by name alone
NO_IMAGE = "that is not an image"


def is_image(name: str) -> bool:
    """Whether Pillow reads files of such names."""
    image = optional.load("PIL.Image")
    image.init()
    kind = image.registered_extensions().get(Path(name.lower()).suffix)
    return kind in image.OPEN and kind not in NO_READER


def pixels(piece: Piece, size: int, *, fit: bool) -> bytes:
    """The RGB bytes [size, size, 3] of an image file, upright and on white; the first frame of several.

    `fit` scales the shorter side and crops the longer. InputError: it is not an image, or of another size
    without `fit`.
    """
    image_of, operations = optional.load("PIL.Image"), optional.load("PIL.ImageOps")
    try:
        with image_of.open(io.BytesIO(piece.raw)) as image:
            rgb = on_white(eight_bits(operations.exif_transpose(image), image.format))
        if fit:
            rgb = operations.fit(rgb, (size, size), image_of.Resampling.LANCZOS)
    except Exception as error:  # Pillow may raise anything for a damaged file
        unknown = isinstance(error, optional.load("PIL").UnidentifiedImageError)
        reason = "unknown format" if unknown else " ".join(f"{error!r}".split())
        raise InputError(
            f"{shown(piece.document)} cannot be read as an image ({reason}); fix or remove it"
        ) from error
    if rgb.size != (size, size):
        raise InputError(
            f"{shown(piece.document)} has {rgb.width} x {rgb.height} pixels, not {size} x {size}"
        )
    return rgb.tobytes()


def eight_bits(image: Any, kind: str) -> Any:
    """The image with 8 bits a value; Pillow itself would clip larger values to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        grey = np.round(values * (255 / 65535)).astype(np.uint8)
        clear = values == image.info.get("transparency", -1)
        both = np.stack([grey, np.where(clear, 0, 255).astype(np.uint8)], axis=-1)
        return optional.load("PIL.Image").fromarray(both)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a value without a known range, save it with 8 or 16")
    return image


def on_white(image: Any) -> Any:
    """The visible colours: transparent pixels are white, whatever colour they store."""
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        colours = image.convert("RGBA")
        white = optional.load("PIL.Image").new("RGBA", image.size, "white")
        white.alpha_composite(colours)
        image = white
    return image.convert("RGB")


class Images:
    """Files of any format, scaled to one size."""

    def __init__(self, root: epath.Path, choice: str = "") -> None:
        """InputError: there are none."""
        listed = walk.walk(root)
        kept = [file for file in listed.files if is_image(file.name)]
        if not kept:
            raise InputError(f"{shown(root)} holds no images (.png, .jpg and whatever else Pillow reads)")
        names = [file.name for file in kept]
        self._splits = told_splits(names, choice, dict.fromkeys(names, "image"))
        self.files = [file for file in kept if not self._splits or file.name in self._splits]
        self.left_out = [(file.name, NO_IMAGE) for file in listed.files if file not in kept]
        self.left_out += [(file.name, SIDE) for file in kept if file not in self.files]
        self.left_out += [(name, walk.OWN) for name in listed.left_out]
        self.rule = NAMED if self._splits else HASHED

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """Each image, as its file. InputError: one is unreadable."""
        for file in self.files:
            split = self._splits[file.name] if self._splits else hashed_split(file.name)
            yield Piece(split, file.name, _whole(file, meter), last=True)


def _whole(file: File, meter: Meter) -> bytes:
    with files.reading(file.path), meter.open(file.path) as opened:
        return opened.read()


class ImageNet64:
    """The first `n_train` training images train, the others validate; the official validation set tests."""

    def __init__(self, root: epath.Path, n_train: int) -> None:
        """Batch files, or image files, whose own or folder's name begins with train or val.

        InputError: there are no training or no test images.
        """
        self._root, self._n_train = root, n_train or IMAGENET64_TRAIN
        splits = {file: named_split(file.name) for file in walk.walk(root).files}
        named = [file for file, split in splits.items() if split in ("train", "validation")]
        batches = [file for file in named if file.path.suffix in (".npz", ".pickle", ".pkl", "")]
        self.in_batches = bool(batches)
        kept = batches or [file for file in named if is_image(file.name)]
        self._train = [file for file in kept if splits[file] == "train"]
        self._test = [file for file in kept if splits[file] == "validation"]
        if not self._train or not self._test:
            raise InputError(
                f"{shown(root)} holds {len(self._train)} files to train and {len(self._test)} to test on;"
                " there must be batch files, or folders of images, whose names begin with train and val"
            )
        self.files = self._train + self._test
        read = set(self.files)
        self.left_out = [(file.name, "that is not part of it") for file in splits if file not in read]
        self.rule = f"the first {self._n_train} training images, the others; the official validation set"

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """Each image: its pixels if it is from a batch, else its file.

        InputError: a file is unreadable, or too few images train.
        """
        n = 0
        for n, piece in enumerate(self._images(self._train, meter), 1):
            yield piece._replace(split="train" if n <= self._n_train else "validation")
        if n <= self._n_train:
            raise InputError(
                f"{shown(self._root)} has {n} images to train on, and the first {self._n_train} would train,"
                " none validate; for a part of ImageNet64 say with --n_train how many train"
            )
        yield from self._images(self._test, meter)

    def _images(self, listed: list[File], meter: Meter) -> Iterator[Piece]:
        for file in listed:
            if self.in_batches:
                for i, image in enumerate(_of_batch(file.path, meter)):
                    yield Piece("test", f"{file.name}:{i}", image, last=True)
            else:
                yield Piece("test", file.name, _whole(file, meter), last=True)


def _of_batch(path: epath.Path, meter: Meter) -> Iterator[bytes]:
    """The images of an official batch file: `data` uint8 [N, 12288], planes of red, green and blue."""
    with files.reading(path), meter.open(path) as file:
        for rows in _npz_rows(path, file) if path.suffix == ".npz" else _pickled_rows(path, file):
            for image in rows.reshape(-1, 3, 64 * 64).swapaxes(1, 2):
                yield image.tobytes()


def _npz_rows(path: epath.Path, file: BinaryIO) -> Iterator[np.ndarray]:
    """A few at a time: numpy itself would read all of them."""
    with zipfile.ZipFile(file) as packed:
        if "data.npy" not in packed.namelist():
            raise InputError(f"{shown(path)} has no array 'data', it has {packed.namelist()}")
        with packed.open("data.npy") as member:
            old = np.lib.format.read_magic(member) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
            _check(path, shape, dtype, fortran)
            for start in range(0, shape[0], ROWS):
                raw = member.read(min(ROWS, shape[0] - start) * shape[1])
                yield np.frombuffer(raw, np.uint8)


def _pickled_rows(path: epath.Path, file: BinaryIO) -> Iterator[np.ndarray]:
    try:
        data = _Arrays(file, encoding="latin1").load()["data"]
        shape, dtype, fortran = data.shape, data.dtype, not data.flags.c_contiguous
    except Exception as error:
        raise InputError(f"{shown(path)} is not a pickled batch with an array 'data' ({error!r})") from error
    _check(path, shape, dtype, fortran)
    yield data


def _check(path: epath.Path, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> None:
    if len(shape) != 2 or shape[1] != 3 * 64 * 64 or dtype != np.uint8 or fortran:
        order = "Fortran" if fortran else "C"
        raise InputError(
            f"the images of {shown(path)} are {dtype} {list(shape)} in {order} order, not uint8 [N, 12288]"
            " (three planes of 64 x 64)"
        )


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and nothing else, because a pickle can run arbitrary code."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
