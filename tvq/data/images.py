"""Sources of images for `tvq prepare`: ImageNet64 in its official batches or as files, and any folder.

An image becomes the bytes of its pixels in raster order, red, green and blue of each together.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from tvq.data import files, optional
from tvq.data.documents import Piece, hashed_split
from tvq.data.files import Meter
from tvq.data.texts import HASHED, NAMED, named_split
from tvq.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
IMAGENET64_TRAIN = 1_200_000
ROWS = 512  # images of a batch file read at a time


def pixels(piece: Piece, size: int, *, fit: bool) -> bytes:
    """The RGB bytes [size, size, 3] of an image file. `fit` scales the shorter side and cuts the longer.

    InputError: it is no image, or, without `fit`, of another size.
    """
    image_of, operations = optional.load("PIL.Image"), optional.load("PIL.ImageOps")
    try:
        with image_of.open(io.BytesIO(piece.raw)) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, image_of.DecompressionBombError) as error:
        raise InputError(
            f"{piece.document} is no image that can be read ({error}); mend or remove it"
        ) from error
    if fit:
        rgb = operations.fit(rgb, (size, size), image_of.Resampling.LANCZOS)
    if rgb.size != (size, size):
        raise InputError(f"{piece.document} has {rgb.width} x {rgb.height} pixels, not {size} x {size}")
    return rgb.tobytes()


class Images:
    """Files of any format, scaled to one size."""

    def __init__(self, root: epath.Path) -> None:
        """InputError: there are none."""
        self.root = root
        self.files = [path for path in files.below(root) if path.suffix.lower() in SUFFIXES]
        if not self.files:
            raise InputError(f"--input: {root} holds no images ({', '.join(SUFFIXES)})")
        self._named = all(named_split(files.name_of(path, root)) for path in self.files)
        self.rule = NAMED if self._named else HASHED

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """Each image, as its file. InputError: one is unreadable."""
        for path in self.files:
            name = files.name_of(path, self.root)
            split = named_split(name) if self._named else hashed_split(name)
            yield Piece(split, name, _whole(path, meter), last=True)


def _whole(path: epath.Path, meter: Meter) -> bytes:
    with files.explained(path), meter.open(path) as file:
        return file.read()


class ImageNet64:
    """The first `n_train` training images train, the others validate; the official validation set tests."""

    def __init__(self, root: epath.Path, n_train: int) -> None:
        """Batch files, or image files, whose own or folder's name begins with train or val.

        InputError: there are no training or no test images.
        """
        self.root, self._n_train = root, n_train or IMAGENET64_TRAIN
        found = {path: named_split(files.name_of(path, root)) for path in files.below(root)}
        batches = [path for path in found if path.suffix in (".npz", ".pickle", ".pkl", "")]
        self.in_batches = bool(batches)
        kept = batches or [path for path in found if path.suffix.lower() in SUFFIXES]
        self._train = [path for path in kept if found[path] == "train"]
        self._test = [path for path in kept if found[path] == "validation"]
        if not self._train or not self._test:
            raise InputError(
                f"--input: {root} holds {len(self._train)} files to train and {len(self._test)} to test on;"
                " it needs batch files, or folders of images, whose names begin with train and val"
            )
        self.files = self._train + self._test
        self.rule = f"the first {self._n_train} training images, the others; the official validation set"

    def pieces(self, meter: Meter) -> Iterator[Piece]:
        """Each image: its pixels, if from a batch, or else its file.

        InputError: a file is unreadable, or too few images train.
        """
        n = 0
        for n, piece in enumerate(self._images(self._train, meter), 1):
            yield piece._replace(split="train" if n <= self._n_train else "validation")
        if n <= self._n_train:
            raise InputError(
                f"--input: {self.root} has {n} images to train on, and the first {self._n_train} would train,"
                " none validate; for less than all of ImageNet64 say with --n_train how many"
            )
        yield from self._images(self._test, meter)

    def _images(self, paths: list[epath.Path], meter: Meter) -> Iterator[Piece]:
        for path in paths:
            name = files.name_of(path, self.root)
            if self.in_batches:
                for i, image in enumerate(_of_batch(path, meter)):
                    yield Piece("test", f"{name}:{i}", image, last=True)
            else:
                yield Piece("test", name, _whole(path, meter), last=True)


def _of_batch(path: epath.Path, meter: Meter) -> Iterator[bytes]:
    """The images of an official batch file: `data` uint8 [N, 12288], planes of red, green and blue."""
    with files.explained(path), meter.open(path) as file:
        for rows in _npz_rows(path, file) if path.suffix == ".npz" else _pickled_rows(path, file):
            for image in rows.reshape(-1, 3, 64 * 64).swapaxes(1, 2):
                yield image.tobytes()


def _npz_rows(path: epath.Path, file: BinaryIO) -> Iterator[np.ndarray]:
    """A few at a time: numpy itself would read all."""
    with zipfile.ZipFile(file) as packed:
        if "data.npy" not in packed.namelist():
            raise InputError(f"--input: {path} has no array 'data', it has {packed.namelist()}")
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
        _check(path, data.shape, data.dtype, fortran=not data.flags.c_contiguous)
    except (pickle.UnpicklingError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"--input: {path} is no pickled batch with an array 'data' ({error!r})") from error
    yield data


def _check(path: epath.Path, shape: tuple[int, ...], dtype: np.dtype, fortran: bool) -> None:
    if len(shape) != 2 or shape[1] != 3 * 64 * 64 or dtype != np.uint8 or fortran:
        order = "Fortran" if fortran else "C"
        raise InputError(
            f"--input: the images of {path} are {dtype} {list(shape)} in {order} order, not uint8 [N, 12288]"
            " (three planes of 64 x 64)"
        )


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and nothing else: a pickle may otherwise run any program."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
