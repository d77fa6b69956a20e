"""Ctrl-C while the program still imports: one line, the code of a shell, no traceback of a library."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tvq import EXIT_INTERRUPTED


@pytest.mark.parametrize("seconds", [0.2, 0.7, 1.2])
def test_an_interrupt_in_the_first_second(seconds: float) -> None:
    config = Path(__file__).parents[1] / "configs" / "debug.py"
    command = [sys.executable, "-m", "tvq", "plan", f"--config={config}", "--topology=nowhere"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    assert child.communicate() == ("", "tvq: interrupted\n")
    assert child.returncode == EXIT_INTERRUPTED


def test_who_imports_it_keeps_its_own_handler() -> None:
    code = "import signal, tvq; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
