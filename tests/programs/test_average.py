"""The mean of checkpoints, and which ones are asked for."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open

from tests.model import small
from tvq import cluster, config, schema
from tvq.data.vocabulary import ByteVocabulary, to_json
from tvq.errors import InputError
from tvq.programs import average, interop
from tvq.run import tensors
from tvq.run.checkpoint import Checkpoints
from tvq.training import optimizer, state

PLACE = cluster.Place(how="a test")
C = schema.Config(model=small.MODEL)
DATA = {"fingerprint": None, "seconds": {}, "vocabulary": to_json(ByteVocabulary()), "image_size": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three steps, of weights that have nothing in common."""
    folder = tmp_path_factory.mktemp("run")
    tx = optimizer.make(C.optimizer, C.model)
    with Checkpoints(folder / "checkpoints", keep=3, keep_every=0) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, state.init(C.model, tx, seed=step), DATA, config.to_dict(C))
    return folder


def write(run: Path, output: Path, steps: str | None = None, last: str | None = None) -> None:
    with contextlib.closing(cluster.Log(run / "logs", PLACE)) as log:
        average.average(C, epath.Path(run), PLACE, log, output=str(output), steps=steps, last=last)


@pytest.mark.parametrize(
    ("options", "steps"), [({"steps": "6,2"}, (2, 6)), ({"last": "2"}, (4, 6)), ({"last": "3"}, (2, 4, 6))]
)
def test_the_mean_of_weights_and_codebooks(run, tmp_path, options, steps):
    write(run, tmp_path / "mean", **options)
    tx = optimizer.make(C.optimizer, C.model)
    each = [tensors.named(interop.in_file(state.init(C.model, tx, seed=step).weights)) for step in steps]
    weights, vocabulary, _ = interop.read_weights(epath.Path(tmp_path / "mean"), C)  # as tvq import does
    assert vocabulary.name == "bytes"
    got = tensors.named(interop.in_file(weights))
    assert got.keys() == each[0].keys()
    for name, x in got.items():
        want = np.mean([np.asarray(y, np.float64) for y in (named[name] for named in each)], 0)
        np.testing.assert_array_equal(x, want.astype(np.float32), err_msg=name)
    assert any(np.ptp([float(jax.numpy.sum(named[name])) for named in each]) for name in got)
    with safe_open(tmp_path / "mean" / "model.safetensors", framework="np") as file:
        facts = file.metadata()
    assert (facts["step"], facts["averaged"]) == ("6", ", ".join(map(str, steps)))
    assert json.loads((tmp_path / "mean" / "config.json").read_text()) == config.to_dict(C)
    with pytest.raises(InputError, match="is not an empty folder"):
        write(run, tmp_path / "mean", last="2")


def test_whole_numbers_are_those_of_the_newest():
    """Such as the updates since a code was used."""
    idle = [np.array([3, 5], np.int32), np.array([7, 0], np.int32)]
    from_each = [
        average.Restored(step, {"idle": x, "w": np.float32([step])}, {})
        for step, x in zip((2, 4), idle, strict=True)
    ]
    got = average.mean(from_each)
    assert (got.step, got.state["idle"].tolist(), got.state["w"].tolist()) == (4, [7, 0], [3.0])


@pytest.mark.parametrize(
    ("steps", "last", "message"),
    [
        (None, None, "either --steps"),
        ("2,4", "2", "either --steps"),
        ("2", None, "--steps=2 must be two or more different checkpoints"),
        ("2,2", None, "--steps=2,2 must be two or more different checkpoints"),
        ("2,5,7", None, "no checkpoint of step 5, 7; there are checkpoints of steps 2, 4, 6"),
        ("2,x", None, "--steps=2,x must be whole numbers"),
        ("", None, "must be whole numbers"),
        (None, "1", "--last=1 must be two or more different checkpoints"),
        (None, "0", "--last=0 must be two or more"),
        (None, "-2", "--last=-2 must be two or more"),
        (None, "4", "--last=4 must be two or more different checkpoints, of those there are; there are"),
        (None, "two", "--last=two must be whole numbers"),
    ],
)
def test_what_cannot_be_averaged(steps, last, message):
    with pytest.raises(InputError, match=message):
        average.choose([2, 4, 6], steps, last)
