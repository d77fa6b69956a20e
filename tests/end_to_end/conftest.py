from pathlib import Path

import pytest

from tests.end_to_end.program import Program, write_corpus


@pytest.fixture(scope="session")
def tvq(tmp_path_factory: pytest.TempPathFactory) -> Program:
    program = Program(tmp_path_factory.mktemp("program"))
    write_corpus(program.corpus)
    return program


@pytest.fixture(scope="session")
def unbroken(tvq: Program) -> Path:
    """The workdir of a run of 20 updates on one device. Copy it to change it."""
    workdir = tvq.folder / "unbroken"
    tvq.train(workdir)
    return workdir
