"""Reports of runs that are made up; the page as a browser shows it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from tvq import config, health, image_samples, metrics, records
from tvq.report import FILE, report, runs
from tvq.report import figures as drawings

pytest.importorskip("matplotlib", reason="only the extra plots has it")
STEPS = range(10, 210, 10)
N, H, S = 4, 2, 16


def write_run(workdir: Path, lr_max: float = 1e-3, *, looks: bool = True, samples: bool = True) -> None:
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
    for step in STEPS if looks else ():
        usage = draws.dirichlet(np.full(S, step / 50), (N, H)) * S
        by_head = {name: draws.random((N, H)) for name in ("perplexity", "dead", "relative_error", "churn")}
        health.save(epath.Path(workdir) / health.FOLDER, step, {"usage": usage, **by_head})
    (workdir / "evaluations").mkdir()
    table = [{"context_from": 1 << i >> 1, "context_to": (1 << i) - 1, "loss": 9 - i} for i in range(9)]
    for step in (1000, 100, 200, 2000) if looks else ():
        evaluated = {"step": step, "split": "test", "by_context": table[: step // 100] if step < 2000 else []}
        (workdir / "evaluations" / f"step_{step}_test.json").write_text(json.dumps(evaluated))
    (workdir / "evaluations" / "step_100_recall.json").write_text('{"step": 100, "answers": []}')
    for step in (100, 1000, 200) if samples else ():
        drawn = records.SampleWriter(epath.Path(workdir) / records.SAMPLES, 2000)
        picture = image_samples.png(np.full((8, 8, 3), step // 4, np.uint8))
        drawn.show(step, picture if step == 200 else f"import <b>{step}</b>\n")


def test_a_report_of_two_runs_stands_on_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", 2e-3, looks=False, samples=False)
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
    write_run(workdir, looks=False, samples=False)
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
        write_run(tmp_path / name, factor, looks=False, samples=False)
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
    write_run(tmp_path / "run", looks=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output=.*: cannot write there"):
        report([str(tmp_path / "run")], str(tmp_path / "file"))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tvq\[plots\]'"):
        report(["anything"], "")


def test_many_looks_are_thinned_out_evenly() -> None:
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
