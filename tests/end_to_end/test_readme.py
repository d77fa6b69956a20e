"""The commands of the README and of docs/, in their order, on the tiny model."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.program import REPOSITORY, Program

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# What is large in the README, and here.
SMALLER = {
    "--config.train.steps=2000": "--config.train.steps=24",
    "--config.train.steps=600": "--config.train.steps=24",
    "--config.train.steps=480": "--config.train.steps=24",
    "--config.optimizer.n_max_step=480": "--config.optimizer.n_max_step=24",
    "--config.optimizer.n_decay_step=80": "--config.optimizer.n_decay_step=4",
    "--config.train.sequence_len=2048": "--config.train.sequence_len=64",
    "--config.train.sequence_len=131072": "--config.train.sequence_len=64",
    "--config.train.update_len=131072": "--config.train.update_len=64",
    "--config.train.segment_len=4096": "--config.train.segment_len=16",
    "--config.model.revive_codes=100": "--config.model.revive_codes=2",  # as the tiny model has it
    "--lengths=2048,8192": "--lengths=32",
    "--lengths=2048": "--lengths=32",
    "--lengths=2048,8192,32768": "--lengths=32",
    "--lengths=2048,8192,32768,65536": "--lengths=32",
    "--n_token=16384": "--n_token=32",
    "--n_token=32768": "--n_token=32",
    "--contexts=1024,102400,1048576": "--contexts=32",
    "--formulations=auto:all,auto:names,auto:nothing": "--formulations=auto:nothing",
    "--rounds=7": "--rounds=1",
    "--rounds=9": "--rounds=1",
    "--length=200": "--length=20",
}


def commands(page: Path) -> list[list[str]]:
    """The words of each line of a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(tvq: Program, page: Path) -> None:
    """Those of tvq; the tests of launch/ run its own. A newcomer's first two are processes, as they are."""
    apart = ["train", "eval"] if page == PAGES[0] else []
    for words in [words[1:] for words in commands(page) if words[0] == ".venv/bin/tvq"]:
        elsewhere = [re.sub("(^|=)runs/", rf"\1{tvq.folder}/tour/", word) for word in words]
        arguments = [SMALLER.get(word, word).replace("@400", "@12") for word in elsewhere]
        if "--config=configs/debug.py" in arguments:
            tiny = [word for word in tvq.options(tvq.folder) if not word.startswith("--workdir")]
            arguments = [arguments[0], *tiny, *arguments[1:]]
            arguments.remove("--config=configs/debug.py")
        if arguments[0] == "train" and not any(word.endswith("/debug") for word in arguments):
            arguments += ["--config.sample.every=0", "--config.evaluate.every=0"]  # the first run has both
        if arguments[0] == "bench" and "--rounds=1" not in arguments:
            arguments.append("--rounds=1")
        if arguments[0] in apart:
            apart.remove(arguments[0])
            out, _ = tvq.run_apart(*arguments)
        else:
            out, _ = tvq.run(*arguments)
        assert out, words


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [words[1] for words in commands(PAGES[0]) if words[0] == "make"]
    assert targets[:2] == ["train", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize(
    ("program", "prints", "extra"),
    [
        ("nvidia-smi", "CUDA Version: 13.0", "[dev,cuda]"),
        ("nvidia-smi", "CUDA Version: 12.4", "[dev,cuda12]"),
        ("nvidia-smi", "NVIDIA-SMI has failed: no driver", "[dev]"),
        ("ls", "/dev/accel0", "[dev,tpu]"),
        ("ls", "", "[dev]"),
    ],
)
def test_make_installs_the_jax_of_the_machine(tmp_path: Path, program: str, prints: str, extra: str) -> None:
    for name, text in {"nvidia-smi": "", "ls": "", program: prints}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n" if text else "#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    shown = subprocess.run(
        ["make", "--dry-run", "--assume-new=pyproject.toml", "setup"],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"'.{extra}'" in shown
