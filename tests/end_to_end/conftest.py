import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.program import Program, write_corpus
from tvq import __main__

Here = Callable[..., tuple[str, str]]


@pytest.fixture(scope="session")
def tvq(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """All workers of pytest-xdist have the same, with what any of them has compiled."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    program = Program(folder / "program")
    with made_once(program.folder) as is_mine:
        if is_mine:
            program.folder.mkdir()
            write_corpus(program.corpus)
    return program


@contextlib.contextmanager
def made_once(path: Path) -> Iterator[bool]:
    """Whether it is to be made here; another worker of pytest-xdist that makes it is waited for."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_mine, is_whole = not path.exists(), False
        try:
            yield is_mine
            is_whole = True
        finally:
            if is_mine and not is_whole:
                shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def unbroken(tvq: Program) -> Path:
    """The workdir of a run of 20 updates on one device. Copy it to change it."""
    workdir = tvq.folder / "unbroken"
    with made_once(workdir) as is_mine:
        if is_mine:
            tvq.train(workdir, "--config.profile.steps=4:7")
    return workdir


@pytest.fixture
def run(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of the unbroken run as it was after 18 of its 20 updates."""
    workdir = tmp_path / "copy"
    shutil.copytree(unbroken, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    return workdir


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """`here(command, ..., exit_code=0)` runs it in this process: `(stdout, stderr)`."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")  # or it would be set for all tests that follow
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str, exit_code: int = 0) -> tuple[str, str]:
        try:
            code = __main__.main(arguments)
        except SystemExit as leaving:
            code = leaving.code
        assert code == exit_code
        return capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
