"""Reports of made-up runs; the page as a browser shows it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tvq import config
from tvq.programs.report import FILE, report, runs
from tvq.programs.report import figures as drawings
from tvq.run import health, image_samples, metrics, records

pytest.importorskip("matplotlib", reason="only the extra plots has it")
STEPS = range(10, 210, 10)
N, H, S = 4, 2, 16


def write_run(workdir: Path, lr_max: float = 1e-3, *, snapshots: bool = True, samples: bool = True) -> None:
    workdir.mkdir()
    c = config.base()
    c.optimizer.lr_max = lr_max
    (workdir / config.FILE).write_text(c.to_json())
    draws = np.random.default_rng(0)
    spent = dict.fromkeys(metrics.KINDS, 0.0) | {"compile": 30.0, "start": 5.0}
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in STEPS:
            spent["step"] += 9.0
            bits = 2 + 6 / step**0.5
            pace = {"tokens_per_second": 5e3 + step, "data_wait": 0.02, "goodput": metrics.goodput(spent)}
            pace |= {f"seconds_{kind}": seconds for kind, seconds in spent.items()}
            row = {"step": step, "split": "train", "loss": bits * 0.69, "bits_per_byte": bits, **pace}
            file.write(json.dumps(row | {"learning_rate": lr_max / step, "grad_norm": 1 / step}) + "\n")
            if step % 50 == 0:
                evaluated = {"step": step, "split": "validation", "loss": bits, "bits_per_byte": bits + 0.1}
                file.write(json.dumps(evaluated) + "\n")
    for step in STEPS if snapshots else ():
        usage = draws.dirichlet(np.full(S, step / 50), (N, H)) * S
        by_head = {name: draws.random((N, H)) for name in ("perplexity", "dead", "relative_error", "churn")}
        health.save(epath.Path(workdir) / health.FOLDER, step, {"usage": usage, **by_head})
    (workdir / "evaluations").mkdir()
    table = [{"context_from": 1 << i >> 1, "context_to": (1 << i) - 1, "loss": 9 - i} for i in range(9)]
    for step in (1000, 100, 200, 2000) if snapshots else ():
        evaluated = {"step": step, "split": "test", "by_context": table[: step // 100] if step < 2000 else []}
        (workdir / "evaluations" / f"step_{step}_test.json").write_text(json.dumps(evaluated))
    (workdir / "evaluations" / "step_100_recall.json").write_text('{"step": 100, "answers": []}')
    for step in (100, 1000, 200) if samples else ():
        drawn = records.SampleWriter(epath.Path(workdir) / records.SAMPLES, 2000)
        picture = image_samples.png(np.full((8, 8, 3), step // 4, np.uint8))
        drawn.show(step, picture if step == 200 else f"import <b>{step}</b>\n")


def test_a_report_of_two_runs_stands_on_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", 2e-3, snapshots=False, samples=False)
    output = tmp_path / "out"
    assert report([str(tmp_path / "one"), str(tmp_path / "two")], str(output)) == 0
    assert capsys.readouterr().out == f"{output / FILE}: 2 runs, 8 pictures\n"
    page = (output / FILE).read_text()
    together = {"loss", "speed", "time", "optimizer", "lengths"}
    assert {path.stem for path in output.glob("*.png")} == together | {
        "perplexity_1", "codes_1", "health_1",
    }  # fmt: skip
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert sources == ["data:image/png;base64,"] * 9, "nothing is fetched from elsewhere"
    table = page.partition('<table class="samples">')[2].partition("</table>")[0]
    drawn = [
        "<pre>import &lt;b&gt;100&lt;/b&gt;\n</pre>",
        "<img ",
        "<pre>import &lt;b&gt;1000&lt;/b&gt;\n</pre>",
    ]
    found = re.findall(r"<tr><td>([\d,]+)</td><td>(<pre>[^/]*/b&gt;\n</pre>|<img )", table)
    assert found == list(zip(("100", "200", "1,000"), drawn, strict=True))
    one, _ = runs.read([str(tmp_path / "one"), str(tmp_path / "two")])
    assert one.splits() == ["validation"], "only what was evaluated"
    assert len(one.contexts["test"]) == 9, "the newest, of step 1000"
    differing = page.partition("Where the runs differ")[2].partition("</table>")[0]
    assert re.findall(r"<td>([\w.]+)</td>", differing)[:1] == ["optimizer.lr_max"]
    assert "<td>0.001</td><td>0.002</td>" in differing
    assert "<td>84 %</td><td>3:35 min</td>" in page, "goodput and wall time"


def test_a_report_of_little(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    write_run(workdir, snapshots=False, samples=False)
    half = '{"step": 10, "split": "train", "loss": 2.0, "bits_per_token": 3.0}\n{"step": 20, "spl'
    (workdir / "metrics.jsonl").write_text(half)
    assert report([str(workdir), str(workdir)], "") == 0
    assert [path.name for path in (workdir / "report").glob("*.png")] == ["loss.png"]
    page = (workdir / "report" / FILE).read_text()
    assert "What is not at its default" in page
    (ax,) = drawings.loss(runs.read([str(workdir)])).axes
    assert ax.lines[0].get_marker() == "o", "one row is a dot: a line would not be seen"


def test_a_run_that_diverged_does_not_press_the_others_together(tmp_path: Path) -> None:
    for name, factor in (("good", 1.0), ("bad", 1e6)):
        write_run(tmp_path / name, factor, snapshots=False, samples=False)
    path = tmp_path / "bad/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"bits_per_byte": 1e3 * row["step"] ** 2}) + "\n" for row in rows)
    )
    both = runs.read([str(tmp_path / "good"), str(tmp_path / "bad")])
    (ax,) = drawings.loss(both).axes
    assert (ax.get_yscale(), ax.get_ylim()[1] < 5) == ("linear", True)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["good, training", "good, validation", "bad, training: diverged, far above"]
    (alone,) = drawings.loss(both[1:]).axes
    assert (alone.get_yscale(), alone.get_ylim()[1] > 1e5) == ("log", True)
    assert drawings.optimizer(both).axes[0].get_yscale() == "log", "or one learning rate would seem to be 0"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_run(workdir: Path) -> int:
    """Damages pieces of every kind; returns how many."""
    rows = workdir / "metrics.jsonl"
    lines = rows.read_bytes().split(b"\n")
    damaged = [
        b"\0" * 40, lines[0][:20], b"[1, 2]", b"7", b"\xff", b"[" * 100_000, b'{"step": 10}', b"{}",
        b'{"step": "10", "split": "train", "loss": 1.0}', b'{"step": 10, "split": 3, "loss": 1.0}',
        b'{"step": -1, "split": "train", "loss": 1.0}', b'{"step": 1e999, "split": "train", "loss": 1.0}',
        b'{"step": 10, "split": "train", "loss": "low"}',
    ]  # fmt: skip
    strange = b'{"step": 205, "split": "train", "loss": NaN, "bits_per_byte": "x", "seconds_step": "y"}'
    huge = b'{"step": 206, "split": "validation", "loss": 1' + b"0" * 400 + b', "grad_norm": [1], "a": true}'
    # A run that resumed after a power cut.
    rows.write_bytes(b"\n".join([*lines[:5], *damaged, *lines[5:-1], strange, huge, b"", b"\0" * 9]))
    snapshots = [workdir / health.FOLDER / f"step_{step}.npz" for step in STEPS]
    cut(snapshots[-1])
    snapshots[1].write_bytes(b"")
    snapshots[2].write_bytes(b"\0" * 999)
    np.savez(snapshots[3], usage=np.ones((N, H, S)), perplexity=np.ones((N, H)))
    np.savez(snapshots[4], **{name: np.ones(3) for name in ("usage", *runs.SNAPSHOT)})
    np.savez(snapshots[5], usage=np.array([{}]))
    np.savez(snapshots[6], usage=np.ones((9, H, S)), **{name: np.ones((9, H)) for name in runs.SNAPSHOT})
    snapshots[7].unlink()
    snapshots[7].mkdir()
    found = {
        "cut": '{"step": 3000, "split": "te', "list": "[]", "empty": "", "other": '{"step": "x"}',
        "split": '{"step": 1, "split": [], "by_context": [{"context_from": 0, "context_to": 1, "loss": 2}]}',
        "table": '{"step": 1, "split": "test", "by_context": [{"context_from": 0}]}',
        "rows": '{"step": 1, "split": "test", "by_context": [1, 2]}',
    }  # fmt: skip
    for name, text in found.items():
        (workdir / "evaluations" / f"{name}.json").write_text(text)
    (workdir / "evaluations" / "bytes.json").write_bytes(b"\xff\xfe")
    drawn = workdir / records.SAMPLES
    (drawn / "step_100.txt").write_bytes(b"caf\xe9")
    cut(drawn / "step_200.png")
    (drawn / "step_300.txt").mkdir()
    (workdir / config.FILE).write_text('{"model": {"n_lay')
    return len(damaged) + 1 + len(snapshots[1:8]) + 1 + len(found) + 1 + 3 + 1


def test_broken_pieces_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "run"
    write_run(workdir)
    n_broken = broken_run(workdir)
    assert report([str(workdir)], "") == 0
    *left_out, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("left out: ") for line in left_out)
    assert len(left_out) == n_broken, left_out
    for name in ("line 6 of ", "step_20.npz", "cut.json", "step_100.txt", "step_200.png", config.FILE):
        assert any(name in line for line in left_out), name
    page = (workdir / "report" / FILE).read_text()
    assert page.count("<td>run</td>") == 1 + n_broken
    (run,) = runs.read([str(workdir)])
    assert len(run.column("bits_per_byte")[0]) == len(STEPS)
    assert run.splits() == ["validation"]
    assert list(run.snapshots) == [10, *range(90, 200, 10)]
    assert list(run.samples) == [1000]
    assert last.endswith("1 run, 8 pictures")


@pytest.mark.parametrize(
    "content", [b"\0" * 50, b"\0\n" * 5, b'[{"step": 1}]\n'], ids=["zeros", "lines of zeros", "a list"]
)
def test_a_run_whose_rows_are_all_broken(tmp_path: Path, content: bytes) -> None:
    write_run(tmp_path / "run", snapshots=False, samples=False)
    (tmp_path / "run/metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"has no row yet: line 1 of .* is not a row of metrics"):
        report([str(tmp_path / "run")], "")


def test_a_run_that_spent_no_time(tmp_path: Path) -> None:
    write_run(tmp_path / "run", snapshots=False, samples=False)
    row = {"step": 1, "split": "train", "loss": 1.0, "seconds_step": 0.0, "seconds_data": None}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert report([str(tmp_path / "run")], "") == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no run: there is no "),
        ({config.FILE: "{}"}, "has no metrics.jsonl yet; let it train a while"),
        ({config.FILE: "{}", "metrics.jsonl": '{"st'}, "has no row yet; let it train a while"),
    ],
)
def test_what_is_no_run(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        report([str(tmp_path)], "")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", snapshots=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output=.*: cannot write there"):
        report([str(tmp_path / "run")], str(tmp_path / "file"))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tvq\[plots\]'"):
        report(["anything"], "")


def test_many_snapshots_are_thinned_out_evenly() -> None:
    assert runs.evenly([1, 2, 3], 5) == [1, 2, 3]
    assert runs.evenly([], 5) == []
    thinned = runs.evenly(list(range(1000)), 5)
    assert thinned == [0, 250, 500, 749, 999]


@pytest.mark.slow
def test_a_browser_shows_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed here")
    write_run(tmp_path / "run")
    report([str(tmp_path / "run")], "")
    picture = tmp_path / "page.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [
        f"--screenshot={picture}",
        "--window-size=1000,6000",
        (tmp_path / "run/report" / FILE).as_uri(),
    ]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    shown = pytest.importorskip("matplotlib.image").imread(picture)[..., :3]
    assert shown.shape[:2] == (6000, 1000)
    is_inked = (shown < 0.9).any(-1)
    assert is_inked.mean() > 0.05, "the pictures are not there"
    assert is_inked[:80].any(), "the heading is not there"
    assert not is_inked[:, :8].any(), "it is wider than the window"
