"""Weights in and out: files of the original program and of our own, bitwise; and what is rejected."""

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
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from tests.model import small
from tests.test_parity import GOLDEN, check_forward, load, model_config, under
from tvq import cluster, config, schema, sharding
from tvq.data.vocabulary import ByteVocabulary, to_json
from tvq.model import original
from tvq.programs import interop
from tvq.run import restore, tensors
from tvq.run.checkpoint import Checkpoints
from tvq.training import optimizer, state

FORWARD = sorted(path for path in GOLDEN.glob("fwd_*.npz") if "bf16" not in path.name)
PLACE = cluster.Place(how="a test")
NOWHERE = Path("/dev/null/x")


def bring_in(c: schema.Config, workdir: Path, given: Path) -> None:
    with contextlib.closing(cluster.Log(workdir / "logs", PLACE)) as log:
        assert interop.bring_in(c, epath.Path(workdir), PLACE, log, input=str(given)) == 0


def send_out(c: schema.Config, workdir: Path, folder: Path) -> None:
    with contextlib.closing(cluster.Log(workdir / "logs", PLACE)) as log:
        assert interop.send_out(c, epath.Path(workdir), PLACE, log, output=str(folder)) == 0


def original_file(path: Path, arrays: dict[str, np.ndarray], *, train_state: bool = True) -> Path:
    """What flax writes of the original program's TrainState, or of its parameters."""
    params = unflatten_dict(arrays, sep="/")
    tree = {"step": 7, "params": params, "opt_state": {"0": {"mu": params}}} if train_state else params
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def newest(workdir: Path, c: schema.Config) -> Any:
    """The whole state of the newest checkpoint."""
    placed = state.place(
        c, optimizer.make(c.optimizer, c.model), sharding.make(schema.Mesh(), jax.devices()[:1])
    )
    with Checkpoints(workdir / "checkpoints", keep=1, keep_every=0, read_only=True) as checkpoints:
        return checkpoints.restore(placed, print)


@pytest.mark.parametrize("path", FORWARD, ids=lambda path: path.stem)
@pytest.mark.parametrize("train_state", [True, False])
def test_a_file_of_the_original_gives_its_log_probs(path, train_state, tmp_path, monkeypatch):
    spec, arrays = load(path)
    c = schema.Config(model=model_config(spec["transformer_config"]))
    given = original_file(tmp_path / "checkpoint_7", under(arrays, "params"), train_state=train_state)
    monkeypatch.setattr(interop, "vocabulary_of", lambda c: ByteVocabulary())  # its ids are made up
    workdir = tmp_path / "run"
    bring_in(c, workdir, given)
    now = newest(workdir, c).state
    assert int(now.step) == 0
    want = original.weights(under(arrays, "params"), c.model)
    assert tensors.fingerprint(now.weights) == tensors.fingerprint(want)
    if train_state:
        monkeypatch.setattr("tests.test_parity.weights", lambda arrays, model: now.weights)
        check_forward(spec, arrays)


# A model whose ids are bytes, so that it can be a run.
RUN = schema.Config(model=dataclasses.replace(small.MODEL, n_vocab=259))


def original_arrays(c: schema.Config) -> dict[str, np.ndarray]:
    """Random parameters of the original program's."""
    rng = np.random.default_rng(0)
    kinds = original.kinds(c.model).items()
    shapes = {name: json.loads(kind.removeprefix("float32")) for name, kind in kinds}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_export_and_import_are_bitwise(tmp_path, capsys):
    first, second, folder = (tmp_path / name for name in ("first", "second", "weights"))
    given = original_file(tmp_path / "given", original_arrays(RUN))
    bring_in(RUN, first, given)
    send_out(RUN, first, folder)
    written = {config.FILE, interop.WEIGHTS, "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == written
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


def test_a_run_of_other_optimizer_or_revival_is_exported(tmp_path, capsys):
    """Weights are all that is read: the optimizer of the command's config need not be the run's."""
    bring_in(RUN, tmp_path / "run", original_file(tmp_path / "given", original_arrays(RUN)))
    other = dataclasses.replace(
        RUN,
        model=dataclasses.replace(RUN.model, revive_codes=100),
        optimizer=dataclasses.replace(RUN.optimizer, name="lion", grad_clip=0.0),
    )
    mesh = sharding.make(schema.Mesh(), jax.devices()[:1])
    ours, theirs = (restore.weights(c, epath.Path(tmp_path / "run"), mesh, print) for c in (RUN, other))
    mine, more = (restored.state.weights.extra["codebooks"] for restored in (ours, theirs))
    assert not np.asarray(more.pop("idle")).any()
    assert tensors.fingerprint((ours.state.weights.params, mine)) == tensors.fingerprint(
        (theirs.state.weights.params, more)
    )


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


def refused(c: schema.Config, given: Path, tmp_path: Path) -> list[str]:
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
        " set config.model to the model that was trained",
        "  extra/kernel: float32[3] in the file, absent wanted",
        "  out_proj/bias: float64[259] in the file, float32[259] wanted",
        f"  {unit}/u: absent in the file, float32[16] wanted",
        f"  {unit}/v: float32[2, 8] in the file, float32[16] wanted",
    ]


def test_every_wrong_array_of_ours_is_listed(tmp_path):
    arrays = tensors.named(interop.in_file(small.parameters(RUN.model)))
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
        (b"", "is not a flax msgpack file, or is damaged"),
        (b"plain text", "is not a flax msgpack file"),
        (
            serialization.msgpack_serialize({"a": np.zeros(9)})[:-9],
            "is not a flax msgpack file, or is damaged",
        ),
        (b"\x93\x01\x02\x03", "is not a flax msgpack file: it holds no names"),
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
    c = dataclasses.replace(RUN, model=small.MODEL, data=schema.Data(source="tokens", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"config.data.path: .* is not a prepared folder"):
        interop.vocabulary_of(c)


def exported(tmp_path: Path, c: schema.Config = RUN) -> Path:
    """What `tvq export` writes, without a run."""
    arrays = tensors.named(interop.in_file(small.parameters(c.model)))
    facts = {"vocabulary": json.dumps(to_json(ByteVocabulary())), "image_size": "0"}
    tensors.write(epath.Path(tmp_path) / "given" / interop.WEIGHTS, arrays, facts)
    return tmp_path / "given" / interop.WEIGHTS


def saved_again(path: Path, facts: dict[str, str] | None, change: Any = lambda arrays: None) -> None:
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, facts)


@pytest.mark.parametrize("facts", [None, {"format": "pt"}])
def test_weights_that_another_program_saved_again(facts, tmp_path):
    path = exported(tmp_path)
    want = interop.read_weights(epath.Path(path), RUN)
    saved_again(path, facts)
    for given in (path, path.parent):
        found = interop.read_weights(epath.Path(given), RUN)
        assert tensors.fingerprint(found[0]) == tensors.fingerprint(want[0])
        assert found[1:] == want[1:] == (ByteVocabulary(), 0)
    # For images, or for pieces, the data must tell.
    tokens = schema.Data(source="tokens", path=str(tmp_path))
    with pytest.raises(ValueError, match="has lost the vocabulary and image size that tvq export recorded"):
        interop.read_weights(epath.Path(path), dataclasses.replace(RUN, data=tokens))
    for damaged in ("{", "{}", "[]", "1"):
        saved_again(path, {"vocabulary": damaged, "image_size": "0"})
        with pytest.raises(ValueError, match=r"--input=.*the vocabulary is damaged"):
            interop.read_weights(epath.Path(path), RUN)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_dtypes_are_converted(dtype, tmp_path):
    path, said = exported(tmp_path), []
    saved_again(path, None, lambda arrays: arrays.update({k: x.astype(dtype) for k, x in arrays.items()}))
    weights, *_ = interop.read_weights(epath.Path(path), RUN, said.append)
    want = tensors.named(small.parameters(RUN.model))
    for name, x in tensors.named(weights).items():
        np.testing.assert_array_equal(x, np.asarray(want[name]).astype(dtype).astype(np.float32))
    assert f"arrays of {path} are converted, such as codebooks.count: {dtype}" in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda arrays: arrays.update({"params.units.w": np.full((2, 16), np.nan, np.float32)}),
            "not finite",
        ),
        (lambda arrays: arrays.update({k: np.full(x.shape, 1e300) for k, x in arrays.items()}), "not finite"),
        (lambda arrays: arrays.update({"params.units.w": np.ones((2, 16), np.int8)}), "int8[2, 16] in the"),
        (lambda arrays: arrays.clear(), "absent in the file"),
        (
            lambda arrays: arrays.update({f"model.{k}": arrays.pop(k) for k in list(arrays)}),
            "holds no array with a name of the model; it has model.codebooks.count",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_model(change, message, tmp_path):
    path = exported(tmp_path)
    saved_again(path, None, change)
    with pytest.raises(ValueError, match=r"^--input=") as error:
        interop.read_weights(epath.Path(path), RUN)
    assert message in str(error.value)


def test_a_dtype_that_numpy_does_not_know(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / interop.WEIGHTS
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ValueError, match=r"^--input=.*is not a safetensors file"):
        interop.read_weights(epath.Path(path), RUN)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"w": np.zeros(3)}}, "holds no array with a name of the model; it has model/w, not"),
        ({"0": {"1": np.zeros(3)}, "step": np.zeros(1)}, "it has 0/1, step, not"),
        ({"params": {}}, "absent in the file"),
        ({"params": {"a": "text"}}, "a is not an array but 'text'"),
        ({"params": {"a": None}}, "a is not an array but None"),
        ({"params": [np.zeros(3)]}, "not"),
    ],
)
def test_msgpack_of_other_keys(tree, message, tmp_path):
    given = tmp_path / "given"
    given.write_bytes(serialization.msgpack_serialize(tree))
    assert message in "\n".join(refused(RUN, given, tmp_path))


def test_msgpack_of_keys_that_are_no_text(tmp_path):
    given = tmp_path / "given"
    given.write_bytes(b"\x81\x01\x02")  # {1: 2}
    assert f"--input={given} " in refused(RUN, given, tmp_path)[0]
