"""Weights in and out: files of the original program and of our own, bitwise; and what is refused."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from flax import serialization

from tests.model import small
from tests.test_parity import GOLDEN, check_forward, load, model_config, under
from tvq import cluster, config, evaluate, interop, mesh, tensors
from tvq.data.vocabulary import ByteVocabulary

FORWARD = sorted(path for path in GOLDEN.glob("fwd_*.npz") if "bf16" not in path.name)
PLACE = cluster.Place(how="a test")
NOWHERE = Path("/dev/null/x")


def bring_in(c: config.Config, workdir: Path, given: Path) -> None:
    with contextlib.closing(cluster.Log(workdir / "logs", PLACE)) as log:
        assert interop.bring_in(c, epath.Path(workdir), PLACE, log, input=str(given)) == 0


def send_out(c: config.Config, workdir: Path, folder: Path) -> None:
    with contextlib.closing(cluster.Log(workdir / "logs", PLACE)) as log:
        assert interop.send_out(c, epath.Path(workdir), PLACE, log, output=str(folder)) == 0


def original_file(path: Path, arrays: dict[str, np.ndarray], *, train_state: bool = True) -> Path:
    """What flax writes of the original program's TrainState, or of its parameters."""
    params = interop.nested(arrays)
    tree = {"step": 7, "params": params, "opt_state": {"0": {"mu": params}}} if train_state else params
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def newest(workdir: Path, c: config.Config) -> Any:
    return evaluate.restore(c, epath.Path(workdir), mesh.make(config.Mesh(), jax.devices()[:1]), print)


@pytest.mark.parametrize("path", FORWARD, ids=lambda path: path.stem)
@pytest.mark.parametrize("train_state", [True, False])
def test_a_file_of_the_original_gives_its_log_probs(path, train_state, tmp_path, monkeypatch):
    spec, arrays = load(path)
    c = config.Config(model=model_config(spec["transformer_config"]))
    given = original_file(tmp_path / "checkpoint_7", under(arrays, "params"), train_state=train_state)
    monkeypatch.setattr(interop, "vocabulary_of", lambda c: ByteVocabulary())  # its ids are made up
    workdir = tmp_path / "run"
    bring_in(c, workdir, given)
    now = newest(workdir, c).state
    assert int(now.step) == 0
    want = interop.parameters_from_original(under(arrays, "params"))
    assert tensors.fingerprint((now.params, now.codebooks)) == tensors.fingerprint(want)
    if train_state:
        monkeypatch.setattr("tests.test_parity.parameters", lambda arrays: (now.params, now.codebooks))
        check_forward(spec, arrays)


# A model whose ids are bytes, so that it can be a run.
RUN = config.Config(model=dataclasses.replace(small.MODEL, n_vocab=259))


def original_arrays(c: config.Config) -> dict[str, np.ndarray]:
    """Random parameters of the original program's."""
    rng = np.random.default_rng(0)
    kinds = interop.original_kinds(c.model).items()
    shapes = {name: json.loads(kind.removeprefix("float32")) for name, kind in kinds}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_export_and_import_are_bitwise(tmp_path, capsys):
    first, second, folder = (tmp_path / name for name in ("first", "second", "weights"))
    given = original_file(tmp_path / "given", original_arrays(RUN))
    bring_in(RUN, first, given)
    send_out(RUN, first, folder)
    assert sorted(path.name for path in folder.iterdir()) == [config.FILE, interop.WEIGHTS]
    assert config.build(config.recorded(epath.Path(folder) / config.FILE)) == RUN
    bring_in(RUN, second, folder)
    a, b = newest(first, RUN), newest(second, RUN)
    assert tensors.fingerprint(a.state._replace(key=())) == tensors.fingerprint(b.state._replace(key=()))
    assert (a.step, a.data) == (b.step, b.data)
    said = capsys.readouterr().out.splitlines()
    assert "are checkpoint 0 of" in said[0]
    assert "no optimizer state" in said[0]
    assert f"parameters of step 0 are in {folder}: " in said[1]
    with pytest.raises(ValueError, match=r"--output=.*weights is not an empty folder; use another"):
        send_out(RUN, first, folder)
    with pytest.raises(ValueError, match=r"--workdir=.*first holds a run already"):
        bring_in(RUN, first, given)
    for program, workdir, other in ((send_out, first, NOWHERE), (bring_in, NOWHERE, folder)):
        with pytest.raises(ValueError, match=r"--(output|workdir)=/dev/null/x: cannot write there \("):
            program(RUN, workdir, other)


def test_the_original_attends_across_documents(tmp_path, capsys):
    apart = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, attend_across_documents=False))
    given = original_file(tmp_path / "given", original_arrays(RUN))
    warnings = []
    for i, (c, source) in enumerate([(RUN, given), (apart, given), (apart, tmp_path / "weights")]):
        bring_in(c, tmp_path / f"run_{i}", source)
        warnings.append(capsys.readouterr().out.partition("\nwarning: ")[2])
        if i == 0:
            send_out(c, tmp_path / "run_0", tmp_path / "weights")
            capsys.readouterr()
    assert warnings[0] == warnings[2] == ""
    assert warnings[1].endswith("import them with --config.model.attend_across_documents=true\n")


def refused(c: config.Config, given: Path, tmp_path: Path) -> list[str]:
    with pytest.raises(ValueError, match=f"^--input={given}") as error:
        bring_in(c, tmp_path / "run", given)
    assert not (tmp_path / "run").exists()
    return str(error.value).splitlines()


def test_every_wrong_array_of_the_original_is_listed(tmp_path):
    arrays = original_arrays(RUN)
    unit = "transformer_layers_0/scanned_attn1"
    arrays["extra/kernel"] = np.zeros(3, np.float32)
    del arrays[f"{unit}/u"]
    arrays[f"{unit}/v"] = np.zeros((2, 8), np.float32)
    arrays["out_proj/bias"] = np.zeros(259, np.float64)
    assert refused(RUN, original_file(tmp_path / "given", arrays), tmp_path) == [
        f"--input={tmp_path / 'given'} holds another model than the config: 4 arrays differ;"
        " set config.model to what it was trained with",
        "  extra/kernel: float32[3] in the file, absent wanted",
        "  out_proj/bias: float64[259] in the file, float32[259] wanted",
        f"  {unit}/u: absent in the file, float32[16] wanted",
        f"  {unit}/v: float32[2, 8] in the file, float32[16] wanted",
    ]


def test_every_wrong_array_of_ours_is_listed(tmp_path):
    params, codebooks = small.parameters(RUN.model)
    arrays = tensors.named({"params": params, "codebooks": codebooks})
    arrays["params.units.w2"] = arrays.pop("params.units.w")
    arrays["codebooks.count"] = np.zeros((2, 2, 3), np.float32)
    tensors.write(epath.Path(tmp_path) / "given" / interop.WEIGHTS, arrays, {})
    assert refused(RUN, tmp_path / "given", tmp_path)[1:] == [
        "  codebooks.count: float32[2, 2, 3] in the file, float32[2, 2, 16] wanted",
        "  params.units.w: absent in the file, float32[2, 16] wanted",
        "  params.units.w2: float32[2, 16] in the file, absent wanted",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read it (No such file or directory)"),
        (b"", "is no msgpack of flax, or a damaged one"),
        (b"plain text", "is no msgpack of flax"),
        (serialization.msgpack_serialize({"a": np.zeros(9)})[:-9], "is no msgpack of flax, or a damaged one"),
        (b"\x93\x01\x02\x03", "is no msgpack of flax: it holds no names"),
    ],
)
def test_what_is_no_checkpoint(content, message, tmp_path):
    given = tmp_path / "given"
    if content is not None:
        given.write_bytes(content)
    assert message in refused(RUN, given, tmp_path)[0]


def test_an_empty_folder_is_no_export(tmp_path):
    (tmp_path / "given").mkdir()
    with pytest.raises(ValueError, match=r"--input=.*model.safetensors: there is no such file"):
        interop.read_weights(epath.Path(tmp_path) / "given", RUN)


def test_a_model_of_other_ids_needs_its_data(tmp_path):
    c = dataclasses.replace(RUN, model=small.MODEL, data=config.Data(source="tokens", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"config.data.path: .* is not a prepared folder"):
        interop.vocabulary_of(c)
