"""Made-up runs with faults: each has its finding, which names the place, the number and what to change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from tvq import cluster, schema
from tvq.programs import doctor
from tvq.run import describe, health

C = schema.Config(
    model=schema.Model(n_code=64),
    optimizer=schema.Optimizer(grad_clip=1.0, n_warmup_step=0),
    train=schema.Train(global_batch_size=8, sequence_len=1024, update_len=256),
)
N, H = 2, 2


def rows(**changes: Any) -> list[dict]:
    """A run of 30 rows that learns, with `name=function of the row's number`."""
    made = []
    for i in range(30):
        row = {"step": 100 * (i + 1), "split": "train", "loss": 3.0 * 0.97**i, "grad_norm": 0.7 + 0.02 * i}
        made.append(row | {name: change(i) for name, change in changes.items()})
    return made


def looked(**changes: float) -> dict[str, np.ndarray]:
    """Healthy codebooks, except for unit 2, head 1."""
    found = {
        "perplexity": np.full((N, H), 40.0), "dead": np.zeros((N, H)), "relative_error": np.full((N, H), 0.5),
        "churn": np.full((N, H), 0.05), "norm_drift": np.zeros((N, H)), "usage": np.ones((N, H, 64)),
    }  # fmt: skip
    for name, value in changes.items():
        found[name][1, 0] = value
    return found


def evaluated(loss: float) -> list[dict]:
    return [*rows(), {"step": 3000, "split": "validation", "loss": loss}]


def spent(kind: str) -> dict[str, Any]:
    return {"seconds_step": lambda i: 60.0, f"seconds_{kind}": lambda i: 40.0}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (rows(loss=lambda i: None if i == 7 else 3.0), ("not a number at step 800", "lower config.optim")),
        (rows(loss=lambda i: 3.0 + i), ("is 32 at step 3,000, worse than the 5.557 of", "lr_max 0.0004, in")),
        (
            rows(loss=lambda i: 3.0 * 0.97**i + 2.0 * (i == 20), grad_norm=lambda i: 0.3 + 2.0 * (i == 20)),
            ("in 1 of 30 rows: at step 2,100 it is 3.631, 1.844 above", "optimizer.grad_clip=0.45"),
        ),
        (rows(loss=lambda i: 3.0 * 0.97**i + 2.0 * (i in (20, 21))), ("in 2 of 30 rows: at step", "lower")),
        (rows(loss=lambda i: 3.0), ("flat over steps 100 to 3,000: 3.000", "raise config.optimizer.lr_max")),
        (rows(loss=lambda i: 3.0 + 0.01 * i), ("rises", "lower config.optimizer.lr_max")),
        (rows(grad_norm=lambda i: 5.0 + i % 2), ("its norm is 5.5, the limit 1", "grad_clip=11")),
        (evaluated(4.0), ("the validation loss is 4.000 at step 3,000", "more data")),
        (rows(**spent("data")), ("40 % of the time went into data", "config.data.workers")),
        (rows(**spent("save")), ("into save", "config.checkpoint.every")),
    ],
)  # fmt: skip
def test_rows_of_a_sick_run(made, words):
    (finding,) = doctor.of_rows(C, made)
    assert words[0] in finding.what
    assert words[1] in finding.remedy


def test_a_run_that_diverged_is_told_nothing_else():
    (finding,) = doctor.all_findings(C, rows(loss=lambda i: 99.0), looked(dead=0.5))
    assert "worse than the" in finding.what
    assert len(doctor.all_findings(C, rows(loss=lambda i: 3.0), looked(dead=0.5))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dead": 0.5}, ("50 % of 64 codes are dead in unit 2, head 1", "set config.model.revive_codes=20")),
        ({"relative_error": 0.95}, ("0.95 of their norm", "raise config.model.n_code 64")),
        ({"churn": 0.5}, ("50 % of the keys have another code", "raise config.model.c_gamma 0.99")),
        ({"norm_drift": -0.5}, ("changed by 50 %", "lower config.optimizer.lr_max")),
        ({"norm_drift": np.nan}, ("changed by nan % since the last snapshot in unit 2, head 1", "diverge")),
    ],
)  # fmt: skip
def test_codebooks_of_a_sick_run(changes, words):
    (finding,) = doctor.of_codebooks(C, looked(**changes))
    assert words[0] in finding.what
    assert words[1] in finding.remedy


def test_keys_that_crowd_into_a_few_codes():
    found = looked(perplexity=2.0)
    found["usage"][1, 0] = [40.0, *[24.0 / 63] * 63]
    (finding,) = doctor.of_codebooks(C, found)
    assert finding.what == (
        "62 % of the keys choose codes used over 10 times an even share in unit 2, head 1"
    )


def test_where_many_are_sick_the_worst_are_named():
    found = looked()
    found["dead"] = np.asarray([[0.2, 0.9], [0.4, 0.3]])
    (finding,) = doctor.of_codebooks(C, found)
    assert finding.what == (
        "90 % of 64 codes are dead in unit 1, head 2; 40 % in unit 2, head 1; 30 % in unit 2, head 2;"
        " too much in 1 more"
    )


def test_what_is_healthy_has_no_finding():
    assert not [*doctor.of_rows(C, evaluated(1.3)), *doctor.of_codebooks(C, looked())]
    assert not list(doctor.of_rows(C, []))
    # Warm-up is not a trend, without clipping nothing is clipped, and shares of a short time say little.
    still = dataclasses.replace(C, optimizer=schema.Optimizer())
    assert not list(doctor.of_rows(still, rows(loss=lambda i: 3.0)))
    free = dataclasses.replace(C, optimizer=schema.Optimizer(grad_clip=0.0, n_warmup_step=0))
    assert not list(doctor.of_rows(free, rows(grad_norm=lambda i: 9.0)))
    assert not list(doctor.of_rows(C, rows(seconds_step=lambda i: 9.0, seconds_data=lambda i: 40.0)))


def test_one_hard_batch_is_no_spike():
    """Its loss is far above the others, its gradient is not, and the next rows are as before."""
    assert not list(doctor.of_rows(C, rows(loss=lambda i: 3.0 * 0.97**i + 2.0 * (i == 20))))
    assert not list(doctor.of_rows(C, rows(loss=lambda i: 3.0 * 0.97**i + 2.0 * (i == 29))))


def test_a_limit_that_is_set_is_not_advised():
    spiking = rows(loss=lambda i: 3.0 * 0.97**i + 2.0 * (i == 20), grad_norm=lambda i: 0.7 + 2.0 * (i == 20))
    (finding,) = doctor.of_rows(C, spiking)
    assert finding.remedy == "lower config.optimizer.lr_max 0.0004, or raise config.optimizer.n_warmup_step 0"


def test_revival_that_is_on_is_advised_to_be_sooner():
    revived = dataclasses.replace(C, model=dataclasses.replace(C.model, revive_codes=30))
    (finding,) = doctor.of_codebooks(revived, looked(dead=0.5))
    assert finding.remedy == "in a new run, set config.model.revive_codes=15"


def test_fewer_codes_are_advised_where_they_are_enough():
    found = looked(dead=0.5) | {"perplexity": np.full((N, H), 8.0)}
    (finding,) = doctor.of_codebooks(C, found)
    assert finding.remedy == "in a new run, set config.model.revive_codes=20, or config.model.n_code=16"


def examined(workdir: Path) -> int:
    place = cluster.Place(how="a test")
    return doctor.doctor(C, epath.Path(workdir), place, cluster.Log(workdir / "logs", place))


def test_broken_pieces_are_named_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [json.dumps(row) for row in rows()]
    later = [
        '{"step": 3100, "split": "train", "loss": 1.0}',
        '{"step": 3200, "split": "validation", "loss": null}',
        '{"step": 3300, "spl',
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([*made[:9], "\0" * 9, made[9][:30], *made[10:], *later])
    )
    (tmp_path / health.FOLDER).mkdir()
    for step, content in (
        (100, looked()),
        (200, looked()),
        (300, looked()),
        (400, {"usage": looked()["usage"]}),
    ):
        health.save(epath.Path(tmp_path) / health.FOLDER, step, content)
    newest = tmp_path / health.FOLDER / "step_300.npz"
    newest.write_bytes(newest.read_bytes()[:300])
    assert examined(tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(": rows to step 3,200, codebooks of step 200")
    for line, name in zip(
        said[1:5], ("line 10 of", "line 11 of", "step_400.npz", "step_300.npz"), strict=True
    ):
        assert line.startswith("left out: ")
        assert name in line
    assert said[5:] == ["nothing is wrong that can be seen from here"]


def test_without_codebooks_the_rows_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(loss=lambda i: 99.0)))
    assert examined(tmp_path) == doctor.FOUND
    assert "rows to step 3,000, no codebooks\nleft out: --workdir=" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text("\0\n")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        examined(tmp_path)


def test_a_failure_of_its_own_is_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "all_findings", lambda *a: 1 / 0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows()[0]) + "\n")
    with pytest.raises(SystemExit) as ended:
        examined(tmp_path)
    assert ended.value.code == doctor.FAILED
    assert doctor.FAILED not in (0, doctor.FOUND, cluster.EXIT_INPUT)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("perplexity", [np.nan, 0.0, np.inf, 1e30])
def test_codes_are_not_counted_by_what_is_no_number(perplexity):
    found = looked(dead=0.5) | {"perplexity": np.full((N, H), perplexity)}
    (finding,) = doctor.of_codebooks(C, found)
    assert finding.remedy == "in a new run, set config.model.revive_codes=20"


@pytest.mark.parametrize(
    ("optimizer", "steps", "words"),
    [
        ({"n_warmup_step": 50, "n_max_step": 560}, 560, None),
        ({"n_warmup_step": 50, "n_max_step": 500}, 560, None),
        ({"n_warmup_step": 50, "n_max_step": 100_000}, 560, None),
        (
            {"n_warmup_step": 50, "n_max_step": 100},
            1000,
            ("it ends at update 100 of 1,000: for 90 % of the run", "n_max_step=1000"),
        ),
        (
            {"n_warmup_step": 50, "n_max_step": 100, "schedule": "inv_sqrt"},
            1000,
            None,
        ),
        *(
            ({"n_warmup_step": 50, "n_max_step": 100, "schedule": name}, 1000, words)
            for name, words in {
                "constant": None,
                "linear": ("is 0.1 of",),
                "wsd": ("it ends at update 100 of 1,000",),
            }.items()
        ),
        ({"n_warmup_step": 50, "n_max_step": 990, "floor": 0.0}, 1000, ("for 1 % of", "nothing is learnt")),
        ({"n_warmup_step": 50, "n_max_step": 1000, "floor": 0.0}, 1000, None),
        ({"n_warmup_step": 400, "schedule": "constant"}, 400, ("is not over at the end of the run",)),
        ({"n_warmup_step": 1000}, 400, ("is not over at the end of the run, at 400", "comes to 0.4 of")),
    ],
)
def test_a_schedule_that_does_not_suit_the_run(optimizer, steps, words):
    c = dataclasses.replace(
        C,
        optimizer=dataclasses.replace(C.optimizer, **optimizer),
        train=dataclasses.replace(C.train, steps=steps),
    )
    found = [finding for finding in doctor.of_rows(c, rows()) if "schedule" in finding.what]
    assert describe.of_schedule(c) == [
        (finding.what.removeprefix("the schedule: "), finding.remedy) for finding in found
    ]
    assert len(found) == (words is not None)
    for word in words or ():
        assert word in found[0].what + found[0].remedy
