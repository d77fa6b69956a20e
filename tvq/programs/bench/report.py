"""Rows of numbers as a table, as Markdown and as a plot."""

import importlib
import importlib.util
import io
import statistics
from typing import Any

import numpy as np
from etils import epath

from tvq import atomic, chips
from tvq.programs.bench.session import STEP, Row, Session

# Every number that a row may have, and its format in a table; the other columns are labels.
COLUMNS = {
    "ms": ".4g", "10 %": ".4g", "90 %": ".4g", "tokens/s": ",.0f", "ns/token": ",.4g", "x full": ".3g",
    "x flash": ".3g", "x step": ".3g", "MFU": ".1%", "compile s": ".3g", "MiB": ",.0f",
}  # fmt: skip


def rows(s: Session, seconds: list[list[float]]) -> list[Row]:
    """A row for each case: median and 10-90 % range of milliseconds a call, and rates from the median."""
    chip = chips.chip(s.mesh.devices.flat[0].device_kind) if s.config.model.dtype == "bfloat16" else None
    rows = []
    for case, times in zip(s.cases, seconds, strict=True):
        middle = statistics.median(times)
        low, high = np.quantile(times, [0.1, 0.9])
        row = {
            **case.labels,
            "ms": 1e3 * middle,
            "10 %": 1e3 * float(low),
            "90 %": 1e3 * float(high),
            "tokens/s": case.n_token / middle,
            "ns/token": 1e9 * middle / case.n_token,
            **case.facts,
        }
        if chip and case.flops:
            row["MFU"] = case.flops * row["tokens/s"] / (chip.bfloat16 * case.n_device)
        rows.append(row)
    eaten = [row["tokens/s"] for row in rows if row.get("work") == STEP]
    baseline = {(row.get("formulation"), row.get("T")): row["tokens/s"] for row in rows}
    for row in rows:
        for name in ("full", "flash"):
            if (name, row.get("T")) in baseline:
                row[f"x {name}"] = row["tokens/s"] / baseline[name, row["T"]]
        if eaten:
            row["x step"] = row["tokens/s"] / eaten[0]
    return rows


def cells(rows: list[Row]) -> list[list[str]]:
    """The header, then a line for each row; columns that no row has are left out."""
    labels = list(dict.fromkeys(name for row in rows for name in row if name not in COLUMNS))
    names = labels + [name for name in COLUMNS if any(name in row for row in rows)]
    show = lambda name, value: "" if value is None else format(value, COLUMNS.get(name, ""))
    return [names, *([show(name, row.get(name)) for name in names] for row in rows)]


def table(rows: list[Row]) -> str:
    """For the terminal."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda line: "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    return "\n".join(map(pad, lines))


def markdown(rows: list[Row]) -> str:
    names, *lines = cells(rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---:"] * len(names), *lines])


def plot(rows: list[Row], path: epath.Path) -> bool:
    """Tokens a second against length, log-log; False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    axis = "T" if "T" in rows[0] else "context"
    curves: dict[str, list[Row]] = {}
    for row in rows:
        names = [str(value) for name, value in row.items() if name not in COLUMNS and name != axis]
        curves.setdefault(" ".join(names), []).append(row)
    figure: Any = importlib.import_module("matplotlib.figure").Figure()
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.loglog([row[axis] for row in curve], [row["tokens/s"] for row in curve], "o-", label=name)
    axes.set(xlabel=f"{axis} (tokens)", ylabel="tokens/s")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    atomic.write(path, content.getvalue())
    return True
