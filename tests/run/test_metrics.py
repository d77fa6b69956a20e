import contextlib
import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import pytest

from tvq.run.metrics import KINDS, Clock, Console, Progress, duration, progress_line, row, spent_line

STEP_METRICS = {
    "loss_lm_per_token_unscaled": np.float32(1.5),
    "loss_mask_per_token": np.float32(0.75),
    "loss_commit_per_token": np.float32(0.25),
    "grad_norm": np.asarray(3, np.float32),
}


def test_a_row_divides_by_the_tokens_that_count() -> None:
    made = row(7, "train", STEP_METRICS, {"tokens_per_second": 1000.0})
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
    made = row(7, "train", STEP_METRICS, {"tokens_per_second": None}, bytes_per_token=4.0)
    assert made["bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
    assert made["tokens_per_second"] is None


def test_a_batch_of_padding_has_no_loss() -> None:
    made = row(1, "train", {**STEP_METRICS, "loss_mask_per_token": np.float32(0)}, {})
    assert math.isnan(made["loss"])


def test_the_progress_line() -> None:
    pace = {"tokens_per_second": 12345.6, "model_flops_use": 0.312, "data_wait": 0.004}
    made = row(1200, "train", STEP_METRICS, pace, bytes_per_token=1.0)
    assert progress_line(made, 5000, 185, 259) == (
        "step 1,200 of 5,000, 3:05 min left, loss 2.0000, 2.885 bits per byte, 12,346 tokens/s,"
        " 31 % of peak FLOPs, 0 % data wait"
    )
    made = row(1, "train", STEP_METRICS, dict.fromkeys(pace))
    assert progress_line(made, 5, 0.0, 8) == progress_line(made, 5, None, 8)
    assert progress_line(made, 5, None, 8) == "step 1 of 5, loss 2.0000, 2.885 bits per token"
    made["loss"] = 4.1  # guessing among eight has 2.08, and a run may begin above that
    assert "loss 4.1000, " in progress_line(made, 5, None, 8)
    made["loss"] = 4.2
    assert progress_line(made, 5, None, 8) == (
        "step 1 of 5, loss 4.2 is worse than guessing: lower config.optimizer.lr_max"
    )


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


class Time:
    def __init__(self) -> None:
        self.t = 100.0

    def __call__(self) -> float:
        return self.t


def test_the_time_left_does_not_count_the_first_part() -> None:
    times = iter([0.0, 60.0, 70.0, 80.0, 90.0])  # it compiled for a minute
    progress = Progress("reading", "tokens", lambda: next(times))
    assert [progress.line(done, 4_000) for done in (0, 1_000, 2_000, 3_000, 4_000)] == [
        "reading: 0 of 4,000 tokens",
        "reading: 1,000 of 4,000 tokens",
        "reading: 2,000 of 4,000 tokens, 20 s left",
        "reading: 3,000 of 4,000 tokens, 10 s left",
        "reading: 4,000 of 4,000 tokens",
    ]


def test_the_clock_knows_what_time_went_into() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, peak=5.0, began=now.t - 7, now=now)
    now.t += 3
    with clock.spending("compile"):
        now.t += 60
    assert clock.left(0, 100) is None
    clock.start(1)
    assert clock.lap(1)["tokens_per_second"] is None
    now.t += 8
    found = clock.lap(5)
    assert found == {
        "tokens_per_second": 10 * 4 / 8,
        "data_wait": 0.0,
        "model_flops_use": 1.0,
        "goodput": 8 / 78,
        "seconds_step": 8.0,
        "seconds_data": 0.0,
        "seconds_compile": 60.0,
        "seconds_evaluate": 0.0,
        "seconds_sample": 0.0,
        "seconds_save": 0.0,
        "seconds_start": 10.0,
        "seconds_repeated": 0.0,
    }
    now.t += 2
    with clock.spending("evaluate"):
        now.t += 30
    now.t += 2
    found = clock.lap(9)
    assert (found["tokens_per_second"], found["seconds_evaluate"]) == (10 * 4 / 4, 30)
    # 8 steps took 42 s with the evaluation: so will the others.
    assert clock.left(9, 17) == 42
    assert clock.lap(9)["tokens_per_second"] is None
    assert sum(clock.spent.values()) == now.t - 93


def test_time_inside_counts_where_an_error_ends_it_too() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, now=now)
    clock.start(0)
    with contextlib.suppress(KeyError), clock.spending("save"):
        now.t += 5
        raise KeyError
    now.t += 1
    assert (clock.spent["save"], clock.spent["step"]) == (5, 1)


@pytest.mark.parametrize("is_busy", [True, False])
def test_waiting_for_data_counts_only_while_the_devices_have_nothing_to_do(is_busy: bool) -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, now=now)
    clock.start(0)
    now.t += 1
    with clock.waiting(lambda: is_busy):
        now.t += 3
    found = clock.lap(1)
    assert (found["seconds_step"], found["seconds_data"]) == ((4, 0) if is_busy else (1, 3))
    assert found["data_wait"] == (0 if is_busy else 3 / 4)
    assert found["tokens_per_second"] == 10 / 4, "the speed is that of the whole"


def test_the_clock_goes_on_after_a_restart() -> None:
    now = Time()
    clock = Clock(tokens_per_step=10, now=now)
    clock.add({"step": 400.0, "save": 100.0})
    # Of the rows after the checkpoint the last tells when the process was lost; older ones do not tell.
    clock.repeat([{"step": 42, "seconds_step": 415.0, "seconds_save": 100.0}, {"step": 44, "loss": 1.0}])
    now.t += 60
    clock.start(41)
    now.t += 4
    assert clock.spent == dict.fromkeys(KINDS, 0.0) | {
        "step": 404.0, "save": 100.0, "start": 60.0, "repeated": 15.0,
    }  # fmt: skip
    assert clock.lap(43)["tokens_per_second"] == 5
    assert clock.left(43, 53) == 20


def test_the_line_of_what_time_went_into() -> None:
    spent = dict.fromkeys(KINDS, 0.0) | {"step": 90.0, "compile": 8.0, "save": 1.96, "data": 0.04}
    assert spent_line(spent) == "1:40 min in all, 90 % in steps (goodput); compile 8 %, save 2 %"
    assert spent_line({"step": 5.0}) == "5 s in all, 100 % in steps (goodput)"


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
        console.progress("step 2")
        assert screen(terminal.getvalue()) == ["hello", "step 2"]
        console.say("saved\nevaluated")
        assert screen(terminal.getvalue()) == ["hello", "saved", "evaluated", "step 2"]
        console.progress("evaluating", brief=True)
        assert screen(terminal.getvalue()) == ["hello", "saved", "evaluated", "evaluating"]
    assert screen(terminal.getvalue()) == ["hello", "saved", "evaluated", "step 2", ""]
    assert terminal.getvalue().count("\n") == 4


def test_a_brief_line_leaves_nothing_behind(terminal: Terminal) -> None:
    with Console(terminal) as console:
        console.progress("reading", brief=True)
        console.say("found")
        console.progress("drawing", brief=True)
    assert screen(terminal.getvalue()) == ["found", ""]


def test_leaving_without_a_live_line_prints_nothing(terminal: Terminal) -> None:
    with Console(terminal):
        pass
    assert terminal.getvalue() == ""


def test_a_long_line_is_cut(terminal: Terminal) -> None:
    with Console(terminal) as console:
        console.progress("x" * 200)
        console.say("y" * 200)
        console.progress("step 1, " + "x" * 80)
    assert screen(terminal.getvalue()) == ["y" * 200, "step 1", ""]
    with Console(terminal) as console:
        console.progress("x" * 200)
    assert screen(terminal.getvalue())[-2:] == ["x" * 79, ""]


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


def test_a_silent_console(terminal: Terminal) -> None:
    with Console(terminal, silent=True) as console:
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
from tvq.run.metrics import Console
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
    assert screen(output.decode()) == ["compiling", "saved", "step 4 of 5, loss 1.2345", ""]
