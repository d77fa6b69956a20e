"""Wrong input ends with exit code 2 and one message that names it; nothing is written."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.conftest import Here
from tests.end_to_end.program import TINY, Program, assert_same_run, rows, tree
from tvq import __main__, cluster, config, schema
from tvq.data.corpus import open_corpus
from tvq.errors import DivergedError
from tvq.programs import train

Refuse = Callable[..., str]


@pytest.fixture
def refuse(here: Here) -> Refuse:
    """`refuse(command, ...)` runs it in this process, which has eight devices; returns its message."""

    def run(*arguments: str) -> str:
        out, err = here(*arguments, exit_code=2)
        assert out == ""
        lines = err.splitlines(keepends=True)
        message = "".join(line for line in lines if not line.startswith("one process"))
        assert message.startswith("tvq: ")
        assert message.count("tvq: ") == 1
        return message.removeprefix("tvq: ")

    return run


FIELDS = {
    "--config.modl.d_model=3": "--config.modl.d_model is not a field; did you mean model.d_model?",
    "--config.train.step=3": "--config.train.step is not a field; did you mean train.steps?",
    "--config.zzz=3": "--config.zzz is not a field\n",
    "--config.model=3": "--config.model is not a field",
    "--config.train.steps 3": "--config.train.steps is not an option; "
    "fields are set as --config.section.field=",
    "--workdri=x": "--workdri=x is not an option; did you mean --workdir?",
    "more": "more is not an option",
    "--config.model.d_model=1e3": "--config.model.d_model must be int, not '1e3'",
    "--config.model.agg_cache=yes": "--config.model.agg_cache must be true or false, not 'yes'",
    "--config.optimizer.lr_max=fast": "--config.optimizer.lr_max must be float, not 'fast'",
    "--config.optimizer.name=adam": "must be one of adafactor, adamw, lion, muon, not 'adam'; did",
    "--config.train.update_len=48": "64 is not a multiple of config.train.update_len 48; use 48 or 96",
    "--config.model.block_len=12": "32 is not a multiple of config.model.block_len 12; use 24 or 36",
    "--config.train.steps=21": "config.train.steps 21 is not a multiple of 2, the updates of one sequence",
    "--config.mesh.devices=3": "global_batch_size 8 is not a multiple of config.mesh.devices 3; use 6 or 9",
    "--config.mesh.devices=4": "4 but there are 8 cpu devices; use 8 or -1, or pass --cpu_devices=4",
    "--config.train.global_batch_size=12": "12 is not a multiple of config.mesh.devices 8; use 8 or 16",
    "--config.evaluate.split=train": "config.evaluate.split=train is for tvq eval; train with validation",
    "--config.evaluate.batch_size=3": "batch_size 3 is not a multiple of config.mesh.devices 8; use 8",
    "--cpu_devices=0": "--cpu_devices must be at least 1, not 0",
    "--config.model.dtype=float64": "use float64 for both or neither",
    "--config.model.n_vocab=300": "has a vocabulary of 259 ids (bytes); set it to 259",
    "--config.data.path=none": "(No such file or directory): it does not exist, or is a broken link",
    "--config.data.path=/dev/null": "/dev/null is neither a file nor a folder",
    "--config.data.path=": "config.data.source=text needs config.data.path",
    "--config.data.cache=/dev/null/x": "config.data.cache: cannot write",
    "--config.model.n_layer=0 --config.log.every=0": "n_layer must be at least 1, not 0\nconfig.log.every",
}


@pytest.mark.parametrize("options", FIELDS)
def test_fields(tvq: Program, refuse: Refuse, tmp_path: Path, options: str) -> None:
    assert FIELDS[options] in refuse("train", *tvq.options(tmp_path / "run", *options.split()))
    assert tree(tmp_path) == {}


CONFIG_FILES = {
    "x = 1": " has no function get_config()",
    "def get_config(): return {}": "get_config() did not return a ConfigDict; start from config.base()",
    "def get_config(:": "line 1 is not Python: invalid syntax",
    "c.model.d_modle = 4": ', line 6: Key "d_modle" does not exist and cannot be added since the config is'
    ' locked. Did you mean "d_model" instead of "d_modle"?\n',
    "c.modl.d_model = 4": ', line 6: \'modl\' Did you mean "model" instead of "modl"?\n',
    "c.train.steps = 2.5": ", line 6: Could not override field 'steps'",
    "c.train.steps = -4": "config.train.steps must be at least 1, not -4",
}


@pytest.mark.parametrize("text", CONFIG_FILES)
def test_config_file(refuse: Refuse, tmp_path: Path, text: str) -> None:
    path = tmp_path / "preset.py"
    if text.startswith("c."):
        head = "from tvq import config\n\n\ndef get_config():\n    c = config.base()\n"
        path.write_text(f"{head}    {text}\n    return c\n")
    else:
        path.write_text(text)
    assert CONFIG_FILES[text] in refuse("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert tree(tmp_path) == {"preset.py": path.read_bytes()}


def test_no_config_file(refuse: Refuse, tmp_path: Path) -> None:
    message = refuse("train", "--config=none.py", f"--workdir={tmp_path}")
    assert message == "--config=none.py: there is no such file\n"


def test_data_without_text(tvq: Program, refuse: Refuse, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    for path in (folder, file):
        assert f"{path} holds no text" in refuse(
            "train", *tvq.options(tmp_path / "run", f"--config.data.path={path}")
        )
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    message = refuse("train", *tvq.options(tmp_path / "run", f"--config.data.path={folder}"))
    assert f"cannot read {folder / 'gone.txt'} (No such file or directory)" in message
    assert not (tmp_path / "run" / config.FILE).exists()


def test_other_tokens_than_the_vocabulary(tvq: Program, refuse: Refuse, tmp_path: Path) -> None:
    data = schema.Data(source="text", path=str(tvq.corpus), cache=str(tmp_path / "cache"))
    folder = open_corpus(data).folders[0].path
    command = tvq.options(tmp_path / "run", "--config.data.source=tokens", f"--config.data.path={folder}")

    tokens = np.fromfile(folder / "train.tokens", "<u2")
    tokens[5] = 50256
    tokens.tofile(folder / "train.tokens")
    assert "train.tokens has sha256" in refuse("train", *command)
    manifest = folder / "manifest.json"
    found = json.loads(manifest.read_text())
    found["splits"]["train"]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    manifest.write_text(json.dumps(found))
    message = refuse("train", *command)
    assert "token 5 of" in message
    assert "is id 50256, outside the vocabulary 'bytes' of 259 ids" in message

    manifest.write_text(json.dumps(found | {"vocabulary": found["vocabulary"] | {"size": 300}}))
    assert "was made with 300 ids of 'bytes', which has 259" in refuse("train", *command)
    manifest.write_text(json.dumps(found | {"vocabulary": found["vocabulary"] | {"name": "words"}}))
    assert "was made with the vocabulary 'words', this tvq knows bytes" in refuse("train", *command)
    manifest.unlink()
    assert "is not a prepared folder" in refuse("train", *command)
    assert tree(tmp_path / "run") == {}


def write_run(tvq: Program, workdir: Path, *more: str) -> None:
    """A workdir as a run leaves it that was killed before its first checkpoint."""
    arguments, overrides = __main__.parser().parse_known_args(["train", *tvq.options(workdir, *more)])
    workdir.mkdir()
    found = config.to_dict(__main__.read_config(arguments, overrides))
    (workdir / config.FILE).write_text(json.dumps(found))


def test_another_run_in_the_workdir(tvq: Program, refuse: Refuse, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    write_run(tvq, workdir)
    before = tree(workdir)
    different = ("--config.model.d_model=32", "--config.optimizer.lr_max=0.5", "--config.train.seed=1")
    message = refuse("train", *tvq.options(workdir, *different, "--config.log.every=7"))
    assert message.splitlines() == [
        f"--workdir={workdir} holds a run with another config; resume with its own config,"
        " or use another workdir:",
        "  config.model.d_model: 16 in the run, 32 now",
        "  config.optimizer.lr_max: 0.01 in the run, 0.5 now",
        "  config.train.seed: 0 in the run, 1 now",
    ]
    assert tree(workdir) == before


def test_a_config_that_was_edited_badly(tvq: Program, refuse: Refuse, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    write_run(tvq, workdir)
    (workdir / config.FILE).write_text('{"model": {\n"d_model": 32,}}')
    for command in (["train", *tvq.options(workdir)], ["eval", f"--workdir={workdir}"]):
        assert f"line 2 of {workdir / config.FILE} is not JSON" in refuse(*command)
    for text in ("[]", '{"train": 3}', '{"train": {"steps": "many"}}'):
        (workdir / config.FILE).write_text(text)
        assert f"{workdir / config.FILE} is not a valid config (" in refuse("eval", f"--workdir={workdir}")


def test_a_workdir_that_is_no_run(tvq: Program, refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    message = refuse("train", *tvq.options(tmp_path))
    assert message == f"--workdir={tmp_path} is not empty and holds no run; use another folder\n"
    assert tree(tmp_path) == {"thesis.tex": b"mine"}
    message = refuse("train", *tvq.options(tmp_path / "thesis.tex"))
    assert "thesis.tex is not a folder; use another" in message


def test_a_run_that_is_going_on_in_the_workdir(tvq: Program, here: Here, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    write_run(tvq, workdir)
    with contextlib.closing(cluster.Log(workdir / "logs", cluster.Place(how="another"))) as log:
        log.claim()
        before = tree(workdir)
        _, stderr = here("train", *tvq.options(workdir, "--config.train.steps=40"), exit_code=1)
        assert "a run is in progress in --workdir" in stderr
        after = tree(workdir)
        assert "a run is in progress" in after.pop("logs/process_0.log").decode()
        assert after.items() <= before.items()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["sample"], "--output=/dev/null/x"),
        (["sample"], "--save_state=/dev/null/x"),
        (["profile", f"--config={TINY}"], "--output=/dev/null/x"),
    ],
)
def test_where_nothing_can_be_written(
    tvq: Program, refuse: Refuse, tmp_path: Path, command: list[str], option: str
) -> None:
    """Said before anything is read, drawn or compiled."""
    write_run(tvq, tmp_path / "run")
    more = [] if command[0] == "profile" else [f"--workdir={tmp_path / 'run'}"]
    message = refuse(*command, *more, option, f"--config.data.path={tvq.corpus}")
    assert message.startswith((f"{option}: cannot write there (", "--save_state=/dev/null: cannot write"))


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_nothing_trained(tvq: Program, refuse: Refuse, tmp_path: Path, command: str) -> None:
    workdir = tmp_path / "run"
    message = refuse(command, f"--workdir={workdir}")
    assert message == f"--workdir={workdir} holds no run: there is no {workdir / config.FILE}\n"
    assert tree(tmp_path) == {}
    write_run(tvq, workdir)
    before = tree(workdir)
    assert (
        refuse(command, f"--workdir={workdir}") == f"--workdir={workdir} holds no checkpoint; train first\n"
    )
    assert tree(workdir) == before
    (workdir / "checkpoints").mkdir()
    assert refuse(command, f"--workdir={workdir}") == f"--workdir={workdir} holds no checkpoint yet\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["eval", "--split=valid"],
            "config.evaluate.split must be one of train, validation, test, not 'valid'",
        ),
        (["eval", "--batch_size=few"], "--config.evaluate.batch_size must be int, not 'few'"),
        (["sample", "--nucleus=2"], "config.sample.nucleus must be in [0, 1], not 2.0"),
        (["sample", "--promt=x"], "--promt=x is not an option; did you mean --prompt?"),
    ],
)
def test_options(tvq: Program, refuse: Refuse, tmp_path: Path, arguments: list[str], expected: str) -> None:
    write_run(tvq, tmp_path / "run")
    assert expected in refuse(*arguments, f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "tvq: interrupted\n"),
        (cluster.ClusterError("process 3 is absent"), 1, "tvq: process 3 is absent\n"),
        (DivergedError("the loss is nan"), 3, "tvq: the loss is nan\n"),
    ],
)
def test_other_ends_without_a_traceback(
    tvq: Program,
    here: Here,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    exit_code: int,
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr(train, "train", fail)
    out, err = here("train", *tvq.options(tmp_path), exit_code=exit_code)
    assert (out, err) == ("", message)


def test_a_mistake_of_ours_keeps_its_traceback(
    tvq: Program, here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "train", lambda *_, **__: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        here("train", *tvq.options(tmp_path))


def test_a_refused_start_leaves_no_log(tvq: Program, refuse: Refuse, tmp_path: Path) -> None:
    refuse("train", *tvq.options(tmp_path / "run", "--config.data.path=nowhere"))
    refuse("train", *tvq.options(tmp_path / "run", "--config.mesh.devices=4"))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            "--cpu_devices=3",
            "config.train.global_batch_size 8 is not a multiple of config.mesh.devices 3; use 6",
        ),
        ("--config.trian.steps=3", "--config.trian.steps is not a field; did you mean train.steps?"),
    ],
)
def test_as_a_command(tvq: Program, tmp_path: Path, more: str, expected: str) -> None:
    stdout, stderr = tvq.run_apart("train", *tvq.options(tmp_path / "run", more), exit_code=2)
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith(f"tvq: {expected}")
    assert len(stderr.splitlines()) <= 2


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(tvq: Program, unbroken: Path, run: Path) -> None:
    arrays = run / "checkpoints" / "18" / "state"
    largest = max(
        (path for path in arrays.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    stdout, stderr = tvq.train(run)
    assert "checkpoint 18 is damaged (state/" in stdout
    assert "falling back to 12" in stdout
    assert "resuming from step 12" in stdout
    assert "Traceback" not in stderr
    assert_same_run(run, unbroken)


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_can_go_on(tvq: Program, unbroken: Path, run: Path) -> None:
    """Its learning rate is made far too high from update 18 on, and then what it was again."""
    recorded = run / config.FILE
    good = recorded.read_text()
    bad = json.loads(good)
    bad["optimizer"]["lr_max"] = 1e30
    recorded.write_text(json.dumps(bad))
    before = tree(run / "checkpoints")
    stdout, stderr = tvq.train(run, "--config.optimizer.lr_max=1e30", "--config.train.steps=30", exit_code=3)
    assert "resuming from step 18" in stdout
    message = stderr.splitlines()[-1]
    assert message.startswith(("tvq: the loss is nan at step 2", "tvq: the norm of the gradient is "))
    assert "checkpoint 18 is from before that: lower config.optimizer.lr_max" in message
    assert message.endswith(f"to resume from there, in {recorded} too")
    assert "Traceback" not in stderr
    assert tree(run / "checkpoints") == before
    assert all(row["loss"] is not None for row in rows(run)), "a row that is not a number"

    recorded.write_text(good)
    tvq.train(run)
    assert_same_run(run, unbroken)


@pytest.mark.slow
def test_a_run_that_diverges_at_once(tvq: Program, tmp_path: Path) -> None:
    _, stderr = tvq.train(tmp_path, "--config.optimizer.lr_max=1e30", exit_code=3)
    assert "there is no checkpoint yet: lower config.optimizer.lr_max" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert tree(tmp_path / "checkpoints") == {}


@pytest.mark.slow
def test_other_data_than_the_run_was_trained_on(tvq: Program, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tvq.corpus.read_text().upper())
    recorded = json.loads((run / config.FILE).read_text())
    recorded["data"]["path"] = str(other)  # as if that file had been changed
    (run / config.FILE).write_text(json.dumps(recorded))
    before = tree(run)
    _, stderr = tvq.train(run, f"--config.data.path={other}", exit_code=2)
    assert "is not what checkpoint 18 was trained on; set config.data to that" in stderr.splitlines()[-1]
    after = tree(run)
    assert after.keys() == before.keys()
    own = (config.FILE, "logs/process_0.log")
    assert all(after[name] == before[name] for name in before if name not in own)
