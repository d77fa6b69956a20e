"""A run that starts from a checkpoint of another, under a config of its own."""

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.program import Program, arrays, newest, rows
from tvq.programs.report import runs


def said(tvq: Program, workdir: Path, *more: str, exit_code: int = 0) -> str:
    return "".join(tvq.train(workdir, *more, exit_code=exit_code))


def test_the_same_config_continues_as_the_parent_would(tvq: Program, unbroken: Path, tmp_path: Path):
    """Bitwise; then neither resuming nor the report needs the parent."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    shutil.copytree(unbroken, parent)
    first = said(tvq, child, f"--from={parent}@12", "--config.train.steps=16")
    assert f"starting from step 12 of {parent}: weights, codebooks and optimizer state; at step 12" in first
    shutil.rmtree(parent)
    again = said(tvq, child, f"--from={parent}@12", "--config.profile.steps=4:7")
    assert "resuming from step 16" in again
    ours, theirs = arrays(newest(child)), arrays(newest(unbroken))
    assert {name: x.tobytes() for name, x in ours.items()} == {n: x.tobytes() for n, x in theirs.items()}
    assert rows(child) == [row for row in rows(unbroken) if row["step"] >= 12 and row["step"] != 12]
    (drawn,) = runs.read([str(child)])
    assert [(r["step"], r["split"]) for r in drawn.rows] == [(r["step"], r["split"]) for r in rows(unbroken)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--from={run}@7"], "no checkpoint of step 7; there are those of 12, 18", id="step"),
        pytest.param(["--from={run}/nothing"], "holds no checkpoint", id="no run"),
        pytest.param(["--from={run}", "--from_weights={run}"], "use one of them", id="both"),
        pytest.param(
            ["--from={run}", "--config.model.n_code=16", "--config.model.mem_len=16"],
            "config.model.n_code: 8 there, 16 now; set it to 8\n",
            id="shapes",
        ),
        pytest.param(["--from={run}", "--config.model.e_tie=true"], "e_tie: False there, True now", id="tie"),
        pytest.param(
            ["--from={run}@12", "--config.train.steps=12"],
            "continues at step 12, and config.train.steps is 12: raise it above 12",
            id="done",
        ),
        pytest.param(
            ["--from={run}@18", "--config.train.sequence_len=128", "--config.model.revive_codes=0"],
            "in the midst of a sequence of 4 updates (config.train.sequence_len 128 / update_len 32); start"
            " from a multiple of 4 with RUN@STEP (it has 12)",
            id="cut",
        ),
    ],
)
def test_what_cannot_be_taken_over_is_refused(tvq: Program, run: Path, tmp_path: Path, options, message):
    child = tmp_path / "child"
    assert message in said(tvq, child, *(text.format(run=run) for text in options), exit_code=2)
    assert not (child / "config.json").exists()


def test_a_run_keeps_its_origin(tvq: Program, run: Path, tmp_path: Path):
    """A command that asks for another one is refused, and so is one for a run that has none."""
    assert "is the run in --workdir" in said(tvq, run, f"--from={run}", exit_code=2)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert "did not start from another" in said(tvq, other, f"--from={run}", exit_code=2)
    origin = {"run": str(run), "step": 12, "asked": "state"}
    (other / "origin.json").write_text(json.dumps(origin))
    for options in (f"--from={run}@6", f"--from_weights={run}@12", f"--from={tmp_path}"):
        assert f"started from the state of {run}@12, not {options}" in said(tvq, other, options, exit_code=2)


def test_what_cannot_be_taken_over_starts_new(tvq: Program, unbroken: Path, tmp_path: Path):
    """Another optimizer, batch, length, block and mesh: the weights are taken, and the step is 0."""
    child = tmp_path / "a@12"
    options = (
        "--config.optimizer.name=lion",
        "--config.train.sequence_len=32",
        "--config.model.revive_codes=0",
    )
    more = ("--config.model.block_len=16", "--config.train.global_batch_size=4", "--config.train.steps=4")
    first = said(tvq, child, f"--from={unbroken}@12", *options, *more, "--config.checkpoint.keep=9")
    assert "weights and codebooks; at step 0" in first
    assert "the optimizer is new, and its schedule starts at step 0: config.optimizer.name is 'lion'" in first
    assert "config.model.block_len: 8 in the parent, 16 now" in first
    assert json.loads((child / "origin.json").read_text())["takes"] == "weights"
    assert not (child / "before.jsonl").read_text()
    assert [row["step"] for row in rows(child) if row["split"] == "train"] == [2, 4]

    # A folder whose name has an @ is itself; with a step it is that checkpoint.
    options = ["--batch_size=4", "--config.data.path=" + str(tvq.corpus)]
    at = {where: tvq.run("eval", f"--workdir={where}", *options)[0] for where in (child, f"{child}@0")}
    assert ['"step": 4' in text for text in at.values()] == [True, False]
    assert '"step": 0' in at[f"{child}@0"]
