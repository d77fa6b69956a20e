"""A run that stands still ends within its deadline, and the log names who held it up."""

import re
import signal
from pathlib import Path

import pytest

from tests.fakes.pod import Pod
from tvq import cluster
from tvq.cluster.watchdog import Sign, blame

HOSTS = ("a", "b", "c")


def fault(kind: str, step: int) -> dict[int, dict[str, str]]:
    text = f'{{"process": 1, "kind": "{kind}", "step": {step}}}'
    return {i: {"TVQ_TEST_FAULT": text} for i in (0, 1)}


@pytest.mark.parametrize(
    ("signs", "line"),
    [
        ([("ready", 5, 9), ("data", 5, 9), ("ready", 5, 9)], "waiting for data on process 1 (b) (step 5)"),
        (
            [("step", 6, 9), ("step", 5, 9), ("step", 6, 9)],
            "waiting for process 1 (b), still at step 5 in 'step'",
        ),
        ([("step", 5, 9), ("step", 5, 9), ("save", 5, 9)], "waiting for process 2 (c), in 'save' of step 5"),
        ([("step", 5, 9)] * 3, "all processes are in 'step' of step 5"),
        ([("step", 5, 9)], "in 'step' of step 5"),
        ([("step", 5, 9), ("save", 5, 9)], "the processes are in different phases of step 5: save, step"),
        (
            [("ready", 5, 9), ("data", 5, 9, 40), ("ready", 5, 9)],
            "no sign of life from process 1 (b) for 40 s: dead, stopped or cut off",
        ),
    ],
)
def test_blame(signs: list[tuple], line: str) -> None:
    assert blame([Sign(*sign) for sign in signs], HOSTS, silence=30) == line


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_within_the_deadline(tmp_path: Path, victim: int) -> None:
    options = ("--steps=400", "--pause=0.05", "--config.cluster.silence_timeout=3")
    late = {2: ("--config.cluster.silence_timeout=4",)}  # must not be taken along by the first to go
    with Pod(tmp_path, 3, *options, own=late) as pod:
        pod.wait_for("state.json")
        pod.processes[victim].send_signal(signal.SIGSTOP)
        for i in {0, 1, 2} - {victim}:
            assert pod.processes[i].wait(timeout=20) == cluster.EXIT_STUCK
            if victim == 0:
                assert re.search("process 0, the coordinator, has not answered for [34] s", pod.said(i))
                assert "no sign of life" not in pod.said(i)
            else:
                assert re.search(rf"no sign of life from process {victim} \(.*\) for \d+ s", pod.said(i))
        pod.processes[victim].send_signal(signal.SIGCONT)
        assert pod.processes[victim].wait(timeout=30) != 0


def test_late_data_is_named_with_every_phase_and_stack(tmp_path: Path) -> None:
    options = ("--config.cluster.step_timeout=2", "--config.cluster.silence_timeout=30")
    with Pod(tmp_path, 2, *options, one=fault("data", 3)) as pod:
        assert pod.codes(timeout=30)[0] == cluster.EXIT_STUCK
    for i in (0, 1):
        log = (tmp_path / "logs" / f"process_{i}.log").read_text()
        assert re.search(r"waiting for data on process 1 \(.*\) \(step 3\)", log), log
        assert re.search(r"process 0 \(.*\): ready of step 3 for \d+ s", log)
    assert re.search(r'File ".*worker.py", line \d+ in misbehave', log)


def test_one_process_that_stands_still_ends(tmp_path: Path) -> None:
    stuck = {"TVQ_TEST_FAULT": '{"process": 0, "kind": "data", "step": 2}'}
    with Pod(tmp_path, 1, "--config.cluster.step_timeout=1", one={0: stuck}) as pod:
        assert pod.codes(timeout=30) == [cluster.EXIT_STUCK]
    assert re.search(r"no progress: in 'data' of step 2 for \d s", pod.said(0))


def test_a_first_step_may_take_longer_than_the_others(tmp_path: Path) -> None:
    options = (
        "--config.cluster.step_timeout=1",
        "--config.cluster.compile_timeout=60",
        "--pause=1.5",
        "--steps=1",
    )
    with Pod(tmp_path, 1, *options) as pod:
        assert pod.codes(timeout=30) == [0]
