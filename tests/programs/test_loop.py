"""What a run does between its updates, and what a stop leaves out."""

import contextlib
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tvq import cluster, schema
from tvq.errors import InputError
from tvq.programs import loop
from tvq.programs.loop import Run, Task

# Two updates a batch.
CONFIG = schema.Config(
    train=schema.Train(steps=20, sequence_len=64, update_len=32, global_batch_size=8),
    log=schema.Log(every=4),
)


def run_with(stops: list[bool], done: tuple[str, ...] = ()) -> Run:
    """A run of no model; `stops` are the answers to whether a stop was requested, then no."""
    fields: dict[str, Any] = {f.name: None for f in dataclasses.fields(Run)} | {
        "config": CONFIG,
        "processes": SimpleNamespace(
            stop_requested=lambda: bool(stops) and stops.pop(0), gather=lambda name, mine: [mine]
        ),
        "watchdog": SimpleNamespace(beat=lambda *_: None),
        "clock": SimpleNamespace(start=lambda step: None, spending=lambda kind: contextlib.nullcontext()),
        "checkpoints": SimpleNamespace(wait=lambda: None),
        "snapshots": SimpleNamespace(take=lambda *_: {}),
        "records": SimpleNamespace(done=set(done)),
        "unread": [],
    }
    return Run(**fields)


@pytest.fixture
def happens(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a run does from a step on: the tasks by name and step, and its exit code."""
    for name in ("next_batch", "read_metrics", "finish"):
        monkeypatch.setattr(loop, name, lambda *_, **__: None)
    monkeypatch.setattr(loop, "training_batches", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(loop.sharding, "local_rows", lambda *_: slice(0, 8))

    def from_step(step: int, stops: list[bool], done: tuple[str, ...] = ()) -> list[str]:
        run, told = run_with(stops, done), []

        def tell(name: str, is_long: bool = False) -> Callable[[Any, int], None]:
            def do(now: Any, step: int) -> None:
                if is_long:
                    loop.check_stop(run)
                told.append(f"{name} {step}")

            return do

        tasks = [
            Task("train", 4, tell("row"), at_stop="if due"),
            Task("validation", 8, tell("score", is_long=True)),
            Task("recall", 16, tell("recall")),
            Task("nothing", 0, tell("nothing")),
            Task("checkpoint", 8, tell("save"), at_stop="always"),
        ]
        state: Any = SimpleNamespace(weights=None)
        update = lambda now, batch: (now, {"probe": None})
        missed = loop.missed(run, tasks, step)
        code = loop.run_to_end(run, tasks, state, step, update, None, missed)  # type: ignore[arg-type]
        return [*told, f"exit {code}"]

    return from_step


def test_tasks_in_their_order(happens: Callable[..., list[str]]) -> None:
    assert happens(0, []) == [
        *("row 4", "row 8", "score 8", "save 8", "row 12", "row 16", "score 16", "recall 16", "save 16"),
        *("row 20", "score 20", "recall 20", "save 20", "exit 0"),
    ]


@pytest.mark.parametrize(
    ("start", "stops", "told"),
    [
        pytest.param(0, [True], ["save 2"], id="no row is due"),
        pytest.param(2, [True], ["row 4", "save 4"], id="a row is due"),
        pytest.param(6, [True], ["row 8", "save 8"], id="all is due"),
        pytest.param(6, [False, True], ["row 8", "save 8"], id="while evaluating"),
        pytest.param(18, [False, True], ["row 20", "save 20"], id="while evaluating at the end"),
    ],
)
def test_a_stop(happens: Callable[..., list[str]], start: int, stops: list[bool], told: list[str]) -> None:
    """The row of the step is written if it is due, and the state is saved."""
    assert happens(start, stops, ("validation", "recall")) == [*told, f"exit {cluster.EXIT_STOPPED}"]


def test_what_a_stop_left_out_comes_first(happens: Callable[..., list[str]]) -> None:
    assert happens(16, [], ("validation",))[:3] == ["recall 16", "row 20", "score 20"]
    assert happens(20, [], ("recall",)) == ["score 20", "exit 0"]
    assert happens(20, [True]) == [f"exit {cluster.EXIT_STOPPED}"], "it is saved, and left out again"


def test_without_evaluations_the_split_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def scorer(*_: Any) -> None:
        raise InputError("the validation split is empty")

    monkeypatch.setattr(loop.evaluate, "scorer", scorer)
    monkeypatch.setattr(loop.sample, "sampler", lambda *_: None)
    without = dataclasses.replace(CONFIG, evaluate=schema.Evaluate(every=0))
    run = dataclasses.replace(
        run_with([]), config=without, corpus=SimpleNamespace(vocabulary=None, image_size=0)
    )
    assert [task.name for task in loop.tasks(run) if task.every] == ["train", "samples", "checkpoint"]
