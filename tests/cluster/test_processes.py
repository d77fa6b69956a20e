"""Real processes: they meet, agree, stop together; and every fault at the start has its message."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from tests.fakes.pod import ENDLESS, Pod, free_port
from tvq import cluster, config, schema
from tvq.cluster import meeting
from tvq.cluster.meeting import differences
from tvq.cluster.processes import Processes, clear_stale_lock
from tvq.cluster.processes import _check_devices as check_devices
from tvq.errors import InputError


def done(workdir: Path, process: int) -> dict:
    return json.loads((workdir / f"done_{process}.json").read_text())


@pytest.mark.parametrize(("n", "devices"), [(2, "2"), pytest.param(4, "1", marks=pytest.mark.slow)])
def test_processes_sum_what_one_process_sums(tmp_path: Path, n: int, devices: str) -> None:
    with Pod(tmp_path, n, one={i: {"JAX_NUM_CPU_DEVICES": devices} for i in range(n)}) as pod:
        assert pod.codes() == [0] * n
    results = [done(tmp_path, i) for i in range(n)]
    assert results == [{"step": 6, "sum": 4 * 2 * 15.0, "devices": 4, "processes": n}] * n
    assert f"process 1 of {n}, coordinator 127.0.0.1:{pod.port} (TVQ_COORDINATOR" in pod.said(1)
    assert (tmp_path / "logs" / "process_1.log").read_text().count("processes are here") == 1


def test_one_process_needs_no_meeting(tmp_path: Path) -> None:
    with Pod(tmp_path, 1) as pod:
        assert pod.codes() == [0]
    assert done(tmp_path, 0)["processes"] == 1


def roll_call(
    *processes: int, n: int = 2, port: int = 0, timeout: float = 60.0, **own: dict
) -> tuple[list[tuple[str, ...] | Exception], list[str]]:
    """What `meet` returns or raises for each process, in threads of this one, and what each was told.

    `own` has the place or the items of a process that differs: `p1={"n_process": 4}`.
    """
    port, told = port or free_port(), [""] * len(processes)

    def meet(i: int) -> tuple[str, ...] | Exception:
        place = {"process_id": processes[i], "n_process": n} | own.get(f"p{i}", {})
        items = place.pop("items", {"config.train.seed": 0})
        place = cluster.Place(how="told", coordinator=f"127.0.0.1:{port}", hosts=("",) * n, **place)

        def say(text: str) -> None:
            told[i] += f"{text}\n"

        try:
            return meeting.meet(place, items, timeout, say)
        except (cluster.ClusterError, InputError) as error:
            return error
        finally:
            for line in place.lines:
                os.close(line)

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(meet, range(len(processes)))), told


def test_a_missing_process_is_named_with_the_command_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tvq", "train"])
    monkeypatch.setattr(meeting, "LINGER", 0.2)
    port = free_port()
    for error in roll_call(0, 1, n=3, port=port, timeout=1)[0]:
        assert isinstance(error, cluster.ClusterError)
        assert "2 of 3 processes are here; missing: process 2" in str(error)
        start = f"TVQ_COORDINATOR=127.0.0.1:{port} TVQ_N_PROCESS=3 TVQ_PROCESS_ID=2 tvq train"
        assert start in str(error)


def test_an_unreachable_coordinator_is_named() -> None:
    ([error], _) = roll_call(1, timeout=0.5)
    assert isinstance(error, cluster.ClusterError)
    assert re.search(r"process 1 on .* could not reach process 0 at 127.0.0.1.*refused", str(error))
    assert "TVQ_PROCESS_ID=0" in str(error)


def test_a_process_that_comes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "NEWS_EVERY", 0.1)
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        first = threads.submit(roll_call, 0, 1, n=3, port=port)
        time.sleep(1)
        second = threads.submit(roll_call, 2, n=3, port=port)
        hosts, told = first.result()
        assert hosts + second.result()[0] == [(socket.gethostname(),) * 3] * 3
    for text in told:
        assert "2 of 3 processes are here; missing: process 2" in text


def test_who_came_in_time_is_heard_though_process_0_was_held_up() -> None:
    place = cluster.Place(how="told", n_process=2, coordinator="a:1", hosts=("", ""))
    about = [{"process": i, "n_process": 2, "host": f"host{i}", "pid": i, "items": {}} for i in (0, 1)]
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as caller,
    ):
        caller.sendall(json.dumps(about[1]).encode() + b"\n")
        call = meeting._Rendezvous(listener, place, about[0], time.monotonic() - 1, print)
        assert call.run() == {"hosts": ["host0", "host1"]}
    [line] = place.lines
    os.close(line)


def test_process_0_waits_for_the_end_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, theirs = socket.socketpair()
    stuck, other = socket.socketpair()
    with gone, stuck, other:
        place = cluster.Place(how="told", lines=[gone.fileno()])
        monkeypatch.setattr(meeting, "END_PATIENCE", 1000.0)
        threading.Timer(0.1, theirs.close).start()
        meeting.wait_for_others(place)
        assert theirs.fileno() == -1
        place.lines.append(stuck.fileno())
        monkeypatch.setattr(meeting, "END_PATIENCE", 0.1)
        meeting.wait_for_others(place)


def test_two_processes_of_one_number() -> None:
    errors, _ = roll_call(0, 1, 1, n=3)
    for error in errors:
        assert isinstance(error, InputError)
        assert re.search(r"two processes claim to be number 1: \S+ pid \d+ and \S+ pid \d+", str(error))


def test_two_counts_of_processes() -> None:
    for error in roll_call(0, 1, p1={"n_process": 4})[0]:
        assert isinstance(error, InputError)
        assert "was started as one of 4, but process 0 as one of 2" in str(error)


def test_another_version_commit_or_config_stops_all(tmp_path: Path) -> None:
    items = ("jax version", "tvq commit", "tvq code", "config.train.seed")
    other = {"TVQ_TEST_ITEMS": json.dumps(dict.fromkeys(items, "other")), "JAX_THREEFRY_PARTITIONABLE": "0"}
    with Pod(tmp_path, 2, one={1: other}) as pod:
        assert pod.codes() == [2, 2]
    for i in (0, 1):
        assert "differ:\n" in pod.said(i)
        for item in items:
            assert re.search(rf'{item}: .*"other" on process 1', pod.said(i))
        name = r"JAX_THREEFRY_PARTITIONABLE \(set it to the same on all processes\)"
        assert re.search(rf'{name}: "true" on process 0 .*; "false" on process 1', pod.said(i))


def test_items_that_differ_are_named_to_all() -> None:
    for error in roll_call(0, 1, 2, n=3, p0={"items": {}}, p1={"items": {"a": 1}}, p2={"items": {"a": 1}})[0]:
        assert isinstance(error, InputError)
        assert str(error) == (
            "the processes of this run differ:\n"
            f'  a: "absent" on process 0 ({socket.gethostname()});'
            f" 1 on processes 1 ({socket.gethostname()}), 2 ({socket.gethostname()})"
        )


def test_what_differs_only_after_the_start_stops_all(tmp_path: Path) -> None:
    with Pod(tmp_path, 2, one={1: {"TVQ_TEST_LATE": '{"data fingerprint": "b"}'}}) as pod:
        assert pod.codes() == [2, 2]
    for i in (0, 1):
        assert re.search(r'data fingerprint: "absent" on process 0 \(.*\); "b" on process 1', pod.said(i))


@pytest.mark.parametrize("granted", [0, 2])
def test_a_process_that_sees_too_few_devices(monkeypatch: pytest.MonkeyPatch, granted: int) -> None:
    seen = Processes(cluster.Place(how="told", n_process=2), ("a", "b"), 1.0)
    other = ["found 1 cpu devices of 2" if granted else "", "1 cpu"]
    monkeypatch.setattr(seen, "gather", lambda _, mine: [mine, other])
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    wanted = r"process 1 \(b\) found 1 cpu devices of 2" if granted else r'"1 cpu" on process 1'
    with pytest.raises(InputError, match=wanted):
        check_devices(seen, granted)
    monkeypatch.setattr(seen, "gather", lambda _, mine: [mine, mine])
    check_devices(seen, granted)
    with pytest.raises(InputError, match="found 2 cpu devices of 4"):
        check_devices(seen, 4)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_taken_port_is_named(offset: int) -> None:
    port = free_port()
    with socket.create_server(("", port + offset)):
        ([error], told) = roll_call(0, port=port, timeout=0.1)
    assert isinstance(error, cluster.ClusterError)
    assert f"cannot listen on port {port + offset} of" in str(error)
    assert f"port {port + offset} is taken" in told[0]


@pytest.mark.slow
def test_sigterm_on_one_process_stops_all_at_one_step_and_the_run_goes_on(tmp_path: Path) -> None:
    options = ("--every=5", "--pause=0.05")
    with Pod(tmp_path, 2, *options, ENDLESS) as pod:
        pod.wait_for("state.json")
        pod.processes[1].send_signal(signal.SIGTERM)
        assert pod.codes() == [cluster.EXIT_STOPPED] * 2
    [step], [other] = (re.findall(r"stopped and saved at step (\d+)", pod.said(i)) for i in (0, 1))
    assert step == other
    n = int(step) + 7
    with Pod(tmp_path, 2, *options, f"--steps={n}") as pod:
        assert pod.codes() == [0, 0]
    assert done(tmp_path, 1)["sum"] == 4 * 2 * sum(range(n))


@pytest.mark.parametrize(
    ("n", "number"),
    [
        (1, signal.SIGTERM),
        (1, signal.SIGINT),
        (2, signal.SIGINT),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_process_0_saves_and_stops(tmp_path: Path, n: int, number: signal.Signals) -> None:
    with Pod(tmp_path, n, ENDLESS, "--pause=0.05") as pod:
        pod.wait_for("state.json")
        pod.processes[0].send_signal(number)
        assert pod.codes() == [cluster.EXIT_STOPPED] * n


@pytest.mark.slow
def test_a_signal_before_the_first_step_of_a_resumed_run_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"step": 50, "sum": 0.0}')
    wait = {"TVQ_TEST_FAULT": '{"kind": "wait", "step": 50}'}
    with Pod(tmp_path, 2, ENDLESS, "--pause=1", one={1: wait}) as pod:
        for i, process in pod.processes.items():
            pod.wait_for_line(i, "processes are here")
            process.send_signal(signal.SIGTERM)
        time.sleep(2)  # jax looks for a signal once a second; later is no failure, but another case
        (tmp_path / "go").touch()
        assert pod.codes() == [cluster.EXIT_STOPPED] * 2


@pytest.mark.slow
def test_an_exception_on_one_process_ends_all_at_once(tmp_path: Path) -> None:
    fault = {"TVQ_TEST_FAULT": '{"process": 1, "kind": "raise", "step": 2}'}
    with Pod(tmp_path, 2, "--config.cluster.silence_timeout=6", one={0: fault, 1: fault}) as pod:
        codes = pod.codes()
    assert codes[1] == cluster.EXIT_FAILED
    assert codes[0] in (cluster.EXIT_FAILED, cluster.EXIT_STUCK), "jax has ended it, after 22 s"
    assert "RuntimeError: a bug on one host" in (tmp_path / "logs" / "process_1.log").read_text()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others(tmp_path: Path, victim: int) -> None:
    with Pod(tmp_path, 2, ENDLESS, "--config.cluster.silence_timeout=6", "--pause=0.05") as pod:
        pod.wait_for("state.json")
        pod.processes[victim].kill()
        codes = pod.codes()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, cluster.EXIT_INPUT, cluster.EXIT_STOPPED)


def test_a_barrier_names_the_absent(tmp_path: Path) -> None:
    fault = {"TVQ_TEST_FAULT": '{"process": 1, "kind": "save", "step": 1}'}
    with Pod(tmp_path, 2, "--barrier=1", one={0: fault, 1: fault}) as pod:
        pod.wait_for_line(0, "barrier 'save'")
        pod.processes[1].kill()  # or process 0 would wait for its last words
        assert pod.codes() == [cluster.EXIT_FAILED, -signal.SIGKILL]
    assert re.search(r"barrier 'save': after \d+ s still absent: process 1", pod.said(0))


def test_differences_group_the_processes() -> None:
    items = {0: {"a": 1, "b": 2}, 1: {"a": 1, "b": 3}, 2: {"a": 1, "b": 2}}
    assert differences(items, ("x", "y", "")) == ["b: 3 on process 1 (y); 2 on processes 0 (x), 2"]


def test_code_version_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = cluster.code_version(tmp_path)
    assert first == cluster.code_version(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert first["tvq code"] != cluster.code_version(tmp_path)["tvq code"]
    assert {"tvq version", "jax version", "jaxlib version", "tvq commit"} <= set(first)


def test_common_fields_leave_out_what_is_a_process_own() -> None:
    fields = config.common(schema.Config())
    assert "config.train.seed" in fields
    assert "config.cluster.process_id" not in fields


def test_a_lock_of_a_living_process_is_left_alone_and_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    said: list[str] = []
    clear_stale_lock(lock, said.append)
    hold = "import sys, time; f = open(sys.argv[1], 'w'); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(cluster.ClusterError, match=f"in use by process {holder.pid}.*kill {holder.pid}"):
            clear_stale_lock(lock, said.append)
        holder.kill()
    assert lock.exists()
    assert said == []
    clear_stale_lock(lock, said.append)
    assert not lock.exists()
    assert "left behind" in said[0]


def test_a_lock_whose_holder_cannot_be_seen_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, proc = tmp_path / "lock", tmp_path / "proc"
    lock.touch()
    (proc / "17").mkdir(parents=True)

    def refuse(self: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(os, "getuid", lambda: lock.stat().st_uid + 1)
    with pytest.raises(cluster.ClusterError, match=r"belongs to user .* cannot be seen"):
        clear_stale_lock(lock, print, proc)
    assert lock.exists()
