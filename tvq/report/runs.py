"""What a run has left in its workdir, read as far as it is there."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tvq import config, health
from tvq.errors import InputError
from tvq.metrics import Row
from tvq.records import FILE, SAMPLES, Sample, samples

MAX_LOOKS = 120  # at the codebooks, evenly over the run: more cannot be told apart in a picture
MAX_SAMPLES = 8


class Run(NamedTuple):
    name: str
    rows: list[Row]
    config: dict[str, Any]  # {"section.field": value}
    looks: dict[int, dict[str, np.ndarray]]  # at the codebooks, by step: the arrays of tvq/health.py
    samples: dict[int, Sample]
    contexts: dict[str, list[Row]]  # {split: the newest table by context, of tvq eval --carry}

    def column(self, name: str, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the rows of a split that have a number there."""
        found = [(r["step"], r[name]) for r in self.rows if r["split"] == split and is_number(r.get(name))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.asarray(steps), np.asarray(values, float)

    def splits(self) -> list[str]:
        """Those that were evaluated."""
        return sorted({r["split"] for r in self.rows} - {"train"})

    def spent(self) -> dict[str, float]:
        """Seconds by what they went into, up to the last row."""
        last: Mapping = next((r for r in reversed(self.rows) if "seconds_step" in r), {})
        return {k.removeprefix("seconds_"): v for k, v in last.items() if k.startswith("seconds_")}


def loss_unit(runs: Sequence[Run]) -> str:
    """What their losses are bits of: a byte, or a token where that is not known."""
    return "byte" if all(len(run.column("bits_per_byte")[0]) for run in runs) else "token"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def read(workdirs: list[str]) -> list[Run]:
    """InputError: a folder holds no run, or one that has written no row yet."""
    paths = [epath.Path(workdir) for workdir in workdirs]
    names = [path.name for path in paths]
    return [
        _read(path, str(path) if names.count(path.name) > 1 else path.name)
        for path in dict.fromkeys(paths)  # one that is named twice is one
    ]


def _read(workdir: epath.Path, name: str) -> Run:
    if not (workdir / config.FILE).exists():
        raise InputError(f"--workdir={workdir} holds no run: there is no {workdir / config.FILE}")
    if not (workdir / FILE).exists():
        raise InputError(f"--workdir={workdir} has no {FILE} yet; let it train a while")
    # A run that is under way may have written half of its last line.
    lines = (workdir / FILE).read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise InputError(f"{workdir / FILE} has no row yet; let it train a while")
    looked, drawn = health.steps(workdir / health.FOLDER), samples(workdir / SAMPLES)
    return Run(
        name,
        rows,
        config.flatten(config.recorded(workdir / config.FILE).to_dict()),
        {step: health.load(workdir / health.FOLDER, step) for step in evenly(looked, MAX_LOOKS)},
        {step: _sample(drawn[step]) for step in evenly(list(drawn), MAX_SAMPLES)},
        _contexts(workdir / "evaluations"),
    )


def _sample(path: epath.Path) -> Sample:
    return path.read_text() if path.suffix == ".txt" else path.read_bytes()


def _contexts(folder: epath.Path) -> dict[str, list[Row]]:
    paths = list(folder.iterdir()) if folder.exists() else []
    found = [json.loads(path.read_text()) for path in paths if path.suffix == ".json"]
    by_step = sorted((f for f in found if f.get("by_context")), key=lambda f: f["step"])
    return {f["split"]: f["by_context"] for f in by_step}


def evenly(steps: list[int], at_most: int) -> list[int]:
    """Of more than `at_most`, some at even distances, the first and last among them."""
    chosen = np.linspace(0, len(steps) - 1, min(at_most, len(steps))).round().astype(int)
    return [steps[i] for i in chosen]
