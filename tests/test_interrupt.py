"""Ctrl-C while the program still imports: one line, the code of a shell, no traceback of a library."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.pod import environment
from tvq import EXIT_INTERRUPTED


@pytest.mark.parametrize("library", ["jax", "ml_collections"])
def test_an_interrupt_in_the_first_second(tmp_path: Path, library: str) -> None:
    """In the first import and in the last: a stand-in of the library waits for the signal there."""
    (tmp_path / f"{library}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    config = Path(__file__).parents[1] / "configs" / "debug.py"
    command = [sys.executable, "-m", "tvq", "plan", f"--config={config}", "--topology=nowhere"]
    before = environment(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with subprocess.Popen(
        command, env=before, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "importing\n", child.communicate()
        child.send_signal(signal.SIGINT)
        assert child.communicate() == ("", "tvq: interrupted\n")
    assert child.returncode == EXIT_INTERRUPTED


def test_who_imports_it_keeps_its_own_handler() -> None:
    code = "import signal, tvq; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
