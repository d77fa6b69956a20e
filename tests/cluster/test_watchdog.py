"""A run that stands still ends within its deadline, and the log names who held it up."""

import contextlib
import re
import signal
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.pod import ENDLESS, Pod
from tvq import cluster, schema
from tvq.cluster import watchdog
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


class Clock(types.SimpleNamespace):
    """Stands for the module time."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def run(self, seconds: float, watching: cluster.Watchdog) -> None:
        """Time passes while the watchdog looks at each tick."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + watching.tick)
            watching._look()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


@pytest.fixture
def watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[cluster.Watchdog, set]]]:
    """`watched(n_process, step_timeout=...)`: a watchdog of process 0, and what it fires for."""

    def make(n_process: int = 1, **timeouts: float) -> tuple[cluster.Watchdog, set]:
        place, fired = cluster.Place(how="as told", n_process=n_process), set()
        log = logs.enter_context(contextlib.closing(cluster.Log(tmp_path, place)))
        made = cluster.Watchdog(cluster.Processes(place, ("",), 1.0), schema.Cluster(**timeouts), log)
        monkeypatch.setattr(made, "_fire", lambda why, signs: fired.add(why))
        monkeypatch.setattr(made, "_threads", [])
        return made, fired

    with contextlib.ExitStack() as logs:
        yield make


def test_a_first_step_may_take_longer_than_the_others(clock: Clock, watched: Callable) -> None:
    watching, fired = watched(step_timeout=20.0, silence_timeout=60.0)
    with watching:
        watching.beat("step", 0, allow=100.0)
        clock.run(100, watching)
        assert fired == set()
        clock.run(1, watching)
        watching.beat("step", 1)
        clock.run(21, watching)
    assert fired == {
        "no progress: in 'step' of step 0 for 101 s", "no progress: in 'step' of step 1 for 21 s",
    }  # fmt: skip


def test_a_long_wait_for_the_others_to_start_is_no_standing_still(
    clock: Clock, watched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, fired = watched(2, silence_timeout=60.0)

    def wait(*_: object) -> None:
        clock.now += 200

    monkeypatch.setattr(watching.processes, "barrier", wait)
    with watching:
        watching._look()
        assert fired == set()
        clock.now += 61
        watching._look()
        assert "this process itself stood still for 61 s: stopped or starved" in fired


@pytest.mark.parametrize("pause", [25, 70, 100_000])
def test_a_pause_of_a_process_alone_is_no_standing_still(
    clock: Clock, watched: Callable, pause: float
) -> None:
    """SIGSTOP, or a laptop's sleep: it holds nobody up."""
    watching, fired = watched(step_timeout=20.0, silence_timeout=60.0)
    with watching:
        watching.beat("step", 1)
        clock.run(15, watching)
        clock.now += pause
        watching._look()
        assert fired == set()
        clock.run(6, watching)  # and now it really stands still
    assert {re.sub(r"\d+ s$", "21 s", why) for why in fired} == {"no progress: in 'step' of step 1 for 21 s"}


def test_who_is_lost_comes_before_the_error_that_this_led_to(clock: Clock, watched: Callable) -> None:
    watching, fired = watched(step_timeout=20.0)
    with pytest.raises(ConnectionError), watching:  # noqa: PT012
        watching.beat("step", 7)
        clock.run(19, watching)
        clock.now += 1.5
        raise ConnectionError("reset by peer")
    assert fired == {"no progress: in 'step' of step 7 for 20 s"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_within_the_deadline(tmp_path: Path, victim: int) -> None:
    options = (ENDLESS, "--pause=0.05", "--config.cluster.silence_timeout=6")
    late = {2: ("--config.cluster.silence_timeout=7",)}  # must not be taken along by the first to go
    with Pod(tmp_path, 3, *options, own=late) as pod:
        pod.wait_for("state.json")
        pod.processes[victim].send_signal(signal.SIGSTOP)
        for i in {0, 1, 2} - {victim}:
            # Long before jax, which waits twice as long and ten seconds more, would abort it.
            assert pod.processes[i].wait(timeout=250) == cluster.EXIT_STUCK, pod.said(i)
            if victim == 0:
                assert re.search("process 0, the coordinator, has not answered for [67] s", pod.said(i))
                assert "no sign of life" not in pod.said(i)
            else:
                assert re.search(rf"no sign of life from process {victim} \(.*\) for \d+ s", pod.said(i))
        pod.processes[victim].send_signal(signal.SIGCONT)
        assert pod.processes[victim].wait(timeout=250) != 0


def test_late_data_is_named_with_every_phase_and_stack(tmp_path: Path) -> None:
    options = ("--config.cluster.step_timeout=4", "--config.cluster.silence_timeout=30")
    with Pod(tmp_path, 2, *options, one=fault("data", 0)) as pod:
        assert pod.codes()[0] == cluster.EXIT_STUCK
    for i in (0, 1):
        log = (tmp_path / "logs" / f"process_{i}.log").read_text()
        assert re.search(r"waiting for data on process 1 \(.*\) \(step 0\)", log), log
        assert re.search(r"process 0 \(.*\): ready of step 0 for \d+ s", log)
    assert re.search(r'File ".*worker.py", line \d+ in misbehave', log)


def test_one_process_that_stands_still_ends(tmp_path: Path) -> None:
    stuck = {"TVQ_TEST_FAULT": '{"process": 0, "kind": "data", "step": 0}'}
    with Pod(tmp_path, 1, "--config.cluster.step_timeout=1", one={0: stuck}) as pod:
        assert pod.codes() == [cluster.EXIT_STUCK]
    assert re.search(r"no progress: in 'data' of step 0 for \d+ s", pod.said(0))
