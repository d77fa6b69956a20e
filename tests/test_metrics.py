import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvq.metrics import Clock, Console, JsonlWriter, duration, progress_line, row

STEP_METRICS = {
    "loss_lm_per_token_unscaled": np.float32(1.5),
    "loss_mask_per_token": np.float32(0.75),
    "loss_commit_per_token": np.float32(0.25),
    "grad_norm": np.asarray(3, np.float32),
}


def test_a_row_divides_by_the_tokens_that_count() -> None:
    made = row(7, "train", STEP_METRICS, 1000.0)
    assert list(made)[:2] == ["step", "split"]
    assert made == {
        "step": 7,
        "split": "train",
        "loss": 2.0,
        "bits_per_token": pytest.approx(2 / math.log(2)),
        "tokens_per_second": 1000.0,
        "loss_commit_per_token": 0.25,
        "grad_norm": 3.0,
    }
    assert all(type(value) in (int, str, float) for value in made.values())


def test_bits_a_byte() -> None:
    made = row(7, "train", STEP_METRICS, None, bytes_per_token=4.0)
    assert made["bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
    assert made["tokens_per_second"] is None


def test_a_batch_of_padding_has_no_loss() -> None:
    made = row(1, "train", {**STEP_METRICS, "loss_mask_per_token": np.float32(0)}, None)
    assert math.isnan(made["loss"])


def test_the_progress_line() -> None:
    made = row(1200, "train", STEP_METRICS, 12345.6, bytes_per_token=1.0)
    assert progress_line(made, 5000, 185) == (
        "step 1,200 of 5,000, loss 2.0000, 2.885 bits a byte, 12,346 tokens/s, 3:05 min left"
    )
    made = row(1, "train", STEP_METRICS, None)
    assert progress_line(made, 5, None) == "step 1 of 5, loss 2.0000, 2.885 bits a token"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (3599, "59:59 min"),
        (7620, "2:07 h"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, resume_step: int, *steps: int) -> None:
    writer = JsonlWriter(path, resume_step)
    for step in steps:
        writer.write({"step": step, "split": "train", "loss": step / 2})
    writer.close()


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write({"step": 1, "loss": 0.5})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    writer.close()


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", 0)
    writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1e300})
    writer.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "step": 1, "a": None, "b": None, "c": None, "d": None, "e": 1e300,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("resume_step", "stay"), [(0, []), (1, [1]), (2, [1, 2, 2]), (3, [1, 2, 2, 3]), (9, [1, 2, 2, 3])]
)
def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path, resume_step: int, stay: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2, 2, 3)
    write(path, resume_step, 10)
    assert [r["step"] for r in rows(path)] == [*stay, 10]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ["{", '{"step": 3, "los', '{"step": 3}', "\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    with path.open("a") as file:
        file.write(torn)
    write(path, 5, 6)
    assert [r["step"] for r in rows(path)] == [1, 2, 6]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", "{}", "7", "", "\x00", '{"step": "x"}'])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n' + bad + '\n{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not a row"):
        JsonlWriter(path, 5)
    assert path.read_text() == text


def test_a_file_without_later_rows_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    before = path.stat().st_ino
    write(path, 2, 3)
    assert path.stat().st_ino == before


WRITER = """
import itertools, sys
from tvq.metrics import JsonlWriter
writer = JsonlWriter(sys.argv[1], 100)
for step in itertools.count(1):
    writer.write({"step": step, "split": "train", "text": "x" * 100_000})
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path])
    while not path.exists() or path.stat().st_size < 3_000_000:
        assert writer.poll() is None
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    n_whole = path.read_text().count("\n")
    assert n_whole > 20
    write(path, 20, 21)
    assert [r["step"] for r in rows(path)] == list(range(1, 22))


class Time:
    def __init__(self) -> None:
        self.t = 100.0

    def __call__(self) -> float:
        return self.t


def test_the_clock_leaves_out_compilation_and_pauses() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, now=now)
    assert clock.lap(0) is None
    assert clock.left(0, 100) is None
    now.t += 60  # the first step compiles
    clock.start(1)
    assert (clock.seconds, clock.lap(1), clock.left(1, 100)) == (0, None, None)
    now.t += 8
    assert clock.lap(5) == 10 * 4 / 8
    now.t += 2
    with clock.pause():
        now.t += 30
    now.t += 2
    assert clock.seconds == 12
    assert clock.lap(9) == 10 * 4 / 4
    # 8 steps took 42 s with the pause: so will the others.
    assert clock.left(9, 17) == 42
    assert clock.lap(9) is None


def test_a_pause_ends_with_an_error_too() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, now=now)
    clock.start(0)
    with contextlib.suppress(KeyError), clock.pause():
        now.t += 5
        raise KeyError
    now.t += 1
    assert clock.seconds == 1


def test_only_the_first_start_counts() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, now=now)
    with clock.pause():
        now.t += 7  # before the start: nothing to leave out
    clock.start(1)
    now.t += 3
    clock.start(2)
    assert clock.seconds == 3
    assert clock.lap(2) == 10 / 3


def test_the_clock_goes_on_after_a_restart() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, seconds=500.0, now=now)
    now.t += 60
    assert clock.seconds == 500
    clock.start(41)
    now.t += 4
    assert clock.seconds == 504
    assert clock.lap(43) == 5
    assert clock.left(43, 53) == 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal would show: only the codes that `Console` uses."""
    lines = [""]
    column = 0
    for part in re.split(r"(\r\n|\r|\n|\x1b\[K)", text):
        if part == "\r":
            column = 0
        elif part in ("\n", "\r\n"):
            lines.append("")
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            assert "\x1b" not in part
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return lines


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_the_live_line_is_rewritten_and_messages_go_above(terminal: Terminal) -> None:
    with Console(terminal) as console:
        console.say("hello")
        console.progress("step 1, a long line")
        console.progress("step 2", brief=True)
        assert screen(terminal.getvalue()) == ["hello", "step 2"]
        console.say("saved\nevaluated")
        assert screen(terminal.getvalue()) == ["hello", "saved", "evaluated", "step 2"]
        console.progress("step 3")
    assert screen(terminal.getvalue()) == ["hello", "saved", "evaluated", "step 3", ""]
    assert terminal.getvalue().count("\n") == 4


def test_leaving_without_a_live_line_prints_nothing(terminal: Terminal) -> None:
    with Console(terminal):
        pass
    assert terminal.getvalue() == ""


def test_a_long_line_is_cut(terminal: Terminal) -> None:
    with Console(terminal) as console:
        console.progress("x" * 200)
        console.say("y" * 200)
    assert screen(terminal.getvalue()) == ["y" * 200, "x" * 79, ""]


@pytest.mark.parametrize(("term", "is_terminal"), [("xterm", False), ("dumb", True), (None, True)])
def test_plain_lines(monkeypatch: pytest.MonkeyPatch, term: str | None, is_terminal: bool) -> None:
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    stream = Terminal() if is_terminal else io.StringIO()
    with Console(stream) as console:
        console.say("hello")
        console.progress("step 1" + "x" * 200)
        console.progress("batch 1 of 9", brief=True)
        console.progress("step 2")
    assert stream.getvalue() == "hello\nstep 1" + "x" * 200 + "\nstep 2\n"


def test_a_quiet_console(terminal: Terminal) -> None:
    with Console(terminal, quiet=True) as console:
        console.say("hello")
        console.progress("step 1")
    assert terminal.getvalue() == ""


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        console.say("hello")
    assert capsys.readouterr().out == "hello\n"


class SlowTerminal(Terminal):
    def write(self, text: str) -> int:
        for letter in text:
            super().write(letter)
            time.sleep(0)  # lets another thread in
        return len(text)


def test_messages_of_several_threads_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(name: str) -> None:
        for _ in range(50):
            console.say(name * 9)
            console.progress(f"at {name}")

    monkeypatch.setenv("TERM", "xterm")
    terminal = SlowTerminal()
    with Console(terminal) as console:
        threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = screen(terminal.getvalue())
    assert sorted(lines[:-2]) == [name * 9 for name in "abc" for _ in range(50)]
    assert re.fullmatch("at [abc]", lines[-2])


TALKER = """
from tvq.metrics import Console
with Console() as console:
    console.say("compiling")
    for step in range(5):
        console.progress(f"step {step} of 5, " + "loss 1.2345, " * 9)
        if step == 2:
            console.say("saved")
"""


def test_on_a_real_terminal() -> None:
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", TALKER], stdout=other, env={**os.environ, "TERM": "xterm"}
    )
    assert process.wait() == 0
    os.close(other)
    output = b""
    try:
        while block := os.read(main, 4096):
            output += block
    except OSError:  # Linux's word for the end of a terminal
        pass
    os.close(main)
    shown = "step 4 of 5, loss 1.2345, loss"[:29]
    assert screen(output.decode()) == ["compiling", "saved", shown, ""]
