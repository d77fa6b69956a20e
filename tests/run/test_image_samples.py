"""Images drawn: the upper half stays, the sheet holds all, and what is written."""

import dataclasses

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.model import small
from tvq import schema
from tvq.run import image_samples

SIZE = 6
MODEL = dataclasses.replace(small.MODEL, n_vocab=259)


def test_halves_are_completed(tmp_path):
    given = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    for i, pixels in enumerate(given):
        Image.fromarray(pixels).save(tmp_path / f"{i}{['.png', '.PNG'][i]}")
    halves = image_samples.upper_halves(epath.Path(tmp_path), SIZE)
    c = schema.Config(model=MODEL, sample=schema.Sample(n_sample=2, batch_size=4))
    options = {"model": MODEL, "temperature": 1.0, "p_nucleus": 1.0}
    found = image_samples.drawn(small.parameters(MODEL), c, SIZE, halves, options)
    assert found.shape == (4, SIZE, SIZE, 3)
    np.testing.assert_array_equal(found[:, : SIZE // 2], given[[0, 0, 1, 1], : SIZE // 2])
    assert not np.array_equal(found[0], found[1])

    out = epath.Path(tmp_path) / "out"
    assert image_samples.write(found, out) == f"4 images in {out}, all on sheet.png"
    names = [path.name for path in sorted(out.iterdir())]
    assert names == [f"000{i}.png" for i in range(1, 5)] + ["sheet.png"]
    for i, path in enumerate(sorted(out.iterdir())[:4]):
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), found[i])
    with Image.open(out / "sheet.png") as image:
        np.testing.assert_array_equal(np.asarray(image)[-SIZE:, :SIZE], found[2])


def test_a_sheet_is_nearly_square():
    found = image_samples.sheet(np.zeros((5, SIZE, SIZE, 3), np.uint8))
    assert found.shape == (2 * SIZE + 2, 3 * SIZE + 4, 3)
    assert (found[-SIZE:, -SIZE:] == 255).all()


def test_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"--prompts=.*: there is no image"):
        image_samples.upper_halves(epath.Path(tmp_path), SIZE)
