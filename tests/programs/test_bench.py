"""tvq bench: it times only checked programs, rejects those that disagree; its FLOPs are the compiler's."""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from tests.end_to_end.program import write_corpus
from tests.fakes.pod import SHORT_RUN, environment
from tvq import __main__ as door
from tvq import cluster, schema, sharding
from tvq import model as lm
from tvq.errors import DisagreementError
from tvq.model import attention, full
from tvq.programs import bench
from tvq.programs.bench import cases, report, session

TINY = schema.Model(
    n_vocab=259, n_layer=1, d_model=8, d_k=4, d_v=8, n_code=8, block_len=8, mem_len=8, pe_lam=100.0
)
KINDS = [pytest.param("train", marks=pytest.mark.slow), "attention"]
ROOT = Path(__file__).parents[2]
NOWHERE = cluster.find(schema.Cluster(), {}, None)


def tiny(tmp_path: Path, **fields: object) -> schema.Config:
    corpus = tmp_path / "corpus.txt"
    write_corpus(corpus)
    return schema.Config(
        model=TINY,
        data=schema.Data(source="text", path=str(corpus), cache=str(tmp_path / "cache")),
        train=schema.Train(steps=1, global_batch_size=1, sequence_len=32, update_len=32),
        mesh=schema.Mesh(devices=1),
        bench=schema.Bench(
            **{
                "lengths": "16,32",
                "contexts": "8,16",
                "batch_sizes": "1,2",
                "n_draw": 2,
                "rounds": 2,
                **fields,
            }
        ),
    )


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A laptop, and clocks that need no long calls."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(session, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(cases, "N_BATCH", 3)


def measured(tmp_path: Path, **fields: object) -> dict:
    log = cluster.Log(tmp_path / "logs", NOWHERE)
    with log.file:
        assert bench.bench(tiny(tmp_path, **fields), epath.Path(tmp_path / "out"), NOWHERE, log) == 0
    return json.loads((tmp_path / "out" / "bench.json").read_text())


@pytest.mark.slow
def test_train(tmp_path):
    """Also the files, and that nothing is missing in them."""
    found = measured(tmp_path, kind="train", lengths="16", n_token=32, formulations="all,serial:nothing,full")
    labels = [(row["formulation"], row["T"]) for row in found["rows"]]
    assert labels == [(name, 16) for name in ("all", "serial:nothing", "full")]
    for row in found["rows"]:
        assert row["10 %"] <= row["ms"] <= row["90 %"]
        assert row["tokens/s"] == pytest.approx(32 / (row["ms"] / 1e3))
        assert row["compile s"] > 0
        assert row["x full"] > 0
    assert len([note for note in found["notes"] if note.startswith("checked: ")]) == 2
    assert found["config"]["model"]["n_code"] == TINY.n_code
    assert {"command", "date", "device", "versions"} <= set(found)
    lines = (tmp_path / "out" / "bench.md").read_text()
    assert lines.count("| serial:nothing |") == 1
    assert found["command"] in lines


@pytest.mark.slow
def test_attention(tmp_path):
    found = measured(tmp_path, kind="attention", formulations="full,serial")
    labels = [(row["formulation"], row["T"]) for row in found["rows"]]
    assert labels == [(name, T) for T in (16, 32) for name in ("full", "serial")]
    assert len(found["notes"]) == 2


@pytest.mark.slow
def test_decode(tmp_path):
    found = measured(tmp_path, kind="decode", contexts="5,16", batch_sizes="3")
    labels = [(row["work"], row["batch"], row["context"]) for row in found["rows"]]
    assert labels == [(w, B, n) for B in (3,) for n in (8, 16) for w in ("prefill", "decode")]
    assert len(found["notes"]) == 1
    c = dataclasses.replace(tiny(tmp_path), model=dataclasses.replace(TINY, attention="full"))
    with pytest.raises(ValueError, match="full cannot decode"):
        cases.prepare_decode(begun(c))


@pytest.mark.slow
def test_data(tmp_path):
    found = measured(tmp_path, kind="data")
    data, step = found["rows"]
    assert data["work"] == "3 batches"
    assert step["x step"] == 1
    assert data["x step"] == pytest.approx(data["tokens/s"] / step["tokens/s"])


def begun(c: schema.Config) -> session.Session:
    return session.Session(c, sharding.make(c.mesh, jax.devices()), lambda text: None, time.monotonic())


@pytest.mark.parametrize("kind", KINDS)
def test_no_speed_of_a_wrong_baseline(tmp_path, monkeypatch, kind):
    right = full.attend
    monkeypatch.setattr(full, "attend", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(DisagreementError, match=r"no speed is given: .* full and"):
        measured(tmp_path, kind=kind, lengths="16", formulations="auto,full")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_speed_of_a_wrong_formulation(tmp_path, monkeypatch, kind):
    right = attention.attend

    def wrong(*arguments, n_parallel, **options):
        o_BHTV, state = right(*arguments, n_parallel=n_parallel, **options)
        return (1.1 if n_parallel == 1 else 1.0) * o_BHTV, state

    monkeypatch.setattr(attention, "attend", wrong)
    with pytest.raises(DisagreementError, match=r"no speed is given: .* of serial and all"):
        measured(tmp_path, kind=kind, lengths="16", formulations="all,serial")


@pytest.mark.slow
def test_no_speed_of_wrong_decoding(tmp_path, monkeypatch):
    right = lm.step

    def wrong(*arguments):
        log_probs_BC, state = right(*arguments)
        return 1.01 * log_probs_BC, state

    monkeypatch.setattr(lm, "step", wrong)
    with pytest.raises(DisagreementError, match="decoded and read in parallel"):
        measured(tmp_path, kind="decode", contexts="8")


def test_not_a_number_agrees_with_nothing(tmp_path):
    with pytest.raises(DisagreementError, match="nan"):
        begun(tiny(tmp_path)).agree(float("nan"), float("nan"), "two")


def test_rounds_are_interleaved_and_end_in_time(tmp_path):
    called: list[str] = []
    s = begun(tiny(tmp_path, rounds=4))
    s.cases += [session.Case({"name": n}, lambda n=n: called.append(n), 1) for n in "abc"]
    assert [len(times) for times in session.measure(s)] == [4, 4, 4]
    rounds = [called[i : i + 3] for i in range(3, 15, 3)]  # after the warm-up
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    late = begun(tiny(tmp_path, rounds=4, seconds=1e-9))
    late.cases += s.cases
    assert [len(times) for times in session.measure(late)] == [1, 1, 1]
    with late.trying(T=8) as go:
        assert not go
    assert late.notes[0].startswith("1 of 4 rounds")
    assert late.notes[1].startswith("left out: 8")


def test_what_does_not_fit_is_left_out(tmp_path):
    s = begun(tiny(tmp_path))
    with s.trying(formulation="full", T=8):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 100 GiB")
    assert s.notes == ["left out: full 8 (out of memory)"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), s.trying(T=8):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": "16,x"}, "config.bench.lengths must be whole numbers .* not '16,x'"),
        ({"lengths": "16,24"}, "config.bench.n_token 24 is not a multiple of the 16 .* use 32"),
        (
            {"formulations": "fast"},
            "config.bench.formulations must be among auto, serial, all, full, flash, or like"
            " auto:nothing, not 'fast'",
        ),
        ({"formulations": "auto:some"}, "config.model.remat"),
        ({"formulations": "flash"}, "config.model.attention=flash needs"),
        ({"lengths": "12"}, "block_len"),
        ({"kind": "speed"}, "config.bench.kind must be one of"),
    ],
)
def test_wrong_input_is_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        measured(tmp_path, **fields)


def test_full_attention_is_no_baseline_of_the_window_alone(tmp_path):
    c = tiny(tmp_path)
    c = dataclasses.replace(c, model=dataclasses.replace(TINY, agg_cache=False))
    with pytest.raises(ValueError, match=r"agg_cache .* must be true if full"):
        list(cases.sweep(c))


def test_model_flops_use():
    """Half the peak of two chips."""

    class Chip:
        device_kind = "TPU v4"

    class Chips:
        devices = np.array([Chip(), Chip()])

    c = dataclasses.replace(schema.Config(), model=dataclasses.replace(TINY, dtype="bfloat16"))
    s = session.Session(c, Chips(), print, 0.0)
    s.cases.append(session.Case({}, print, 10, {}, 275e12 / 10, 2))
    assert report.rows(s, [[1.0, 1.0, 5.0]])[0]["MFU"] == 0.5


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="only the extra plots has it")
    rows = [{"formulation": n, "T": T, "tokens/s": 1e3 * T} for n in ("auto", "full") for T in (8, 16)]
    assert report.plot(rows, epath.Path(tmp_path / "bench.png"))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_door(tmp_path, capsys, monkeypatch):
    assert tuple(bench.PREPARE) == schema.BENCHES
    seen = []
    program = lambda run, output, *_: seen.append((run.bench, output)) or 0
    monkeypatch.setattr(bench, "bench", program)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    arguments = [f"--config={ROOT}/configs/debug.py", f"--output={tmp_path}", "--lengths=64", "--rounds=7"]
    assert door.main(["bench", "attention", *arguments]) == 0
    ((asked, output),) = seen
    assert (asked.kind, asked.lengths, asked.rounds, output) == ("attention", "64", 7, epath.Path(tmp_path))
    with pytest.raises(SystemExit) as refused:
        door.main(["bench", "speed", *arguments])
    assert refused.value.code == 2
    assert "train, attention, decode, data" in capsys.readouterr().err.replace("'", "")


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / "bench_gpu.sh"), "--dry-run", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_the_script_for_a_gpu():
    """Each command that it would run is valid on the command line."""
    shown = script("--seconds", "100", "--output", "here")
    assert shown.returncode == 0, shown.stderr
    commands = [shlex.split(line) for line in shown.stdout.splitlines() if line.startswith("timeout")]
    limits = 0
    for command in commands:
        limits += int(command[1])
        arguments, overrides = door.parser().parse_known_args(command[command.index("tvq") + 1 :])
        run = door.read_config(arguments, overrides)
        assert run.model.dtype == "bfloat16"
        assert all(trial.train.update_len == T for T, _, trial in cases.sweep(run))
    assert [command[-1] for command in commands] == [
        f"--output=here/{name}" for name in ("decode", "enwik8", "long", "pg19", "attention")
    ]
    assert limits <= 100
    refused = script("--wheels", "/no/such/folder")
    assert (refused.returncode, "is not a folder" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_the_check_of_a_gpu_can_be_rehearsed(tmp_path):
    """Every program that it starts on a GPU runs here with small sizes; a killed run resumes bitwise."""
    command = [str(ROOT / "launch" / "check_gpu.sh"), "--tiny", "--output", str(tmp_path)]
    command += ["--python", sys.executable]
    done = subprocess.run(command, env=environment(**SHORT_RUN), capture_output=True, text=True, check=False)
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0, summary + done.stderr
    assert "the killed run is bitwise the unbroken one: True" in summary
    names = (
        "unbroken",
        "killed",
        "on_device",
        "memory",
        "resumed",
        "profile_enwik8",
        "profile_pg19",
        "speed",
    )
    assert [f"{name}: exit code 0" in summary for name in names] == [True] * len(names)
