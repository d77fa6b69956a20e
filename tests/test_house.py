"""The order of the house: who may import whom, and how large a part may grow."""

import ast
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Those in exported/ are data: `tvq export --format=hf` copies them to where there is no tvq.
FILES = sorted(path for path in (ROOT / "tvq").rglob("*.py") if path.parent.name != "exported")
# A part imports only from parts before it.
ORDER = (
    "errors", "atomic", "words", "paths", "schema", "rules", "config", "commands", "dims", "numerics",
    "cluster", "sharding", "kernels", "model", "chips", "data",
    "training.sums", "training.loss", "training.schedules", "training.skip", "training.transforms",
    "training.optimizers", "training.optimizer", "training.state", "training.accumulate",
    "training.train_step",
    "run.tensors", "run.seal", "run.checkpoint", "run.metrics", "run.curves", "run.records",
    "run.results", "run.health", "run.snapshots", "run.workdir", "run.restore", "run.trace", "run.draw",
    "run.image_samples", "run.describe", "hf",
    "programs.prepare", "programs.evaluate", "programs.recall", "programs.sample", "programs.branch",
    "programs.loop", "programs.train", "programs.bench", "programs.report", "programs.doctor",
    "programs.plan", "programs.profile", "programs.interop", "programs.average", "programs.show", "start",
    "__main__",
)  # fmt: skip
MAX_FILE, MAX_FUNCTION = 400, 60
# Longer, with the reason.
LONG = {
    "rules.py: validate": "one rule after the other",
    "training/train_step.py: make": "the step on one page, to be compared with the paper",
}
# Functions that catch everything, with the reason.
CATCH_ALL = {"cluster/processes.py: guard": "logs it and ends the process, so that no other waits for it"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module(path: Path) -> str:
    """`model.attention` for tvq/model/attention.py, `model` for tvq/model/__init__.py."""
    parts = path.relative_to(ROOT / "tvq").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}
FOLDERS = {name.partition(".")[0] for name in ORDER if "." in name}


def imported(name: str) -> set[str]:
    """The modules of tvq that a module names in its imports."""
    found = set()
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"tvq.{name} imports relatively, line {node.lineno}"
            # `from tvq import sharding` imports tvq.sharding, as `from tvq.sharding import BATCH` does.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n.removeprefix("tvq.") in MODULES else str(node.module) for n in names}
    return {n.removeprefix("tvq.") for n in found if n == "tvq" or n.startswith("tvq.")} - {"tvq"}


def part(name: str) -> str:
    """`model` for `model.vq`; in the folders whose modules stand in an order, `run.draw`."""
    folder, _, rest = name.partition(".")
    return f"{folder}.{rest.split('.')[0]}" if rest and folder in FOLDERS else folder


def test_every_part_has_its_place():
    assert {part(name) for name in MODULES if name} - FOLDERS <= set(ORDER)


@pytest.mark.parametrize("name", [name for name in MODULES if name and name not in FOLDERS])
def test_imports_go_upward_only(name):
    for other in imported(name):
        assert other in MODULES, f"tvq.{name} imports tvq.{other}, which is no module"
        assert part(other) == part(name) or ORDER.index(part(other)) < ORDER.index(part(name)), (
            f"tvq.{name} imports tvq.{other}, which comes after it"
        )


def test_there_are_no_cycles():
    graph = {name: imported(name) - {name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


@pytest.mark.parametrize("name", [name for name in MODULES if name and part(name) != "model"])
def test_the_model_is_known_by_its_front_alone(name):
    assert not {other for other in imported(name) if other.startswith("model.")}


def test_model_order():
    inside = (
        "model.parameters", "model.window", "model.cache", "model.attention", "model.full", "model.flash",
        "model.recurrence", "model.vq", "model.layers", "model.parts", "model.unit", "model.transformer",
    )  # fmt: skip
    assert set(inside) <= set(MODULES)
    for i, name in enumerate(inside):
        assert imported(name) & set(inside) <= set(inside[:i]), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    tree = parsed(path)
    inside = {
        node.lineno
        for outer in tree.body
        if not isinstance(outer, ast.Import | ast.ImportFrom)
        for node in ast.walk(outer)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not inside, f"imports inside of functions or conditions: lines {sorted(inside)}"


def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """`{"model/vq.py: nearest": node}`."""
    nodes = (n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {f"{path.relative_to(ROOT / 'tvq')}: {node.name}": node for node in nodes}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_parts_stay_small(path):
    n_line = len(path.read_text().splitlines())
    assert n_line <= MAX_FILE, f"{n_line} lines; split it"
    for name, node in functions(path).items():
        n_line = node.end_lineno - node.lineno + 1
        assert n_line <= MAX_FUNCTION or name in LONG, f"{name} has {n_line} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_errors_are_not_swallowed(path):
    for name, function in functions(path).items():
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                broad = {"everything", "Exception", "BaseException"} & set(re.findall(r"\w+", caught))
                raises = isinstance(node.body[-1], ast.Raise)
                assert not broad or raises or name in CATCH_ALL, f"{name} line {node.lineno} catches {caught}"


def test_exceptions_to_the_rules_are_needed():
    every = {name for path in FILES for name in functions(path)}
    assert every >= set(LONG) | set(CATCH_ALL)


def test_every_package_is_installed():
    packages = {"tvq", *(f"tvq.{name}" for name, path in MODULES.items() if name and path.stem == "__init__")}
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(told) == packages
