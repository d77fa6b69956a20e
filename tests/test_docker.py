"""The image's files are consistent with the project; nothing is built here."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
# Logical lines: comments gone, continued lines joined.
LINES = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)).splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COPIED = [name.rstrip("/") for line in LINES if line.startswith("COPY") for name in line.split()[1:-1]]


def instruction(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([linter, ROOT / "docker/Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    [base] = instruction("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    minimum = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, base.split(":")[1].split(".")[:2])) >= tuple(map(int, minimum.split(".")))
    assert instruction("USER") == ["1000"]
    assert instruction("ENTRYPOINT") == ['["tvq"]']


def test_what_is_copied_exists_and_is_let_through_to_the_build() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().split() if line]
    for name in COPIED:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored
    assert ignored[0] == "*"
    assert {"tvq", "configs", "launch", "pyproject.toml"} <= set(COPIED)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "abacus"])
def test_the_install_step_asks_for_what_the_project_offers(tmp_path: Path, platform: str) -> None:
    [step] = [line for line in instruction("RUN") if "pip install" in line]
    (tmp_path / "pip").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n')
    (tmp_path / "pip").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PLATFORM": platform}
    done = subprocess.run(["sh", "-c", step], env=environ, capture_output=True, text=True, check=False)
    if platform == "abacus":
        assert done.returncode == 2
        assert "cpu, cuda or tpu" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    match = re.fullmatch(r"install \.(?:\[(\w+)\])?", (tmp_path / "asked").read_text().strip())
    assert match
    assert match[1] in (None, *PROJECT["project"]["optional-dependencies"])


def test_every_package_is_installed() -> None:
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "tvq").rglob("__init__.py")}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert found == {name for pattern in listed for name in fnmatch.filter(found | set(listed), pattern)}


@pytest.mark.slow
def test_the_copied_files_install_and_import(tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    # The build back end and the dependencies are already here: nothing is downloaded.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", tmp_path / "site", "."], cwd=tmp_path, check=True)
    program = "import tvq.cluster, tvq.config; print(tvq.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "site",
        env={"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith(str(tmp_path / "site"))


def test_compose_runs_two_processes_that_can_find_each_other() -> None:
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    settings = [service["environment"] for service in services.values()]
    assert [s["TVQ_PROCESS_ID"] for s in settings] == ["0", "1"]
    for service, environment in zip(services.values(), settings, strict=True):
        host, port = environment["TVQ_COORDINATOR"].split(":")
        assert next(iter(services)) == host
        assert port in instruction("EXPOSE")[0].split()
        assert environment["TVQ_N_PROCESS"] == str(len(services))
        config = next(c for c in service["command"] if c.startswith("--config="))
        assert (ROOT / config.removeprefix("--config=")).exists()
        assert service["build"]["args"]["PLATFORM"] == "cpu"
        assert service["image"] == "tvq:cpu"
