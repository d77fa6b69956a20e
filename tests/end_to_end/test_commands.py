"""What the commands print and promise."""

import importlib.metadata
import inspect
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from etils import epath

from tests.end_to_end.conftest import Here
from tests.end_to_end.program import REPOSITORY, TINY, Program, end, newest, rows
from tests.fakes.pod import environment
from tvq import __main__, cluster, commands, config, schema
from tvq.cluster.log import CLEAR
from tvq.commands import COMMANDS
from tvq.programs import prepare, train
from tvq.run import metrics

EXAMPLES = [
    (name, example)
    for name, command in COMMANDS.items()
    if command.takes == "devices"
    for example in textwrap.dedent(command.examples).replace("\\\n", "").strip().splitlines()
]


def test_the_command_is_installed() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="tvq")
    assert entry.load() is __main__.main


def test_a_start_imports_what_its_command_needs() -> None:
    program = (
        "import sys; from tvq import __main__; from tvq.commands import COMMANDS, program;"
        " __main__.parser(); print(*sys.modules); print(program(COMMANDS['report'].start), *sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    helped, started = shown.splitlines()
    assert not {"jax", "grain", "orbax", "tvq.programs.train"} & set(helped.split())
    assert started.startswith("<function start ")
    assert not {"grain", "orbax", "flax", "optax", "tvq.programs.train"} & set(started.split())


def test_every_command_has_its_program() -> None:
    for name, command in COMMANDS.items():
        own = {flag.removeprefix("--"): None for flag in command.own}
        own |= {"at": None} if command.at_step else {}
        given = {"options": 0, "config": 3, "devices": 4}[command.takes]
        signature = inspect.signature(__main__.program(command.start))
        assert signature.bind_partial(*[None] * given, **own), f"{name}: TypeError if it does not take these"
        assert not command.recorded_config or __main__.program(command.recorded_config)


def test_another_program_is_one_entry(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That of docs/extending.md."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    (entry,) = re.findall(r'```python\n("count": .*?)```', page, re.DOTALL)
    monkeypatch.setitem(COMMANDS, "count", eval(f"{{{entry}}}", vars(commands))["count"])
    module, asked = types.ModuleType("tvq.programs.count"), []
    module.count = lambda config, workdir, place, log, *, by: asked.append((workdir, by)) or 0  # type: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / config.FILE).write_text(config.base().to_json())
    assert "  --by {layer,kind}" in here("count", "--help")[0]
    here("count", f"--workdir={tmp_path}", "--by=kind")
    assert asked == [(epath.Path(tmp_path), "kind")]


@pytest.mark.parametrize("command", dict(EXAMPLES))
def test_help(here: Here, command: str) -> None:
    stdout, _ = here(command, "--help")
    assert f"tvq {command} " in stdout.partition("examples:")[2]
    lines = stdout.partition("every field of the config")[2].splitlines()
    fields = [line for line in lines if line.startswith("  --config.")]
    assert len(fields) == len(config.docs())
    assert len({line.rindex("  ") for line in fields}) == 1, "the meanings stand below one another"


def test_help_of_all_commands(here: Here) -> None:
    stdout, _ = here("--help")
    assert all(command.help in stdout for command in COMMANDS.values())


def test_help_of_prepare(here: Here, tmp_path: Path) -> None:
    stdout, _ = here("prepare", "--help")
    examples = stdout.partition("examples:")[2].strip().splitlines()
    for example in examples:
        arguments, more = __main__.parser().parse_known_args(shlex.split(example)[1:])
        assert not more
        assert prepare.Options(**__main__.own_options(arguments)).kind in schema.RAW
    assert len(examples) == len(schema.RAW)


def test_commands_for_data(here: Here) -> None:
    """Those of docs/data.md that need downloads are at least commands."""
    page = (REPOSITORY / "docs" / "data.md").read_text().replace("\\\n", "")
    examples = [line.strip() for line in page.splitlines() if line.startswith("    tvq ")]
    assert len(examples) == 6
    for example in examples:
        arguments, more = __main__.parser().parse_known_args(shlex.split(example)[1:])
        if arguments.command == "prepare":
            assert not more
        else:
            arguments.config = str(REPOSITORY / arguments.config)
            __main__.read_config(arguments, more)


def test_prepare(here: Here, tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("to be, or not to be\n" * 50)
    command = ("prepare", "text", f"--input={tmp_path / 'raw.txt'}", f"--output={tmp_path / 'out'}")
    stdout, _ = here(*command)
    lines = stdout.splitlines()
    assert lines[0] == "train      901 tokens of 900 bytes in 1 documents"
    assert lines[3:5] == [
        "split      train, validation and test end at bytes 900, 950 and 1000",
        "vocabulary bytes, 259 ids",
    ]
    assert lines[5].startswith(f"prepared   {tmp_path / 'out'}, at ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "manifest.json"
    _, err = here(*command, exit_code=2)
    assert err == f"tvq: --output={tmp_path / 'out'} already exists; use another folder, or remove it\n"
    _, err = here(*command, "--colunm=a", exit_code=2)
    assert err == "tvq: --colunm=a is not an option; did you mean --column?\n"


def test_config_marks_what_is_not_at_its_default(here: Here, tmp_path: Path) -> None:
    more = ("--config.data.path=x", "--config.train.steps=40")
    stdout, _ = here("config", f"--config={TINY}", *more)
    *lines, _, legend = stdout.splitlines()
    assert len(lines) == len(config.docs())
    assert lines[0].startswith("  --config.model.n_vocab=259 ")
    assert lines[1].startswith("* --config.model.n_layer=1 ")
    assert lines[1].endswith("  layers; each is two gated attention units (default 24)")
    steps = next(line for line in lines if ".train.steps=" in line)
    assert steps.startswith("> --config.train.steps=40 ")
    assert steps.endswith("  parameter updates of the run (default 125000)")
    assert legend == f"* set by {TINY}; > set here; all others are defaults"
    helped, _ = here("train", "--help")
    assert lines[0] in helped.splitlines(), "--help shows the same"

    (tmp_path / config.FILE).write_text(config.base().to_json())
    stdout, _ = here("config", f"--workdir={tmp_path}")
    assert sorted({line[:2] for line in stdout.splitlines()[:-2]}) == ["  "]
    _, stderr = here("config", exit_code=2)
    assert stderr == "tvq: tvq config needs a --config file or the --workdir of a run\n"


def test_report_is_a_command(here: Here, tmp_path: Path) -> None:
    examples = here("report", "--help")[0].partition("examples:")[2].strip().splitlines()
    arguments, more = __main__.parser().parse_known_args(shlex.split(examples[-1])[1:])
    assert (arguments.workdir, arguments.more, more) == ("runs/debug", ["runs/mine"], [])
    _, stderr = here("report", f"--workdir={tmp_path}", exit_code=2)
    assert stderr == f"tvq: --workdir={tmp_path} holds no run: there is no {tmp_path / config.FILE}\n"
    _, stderr = here("report", "--workdir=x", "--ouput=y", exit_code=2)
    assert stderr == "tvq: --ouput=y is not an option; did you mean --output?\n"


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_the_examples_of_help_are_commands(
    name: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    _, *arguments = shlex.split(example)
    parsed, overrides = __main__.parser().parse_known_args(arguments)
    assert parsed.command == name
    if parsed.config is None:
        parsed.workdir = parsed.input = str(tmp_path)
        (tmp_path / config.FILE).write_text(json.dumps(config.to_dict(schema.Config())))
    __main__.read_config(parsed, overrides)


@pytest.mark.slow
def test_sample(here: Here, unbroken: Path) -> None:
    def sample(*options: str) -> str:
        stdout, stderr = here("sample", f"--workdir={unbroken}", "--length=12", *options)
        assert stderr == ""
        return stdout

    text = sample("--prompt=import ", "--n_sample=2", "--seed=3")
    assert text.startswith("--- sample 1 of 2 ---\nimport ")
    assert "\n--- sample 2 of 2 ---\nimport " in text
    one, two = text.removeprefix("--- sample 1 of 2 ---\n").split("\n--- sample 2 of 2 ---\n")
    assert one + "\n" != two
    assert sample("--prompt=import ", "--n_sample=2", "--seed=3") == text
    assert sample("--prompt=import ", "--n_sample=2", "--seed=4") != text
    # The input of a sequence does not depend on how many there are.
    assert sample("--prompt=import ", "--seed=3") == one + "\n"
    assert sample("--prompt=\udcffmport ", "--seed=3").startswith("\ufffdmport "), "a byte that is no UTF-8"
    likeliest = sample("--prompt=import ", "--seed=3", "--temperature=0")
    assert likeliest == sample("--prompt=import ", "--seed=4", "--temperature=0")


@pytest.mark.slow
def test_sample_to_the_terminal_and_to_files(here: Here, unbroken: Path, tmp_path: Path) -> None:
    def sample(*options: str) -> str:
        stdout, stderr = here("sample", f"--workdir={unbroken}", "--length=20", *options)
        assert stderr == ""
        return stdout

    lines = ["import ", "for i in y:", "x" * 30]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n")
    together = sample(f"--prompts={prompts}", "--batch_size=2")
    assert sample(f"--prompts={prompts}", "--stream") == together
    alone = [sample(f"--prompt={line}") for line in lines]
    assert together == "".join(f"--- sample {i + 1} of 3 ---\n{text}" for i, text in enumerate(alone))

    objects = tmp_path / "prompts.jsonl"
    objects.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    out = tmp_path / "texts"
    assert sample(f"--prompts={objects}", f"--output={out}") == f"3 texts in {out}\n"
    assert [path.read_bytes().decode() + "\n" for path in sorted(out.iterdir())] == alone


@pytest.mark.slow
def test_a_document_is_read_once(here: Here, unbroken: Path, tmp_path: Path) -> None:
    document, state = tmp_path / "document.txt", tmp_path / "document.state"
    document.write_text("x = 1\n" * 100)
    run = ("sample", f"--workdir={unbroken}", "--length=12")
    stdout, stderr = here(*run, f"--document={document}", f"--save_state={state}", "--prompt=for ")
    assert stderr == f"state after 601 tokens in {state}: 0.0 MB, as after any number\n"
    assert here(*run, f"--from_state={state}", "--prompt=for ") == (stdout, "")
    whole, _ = here(*run, f"--prompt={document.read_text()}for ")
    assert whole == document.read_text() + stdout


@pytest.mark.slow
def test_weights_leave_and_come_back(here: Here, tvq: Program, unbroken: Path, tmp_path: Path) -> None:
    weights, workdir = tmp_path / "weights", tmp_path / "copy"
    here("export", f"--workdir={unbroken}", f"--output={weights}")
    here("import", f"--input={weights}", f"--workdir={workdir}")
    sample = ("--length=12", "--prompt=import ")
    assert here("sample", f"--workdir={workdir}", *sample) == here("sample", f"--workdir={unbroken}", *sample)
    stdout, _ = tvq.train(workdir)
    assert f"{workdir}: resuming from step 0" in stdout
    assert rows(workdir)[0]["loss"] < rows(unbroken)[0]["loss"] - 0.5


@pytest.mark.slow
def test_eval_finds_what_training_found(tvq: Program, unbroken: Path) -> None:
    stdout, stderr = tvq.run("eval", f"--workdir={unbroken}")
    line, row = stdout.splitlines()
    assert line.startswith(f"validation loss {json.loads(row)['loss']:.4f}, ")
    assert "gzip -9: " in line
    assert json.loads(row) == [row for row in rows(unbroken) if row["split"] == "validation"][-1]
    assert "warning" not in stderr.lower()

    stdout, _ = tvq.run("eval", f"--workdir={unbroken}", "--split=test", "--batch_size=3")
    found = json.loads(stdout.splitlines()[1])
    assert found["split"] == "test"
    assert found["n_byte"] == 200  # the last 5 % of 4,000 bytes
    assert found["loss"] == pytest.approx(json.loads(row)["loss"], rel=0.2)


def result(run: Path, name: str) -> dict:
    """What was written, under the name and a digest of the settings."""
    (path,) = (run / "evaluations").glob(f"{name}_????????.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_recall(tvq: Program, run: Path) -> None:
    command = ("recall", f"--workdir={run}", "--length=250", "--n_sequence=2")
    stdout, _ = tvq.run(*command)
    *table, row = stdout.splitlines()
    assert table[1].split()[0] == "window"
    assert table[-1].split() == ["chance", "5.5452"]
    found = result(run, "step_18_recall")
    assert json.loads(row).items() <= found.items()
    assert found["length"] == 256  # whole pieces of 32
    assert [row["recalled"] for row in found["answers"][:2]] == [0.0, 0.0], "it has learnt nothing yet"
    assert found["config"]["recall"]["length"] == 250


@pytest.mark.slow
def test_eval_of_whole_documents(tvq: Program, run: Path) -> None:
    """A table, and a file with what is needed to repeat it: one document of the 200 bytes."""
    stdout, _ = tvq.run("eval", f"--workdir={run}", "--split=test", "--carry", "--batch_size=2")
    *table, line, row = stdout.splitlines()
    assert table[1].split()[-1] == "1"
    assert table[-1].startswith("              128 to 255  ")
    assert line.startswith("test loss ")
    found = result(run, "step_18_test_carried")
    assert json.loads(row).items() <= found.items()
    assert sum(row["n_token"] for row in found["by_context"]) == found["n_token"] == 201
    assert found["config"]["evaluate"]["carry"] is True
    assert found["config"]["train"]["seed"] == 0
    assert found["code"] == cluster.code_version()
    assert found["data"]["vocabulary"]["name"] == "bytes"


def render(output: str) -> list[str]:
    """The lines on a terminal at the end."""
    return [line.rstrip("\r").rpartition(CLEAR)[2] for line in output.split("\n")]


@pytest.mark.slow
def test_a_terminal_shows_one_live_line(tvq: Program, run: Path) -> None:
    ours, theirs = pty.openpty()
    terminal = {"TERM": "xterm", "PYTHONIOENCODING": "ascii"}
    with tvq.start("train", *tvq.options(run), stdout=theirs, is_fork=False, **terminal) as process:
        os.close(theirs)
        chunks = []
        while chunk := read(ours):
            chunks.append(chunk)
        os.close(ours)
        end(process, 0)
    output = b"".join(chunks).decode()
    lines = render(output)
    named = {line.partition(" ")[0] for line in lines}
    assert {"model", "mesh", "data", "batch", "workdir", "compile", "memory", "time"} <= named
    assert "mesh     1 x cpu: devices=1 (cuts the batch)" in lines
    assert CLEAR + "compiling" in output
    assert CLEAR + "drawing: 8 of 8 tokens" in output
    assert output.count(CLEAR + "step 20 of 20, loss ") >= 1
    assert re.search(r"evaluating: (\d+) of \1 pieces", output)
    lines = render(output)
    assert [line for line in lines if line.startswith("step 20 of")] == [lines[-2]]
    assert not any(line.startswith("evaluating") for line in lines)
    assert lines[-1] == ""
    assert f"step 20: sample in {run / 'samples'}" in lines
    assert any(line.startswith("step 20: validation loss") for line in lines)
    assert all(len(line) < 80 for line in lines if line.startswith("step") and " of 20" in line)


def test_quiet_is_plain_lines(
    tvq: Program, here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def program(*_: object, **__: object) -> int:
        with metrics.Console() as console:
            console.progress("batch 1 of 1", brief=True)
            console.progress("step 1")
            console.progress("step 2")
        return 0

    monkeypatch.setattr(train, "train", program)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    stdout, _ = here("train", *tvq.options(tmp_path))
    assert stdout == f"{CLEAR}batch 1 of 1{CLEAR}step 1{CLEAR}step 2{CLEAR}step 2\n"
    stdout, _ = here("train", *tvq.options(tmp_path), "--quiet")
    assert stdout == "step 1\nstep 2\n"


def read(terminal: int) -> bytes:
    """Some bytes, or none once the other side is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


@pytest.mark.slow
def test_a_finished_run_can_be_prolonged_with_other_habits(
    tvq: Program, unbroken: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    before = rows(workdir)
    stdout, _ = tvq.train(workdir)
    assert "step 20 of config.train.steps 20 is done; raise it to continue" in stdout

    habits = ("log.every=4", "evaluate.every=0", "checkpoint.keep=1", "mesh.devices=1", "data.workers=0")
    stdout, _ = tvq.train(workdir, "--config.train.steps=24", *(f"--config.{habit}" for habit in habits))
    assert "resuming from step 20" in stdout
    assert "\x1b" not in stdout
    assert "\r" not in stdout
    assert rows(workdir)[: len(before)] == before
    assert [(row["step"], row["split"]) for row in rows(workdir)[len(before) :]] == [(24, "train")]
    assert newest(workdir).step == 24
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["24"]
    assert json.loads((workdir / config.FILE).read_text())["log"]["every"] == 4


def test_what_reproducible_means(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    (tmp_path / config.FILE).write_text(json.dumps(config.to_dict(schema.Config())))
    _, err = here("doctor", f"--workdir={tmp_path}", "--config.train.reproducible=true", exit_code=2)
    assert err == f"tvq: --workdir={tmp_path} holds no checkpoint; train first\n"
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to= --xla_gpu_deterministic_ops=true"
