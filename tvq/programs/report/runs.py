"""What a run has left in its workdir, read as far as it is present."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from tvq import config
from tvq.errors import InputError
from tvq.run import health
from tvq.run.metrics import Row
from tvq.run.records import BEFORE, FILE, SAMPLES, Sample, samples

MAX_SNAPSHOTS = 120  # of the codebooks, evenly over the run: more cannot be told apart in a picture
MAX_SAMPLES = 8
LAST_STEP = 2**31
PNG = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")  # how such a file begins, and ends
# The arrays besides usage that every snapshot has.
SNAPSHOT = ("perplexity", "dead", "relative_error", "churn")
T = TypeVar("T")


class Run(NamedTuple):
    name: str
    rows: list[Row]
    config: dict[str, Any]  # {"section.field": value}
    snapshots: dict[int, dict[str, np.ndarray]]  # of the codebooks, by step: the arrays of tvq/run/health.py
    samples: dict[int, Sample]
    contexts: dict[str, list[Row]]  # {split, and settings if there are several: newest table by context}
    broken: list[str]  # what cannot be read, and is left out

    def column(self, name: str, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows of a split that have a number there."""
        points = [(r["step"], r[name]) for r in self.rows if r["split"] == split and is_number(r.get(name))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.asarray(steps), np.asarray(values, float)

    def splits(self) -> list[str]:
        """The splits that were evaluated."""
        return sorted({r["split"] for r in self.rows} - {"train"})

    def spent(self) -> dict[str, float]:
        """Seconds by what they were spent on, up to the last row."""
        timed = (r for r in reversed(self.rows) if is_number(r.get("seconds_step")))
        last: Mapping = next(timed, {})
        spent = {k.removeprefix("seconds_"): v for k, v in last.items() if k.startswith("seconds_")}
        spent = {kind: seconds for kind, seconds in spent.items() if is_number(seconds) and seconds >= 0}
        return spent if any(spent.values()) else {}


def loss_unit(runs: Sequence[Run]) -> str:
    """The unit of their losses: bits a byte, or a token if the bytes are not known."""
    return "byte" if all(len(run.column("bits_per_byte")[0]) for run in runs) else "token"


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # neither NaN nor infinite, nor an integer that no float holds


def read(workdirs: list[str]) -> list[Run]:
    """InputError: a folder holds no run, or one that has written no row yet."""
    paths = [epath.Path(workdir) for workdir in workdirs]
    names = [path.name for path in paths]
    return [
        _read(path, str(path) if names.count(path.name) > 1 else path.name)
        for path in dict.fromkeys(paths)  # one that is given twice counts once
    ]


def _read(workdir: epath.Path, name: str) -> Run:
    if not (workdir / config.FILE).exists():
        raise InputError(f"--workdir={workdir} holds no run: there is no {workdir / config.FILE}")
    if not (workdir / FILE).exists():
        raise InputError(f"--workdir={workdir} has no {FILE} yet; let it train a while")
    rows, broken = read_rows(workdir / FILE)
    if not rows:
        reason = f": {broken[0]}" if broken else "; let it train a while"
        raise InputError(f"{workdir / FILE} has no row yet{reason}")
    if (workdir / BEFORE).exists():  # of the runs that it started from
        before, wrong = read_rows(workdir / BEFORE)
        known = {(row["step"], row["split"]) for row in rows}
        rows = [row for row in before if (row["step"], row["split"]) not in known] + rows
        broken += wrong
    flat, taken, drawn = {}, health.steps(workdir / health.FOLDER), samples(workdir / SAMPLES)
    try:
        flat = config.flatten(config.recorded(workdir / config.FILE).to_dict())
    except InputError as error:
        broken.append(str(error))
    snapshots = _whole(evenly(taken, MAX_SNAPSHOTS), lambda step: read_snapshot(workdir, step), broken)
    shape = next((snapshot["usage"].shape for snapshot in reversed(snapshots.values())), ())
    other = [step for step, snapshot in snapshots.items() if snapshot["usage"].shape != shape]
    broken += [f"{health.path(workdir / health.FOLDER, step)} is of another model" for step in other]
    return Run(
        name,
        rows,
        flat,
        {step: snapshot for step, snapshot in snapshots.items() if step not in other},
        _whole(evenly(list(drawn), MAX_SAMPLES), lambda step: _sample(drawn[step]), broken),
        _contexts(workdir / "evaluations", broken),
        broken,
    )


def read_rows(path: epath.Path) -> tuple[list[Row], list[str]]:
    """The rows of a run, and a message for each invalid line; without one that is being written.

    A row has a step, a split and a loss, and otherwise numbers, or null for anything else. InputError: the
    file cannot be read.
    """
    *lines, last = _bytes(path).split(b"\n")
    if b"\0" in last:  # else it may be half a line of a run in progress
        lines.append(last)
    rows = [_row(line) for line in lines]
    wrong = [i for i, row in enumerate(rows) if row is None and lines[i].strip()]
    broken = [f"line {i + 1:,} of {path} is not a row of metrics: {lines[i][:60]!r}" for i in wrong]
    return [row for row in rows if row is not None], broken


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        if not isinstance(row["split"], str) or not is_number(row["step"]):
            return None
        step = int(row["step"])
        if not 0 <= step < LAST_STEP or not (row["loss"] is None or isinstance(row["loss"], int | float)):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    numbers = {name: value if is_number(value) else None for name, value in row.items()}
    return numbers | {"step": step, "split": row["split"]}


def read_snapshot(workdir: epath.Path, step: int) -> dict[str, np.ndarray]:
    """A snapshot of the codebooks. InputError: the file is damaged."""
    path = health.path(workdir / health.FOLDER, step)
    try:
        arrays = health.load(workdir / health.FOLDER, step)
    except Exception as error:  # of zip, of NumPy, of the disk
        raise InputError(f"{path} cannot be read ({error or type(error).__name__})") from error
    shape = arrays["usage"].shape if "usage" in arrays else ()
    missing = [name for name in SNAPSHOT if name not in arrays]
    shapes = {x.shape for name, x in arrays.items() if name != "usage"}
    if missing or len(shape) != 3 or 0 in shape or shapes != {shape[:2]}:
        raise InputError(f"{path} lacks arrays of a snapshot, or has them in other shapes")
    return arrays


def _whole(steps: Iterable[int], read: Callable[[int], T], broken: list[str]) -> dict[int, T]:
    """What can be read, by step; a line in `broken` for the rest."""
    results = {}
    for step in steps:
        try:
            results[step] = read(step)
        except InputError as error:
            broken.append(str(error))
    return results


def _bytes(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def _sample(path: epath.Path) -> Sample:
    content = _bytes(path)
    if path.suffix == ".png":
        if not content.startswith(PNG[0]) or not content.endswith(PNG[1]):
            raise InputError(f"{path} is not a whole PNG")
        return content
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start:,})") from error


def _contexts(folder: epath.Path, broken: list[str]) -> dict[str, list[Row]]:
    evaluations = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            if path.suffix == ".json":
                evaluations.append(_evaluation(path))
        except InputError as error:
            broken.append(str(error))
    by_step = sorted((e for e in evaluations if e["by_context"]), key=lambda e: e["step"])
    tables = {(e["split"], str(e.get("settings", ""))): e["by_context"] for e in by_step}
    splits = [split for split, _ in tables]
    label = lambda split, settings: split if splits.count(split) == 1 else f"{split} {settings}".strip()
    return {label(*key): table for key, table in tables.items()}


def _evaluation(path: epath.Path) -> dict[str, Any]:
    """A result of tvq eval, or of another program without a table. InputError: it is neither."""
    try:
        result = json.loads(_bytes(path))
        table = result.get("by_context") or []
        names = ("context_from", "context_to", "loss")
        is_table = all(is_number(row[name]) for row in table for name in names)
        if not is_number(result["step"]) or (table and not isinstance(result["split"], str)) or not is_table:
            raise InputError(f"{path} is not a result of an evaluation")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a result of an evaluation") from error
    return result | {"by_context": table}


def evenly(steps: list[int], at_most: int) -> list[int]:
    """At most `at_most` of the steps, evenly spaced, including the first and the last."""
    chosen = np.linspace(0, len(steps) - 1, min(at_most, len(steps))).round().astype(int)
    return [steps[i] for i in chosen]
