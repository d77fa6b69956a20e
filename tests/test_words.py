"""Words that nobody takes: no error, no exit code of their own, no waiting."""

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from tests.fakes.pod import environment
from tvq import cluster, words
from tvq.cluster import watchdog
from tvq.run.metrics import Console
from tvq.schema import Cluster

ALONE = cluster.Place(how="alone")


@contextlib.contextmanager
def unreadable(kind: str) -> Iterator[TextIO | None]:
    """A stream that takes no words."""
    if kind == "none":
        yield None
        return
    if kind == "full":
        stream = open("/dev/full", "w")  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    if kind == "closed":
        stream.close()
    elif kind == "bad descriptor":
        os.close(stream.fileno())
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


KINDS = ("full", "no reader", "closed", "bad descriptor", "none")


@pytest.fixture(params=KINDS)
def nobody(request: pytest.FixtureRequest) -> Iterator[TextIO | None]:
    with unreadable(request.param) as stream:
        yield stream


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_words_that_nobody_takes_raise_nothing(nobody: TextIO | None) -> None:
    guarded = words.guarded(nobody)
    assert guarded.write("hello\n") == 6
    guarded.write_now("hello\n")
    assert not guarded.isatty()
    guarded.flush()
    assert words.guarded(guarded) is guarded


def test_the_console_and_the_log_are_guarded(
    nobody: TextIO | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", nobody)
    monkeypatch.setattr(sys, "stderr", nobody)
    with Console() as console:
        console.say("hello")
        console.progress("step 1")
    (tmp_path / "process_0.log").symlink_to("/dev/full")
    with contextlib.closing(cluster.Log(tmp_path, ALONE)) as log:
        log.claim()
        log.say("hello")


def test_words_are_tried_again_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("ab", buffering=0) as file:
        guarded = words.guarded(file)
        guarded.write("one\n")
        full = os.open("/dev/full", os.O_WRONLY)
        kept = os.dup(file.fileno())
        os.dup2(full, file.fileno())
        guarded.write("lost\n")
        os.dup2(kept, file.fileno())
        guarded.write("two\n")
        os.close(full)
        os.close(kept)
    assert path.read_text() == "one\ntwo\n"


def test_a_reader_that_has_stopped_reading_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as far, os.fdopen(writer, "w") as near:
        size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        guarded = words.guarded(near, patience=0.01)
        guarded.write("x" * 3 * size)
        assert far.read(size) == b"x" * size
        guarded.write("now it reads again\n")
        assert far.readline() == b"now it reads again\n"


def test_whether_what_was_printed_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_FAILED", {})
    with open("/dev/full", "w") as full, unreadable("no reader") as broken:
        assert words.failed(full) == ""
        for stream in (full, broken):
            words.guarded(stream).write("hello")
        assert words.failed(full) == "No space left on device"
        assert words.failed(broken) == ""
        said: list[str] = []
        for stream, code in ((broken, 0), (full, 1)):
            monkeypatch.setattr(sys, "stdout", stream)
            assert words.arrived(0, said.append) == code
        assert said == ["tvq: standard output: No space left on device; the output is lost"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_for_a_stop_though_nobody_hears(
    kind: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    processes = cluster.Processes(ALONE, ("",), 1.0)
    with unreadable(kind) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        processes._catch_signals()
        assert not processes.stop_requested()
        signal.raise_signal(number)
        assert processes.stop_requested()


def test_a_signal_in_the_midst_of_a_write(monkeypatch: pytest.MonkeyPatch, handlers: None) -> None:
    """As of a library's handler of logs, which holds the stream itself."""

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def fileno(self) -> int:
            return writer

        def write(self, data: object) -> int:
            signal.raise_signal(signal.SIGINT)
            return len(bytes(data))  # type: ignore[call-overload]

    reader, writer = os.pipe()
    processes = cluster.Processes(ALONE, ("",), 1.0)
    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted()))
    monkeypatch.setattr(sys, "stderr", stream)
    processes._catch_signals()
    stream.write("a line of a log\n")
    stream.flush()
    assert processes.stop_requested()
    assert b"Ctrl-C again" in os.read(reader, 4096)
    os.close(reader)
    os.close(writer)


def test_a_hangup_that_is_ignored_stays_ignored(handlers: None) -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    processes = cluster.Processes(ALONE, ("",), 1.0)
    processes._catch_signals()
    signal.raise_signal(signal.SIGHUP)
    assert not processes.stop_requested()


def test_the_watchdog_ends_the_process_whatever_becomes_of_its_words(
    nobody: TextIO | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(BaseException):
        pass

    def leave(code: int) -> None:
        raise Gone(code)

    (tmp_path / "process_0.log").symlink_to("/dev/full")
    monkeypatch.setattr(sys, "stderr", nobody)
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    with contextlib.closing(cluster.Log(tmp_path, ALONE)) as log:
        log.claim()
        dog = cluster.Watchdog(cluster.Processes(ALONE, ("",), 1.0), Cluster(), log)
        with pytest.raises(Gone, match=str(cluster.EXIT_STUCK)):
            dog._fire("no progress", [])


TALKS = """
import contextlib, sys
from tvq import words
words.begin()
opened = open(sys.argv[1], "w")
print("to standard error", file=sys.stderr)
with contextlib.suppress(OSError):  # left in the buffer
    print("to standard output")
with contextlib.suppress(OSError):  # as logging does
    sys.__stderr__ and print("past its guard", file=sys.__stderr__)
opened.write(f"{opened.fileno()}")
sys.exit(75)
"""


@pytest.mark.parametrize("where", [">/dev/full 2>&1", ">&- 2>&- <&-", "2>&1 | true"])
def test_the_exit_code_is_that_of_the_program(tmp_path: Path, where: str) -> None:
    """Python's own flush at exit would make it 120; and a descriptor that was closed is given to no file."""
    command = (
        f'sleep_for_reader() {{ sleep 0.2; "$@"; }}; sleep_for_reader "$@" {where}; exit ${{PIPESTATUS[0]}}'
    )
    opened = tmp_path / "opened"
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", TALKS, str(opened)],
        cwd=Path(__file__).parents[1],
        env=environment(PYTHONUNBUFFERED=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    assert int(opened.read_text()) > 2
