"""Each result has a file of its own, whose name says which settings it belongs to."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from tvq import schema, sharding
from tvq.programs.report import runs
from tvq.run import results

C = schema.Config()
TABLE = {"context_from": 0, "context_to": 1, "n_token": 3}


def record(folder: Path, loss: float, model: dict | None = None, **chosen: Any) -> set[str]:
    """The files that are new after a result is recorded."""
    there = set(files(folder))
    c = dataclasses.replace(C, model=dataclasses.replace(C.model, **(model or {})))
    mesh = sharding.make(schema.Mesh(), jax.devices()[:1])
    found = {"step": 5, "split": "test", "loss": loss, "by_context": [TABLE | {"loss": loss}]}
    results.record(epath.Path(folder), c, "step_5_test", {"data": "x"} | chosen, found, mesh, print)
    return set(files(folder)) - there


def files(folder: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    paths = (folder / results.FOLDER).glob("*")
    return {path.name: json.loads(path.read_text(), parse_constant=refuse) for path in paths}


def test_each_result_is_kept(tmp_path: Path) -> None:
    (first,) = record(tmp_path, 1.5)
    assert first.startswith("step_5_test_")
    assert record(tmp_path, 1.5) == set(), "the same again"
    others = [
        record(tmp_path, 1.5, data="y"),
        record(tmp_path, 1.5, sequence_len=64),
        record(tmp_path, 1.5, {"attend_across_documents": True}),
        record(tmp_path, 1.25),  # of weights that were trained again
    ]
    with jax.default_matmul_precision("highest"):
        others.append(record(tmp_path, 1.5))
    assert [len(names) for names in others] == [1] * 5
    (again,) = others[3]
    assert again == first.replace(".json", "_2.json")
    assert [found["loss"] for found in files(tmp_path).values()].count(1.5) == 5


def test_a_torn_result_is_left(tmp_path: Path) -> None:
    (name,) = record(tmp_path, 1.5)
    path = tmp_path / results.FOLDER / name
    path.write_text('{"torn')
    mesh = sharding.make(schema.Mesh(), jax.devices()[:1])
    results.record(epath.Path(tmp_path), C, "step_5_test", {"data": "x"}, {"loss": 1.5}, mesh, print)
    assert path.read_text() == '{"torn'
    assert json.loads(path.with_name(name.replace(".json", "_2.json")).read_text())["loss"] == 1.5


def test_a_workdir_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / results.FOLDER).write_text("in the way")
    mesh = sharding.make(schema.Mesh(), jax.devices()[:1])
    results.record(epath.Path(tmp_path), C, "step_5_test", {}, {"loss": 1.5}, mesh, print)
    assert "evaluations cannot be written (File exists): the result is printed" in capsys.readouterr().out


def test_a_result_is_valid_json_whatever_the_loss(tmp_path: Path) -> None:
    (name,) = record(tmp_path, math.nan)
    found = files(tmp_path)[name]
    assert found["loss"] is found["by_context"][0]["loss"] is None
    assert record(tmp_path, math.nan) == set()


def test_a_report_reads_them_all(tmp_path: Path) -> None:
    for loss, data in ((1.5, "x"), (1.25, "y")):
        record(tmp_path, loss, data=data)
    contexts = runs._contexts(epath.Path(tmp_path) / results.FOLDER, [])
    assert sorted(table[0]["loss"] for table in contexts.values()) == [1.25, 1.5]


@pytest.mark.parametrize("name", ["step_5_test.json", "step_5_test_carried.json"])
def test_results_of_older_versions_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / results.FOLDER).mkdir()
    (tmp_path / results.FOLDER / name).write_text("{}")
    record(tmp_path, 1.5)
    assert files(tmp_path)[name] == {}
