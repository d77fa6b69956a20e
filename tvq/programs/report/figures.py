"""The pictures of a report: each takes runs and returns a figure, or None if they have no data for it."""

import importlib
import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tvq.programs.report.runs import Run, evenly, loss_unit
from tvq.run.metrics import KINDS

MAX_UNITS = 12  # in a picture of codebooks
MAX_MARKS = 25  # on a curve: more would run into each other
WORSE = 20  # times the lowest of all: a linear axis would hide all other differences
# From useful to lost time; a colour for each of metrics.KINDS.
COLOURS = dict(
    zip(
        KINDS,
        ("#2a9d57", "#e07b39", "#7e6fc4", "#4a90c2", "#d176a8", "#c9a227", "#9a9a9a", "#c0453b"),
        strict=True,
    )
)


def loss(runs: Sequence[Run]) -> Any:
    """Bits a byte of training and of evaluations. Runs that diverged are not scaled to, if others did not."""
    column = f"bits_per_{loss_unit(runs)}"
    figure, axes = panels(1, 4.2)
    training = [run.column(column) for run in runs]
    lowest = min((bits.min() for _, bits in training if len(bits)), default=0.0)
    has_diverged = [bool(len(bits)) and bits[-1] > WORSE * lowest for _, bits in training]
    highest = 0.0
    for i, (run, (steps, bits)) in enumerate(zip(runs, training, strict=True)):
        leaves = has_diverged[i] and not all(has_diverged)
        name = f"{run.name}, " if len(runs) > 1 else ""
        label = f"{name}training" + (": diverged, far above" if leaves else "")
        line(axes[0], steps, bits, color=f"C{i}", label=label)
        shown = list(bits[len(bits) // 20 :])
        for split, mark in zip(run.splits(), "osD^v", strict=False):
            at, values = run.column(column, split)
            label = "" if leaves else f"{name}{split}"
            marks = {"markersize": 5, "markevery": evenly(list(range(len(at))), MAX_MARKS)}
            axes[0].plot(at, values, mark + "--", color=f"C{i}", label=label, **marks)
            shown += list(values)
        highest = highest if leaves else max([highest, *shown])
        lowest = min([lowest, *shown])
    axes[0].set(ylabel=f"bits a {loss_unit(runs)}", xlabel="parameter updates")
    if highest > WORSE * lowest:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(in_full())
    elif highest:
        # The very first updates would flatten the rest.
        axes[0].set_ylim(lowest - 0.04 * (highest - lowest) - 0.01, 1.04 * highest)
    axes[0].legend()
    return figure


def speed(runs: Sequence[Run]) -> Any:
    """Tokens a second, the share of the devices' peak, and the wait for data."""
    columns = {
        "tokens_per_second": "tokens/s",
        "model_flops_use": "% of peak FLOP/s",
        "data_wait": "% data wait",
    }
    return curves(runs, columns, percent=("model_flops_use", "data_wait"))


def optimizer(runs: Sequence[Run]) -> Any:
    columns = {"learning_rate": "learning rate", "grad_norm": "norm of the gradient"}
    tops = [max(rates) for run in runs if len(rates := run.column("learning_rate")[1])]
    is_wide = bool(tops) and max(tops) > WORSE * min(tops)
    return curves(runs, columns, log=("grad_norm", "learning_rate") if is_wide else ("grad_norm",))


def curves(
    runs: Sequence[Run], columns: dict[str, str], log: Sequence[str] = (), percent: Sequence[str] = ()
) -> Any:
    """A panel for each column that some run has, against parameter updates."""
    there = [name for name in columns if any(len(run.column(name)[0]) for run in runs)]
    if not there:
        return None
    figure, axes = panels(len(there), 2.4)
    for name, ax in zip(there, axes, strict=True):
        for i, run in enumerate(runs):
            steps, values = run.column(name)
            factor = 100 if name in percent else 1
            line(ax, steps, factor * values, color=f"C{i}", label=run.name)
        ax.set_ylabel(columns[name])
        if name in log:
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set_major_formatter(in_full())
            ax.yaxis.set_minor_formatter(in_full())
        else:
            ax.set_ylim(bottom=0)
    if len(runs) > 1:
        axes[0].legend()
    axes[-1].set_xlabel("parameter updates")
    return figure


def time(runs: Sequence[Run]) -> Any:
    """How each run spent its wall time; the share of steps is the goodput."""
    there = [run for run in runs if run.spent()]
    if not there:
        return None
    figure, axes = panels(1, 1.3 + 0.45 * len(there))
    left = np.zeros(len(there))
    for kind in KINDS:
        shares = [100 * run.spent().get(kind, 0.0) / sum(run.spent().values()) for run in there]
        bars = axes[0].barh(range(len(there)), shares, left=left, color=COLOURS[kind], label=kind)
        axes[0].bar_label(
            bars, [f"{s:.0f} %" if s >= 6 else "" for s in shares], label_type="center", color="white"
        )
        left += shares
    axes[0].set_yticks(range(len(there)), [textwrap.fill(run.name, 24) for run in there])
    axes[0].invert_yaxis()
    axes[0].set(xlim=(0, 100), xlabel="% of the wall time")
    axes[0].grid(False)
    figure.legend(ncols=len(KINDS), loc="outside upper center", frameon=False)
    return figure


def lengths(runs: Sequence[Run]) -> Any:
    """Loss against the number of tokens before, from the last evaluation that carried whole documents."""
    figure, axes = panels(1, 3.6)
    for i, run in enumerate(runs):
        for (split, table), mark in zip(run.contexts.items(), itertools.cycle("osD^v"), strict=False):
            middle = [(row["context_from"] + row["context_to"]) / 2 + 1 for row in table]
            label = f"{run.name}, {split}"
            axes[0].plot(middle, [row["loss"] for row in table], mark + "-", color=f"C{i}", label=label)
    if not axes[0].lines:
        return None
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_formatter(in_full())
    axes[0].set(xlabel="position in the document (tokens)", ylabel="loss (nats a token)")
    axes[0].legend()
    return figure


def codes(run: Run) -> Any:
    """Use of each code over time, a panel for each unit; codes ordered by their last use, heads together."""
    if not run.snapshots:
        return None
    steps, usage_XNHS = stacked(run, "usage")
    N = usage_XNHS.shape[1]
    shown = evenly(list(range(N)), MAX_UNITS)
    n_row = -(-len(shown) // 4)
    n_column = -(-len(shown) // n_row)
    figure = new_figure(2.3 * n_row + 0.9)
    grid = figure.subplots(n_row, n_column, squeeze=False, sharex=True, sharey=True)
    for unit, ax in zip(shown, grid.flat, strict=False):
        usage_XC = usage_XNHS[:, unit].reshape(len(steps), -1)
        order = np.argsort(-usage_XC[-1], kind="stable")
        shades_CX = np.log10(np.maximum(usage_XC[:, order].T, 1e-2))
        extent = (steps[0], steps[-1] + (len(steps) == 1), len(order), 0)
        image = heat(ax, shades_CX, extent, cmap="magma", vmin=-2, vmax=1)
        ax.set_title(f"unit {unit + 1} of {N}", fontsize=9)
        ax.locator_params(axis="x", nbins=3, integer=True)
        ax.xaxis.set_major_formatter(in_full())
    for ax in list(grid.flat)[len(shown) :]:
        ax.set_visible(False)
    for ax in list(grid.flat)[len(shown) - n_column : len(shown)]:
        ax.tick_params(labelbottom=True)  # if no panel is below
    figure.supxlabel("parameter updates", fontsize=10)
    figure.supylabel("codes, the most used at the end on top", fontsize=10)
    bar = figure.colorbar(image, ax=grid, ticks=[-2, -1, 0, 1], fraction=0.03)
    bar.ax.set_yticklabels(["1/100 or less", "1/10", "1", "10 or more"])
    bar.set_label("use of a code (1: its even share)")
    return figure


def perplexity(run: Run) -> Any:
    """How many codes each unit uses over time, the mean of its heads."""
    if not run.snapshots:
        return None
    steps, perplexity_XNH = stacked(run, "perplexity")
    N, n_code = perplexity_XNH.shape[1], stacked(run, "usage")[1].shape[-1]
    figure, axes = panels(1, 1.6 + 0.16 * N)
    extent = (steps[0], steps[-1] + (len(steps) == 1), N + 0.5, 0.5)
    image = heat(axes[0], perplexity_XNH.mean(-1).T, extent, cmap="viridis", vmin=1, vmax=n_code)
    axes[0].set(xlabel="parameter updates", ylabel="unit", yticks=evenly(list(range(1, N + 1)), 12))
    figure.colorbar(image, ax=axes[0]).set_label(f"codes, of {n_code}")
    return figure


def health(run: Run) -> Any:
    """Dead codes, error and churn over time: the median and the range of all units and heads."""
    names = {
        "dead": "% dead codes", "relative_error": "relative error", "churn": "% churn of keys",
    }  # fmt: skip
    if not run.snapshots:
        return None
    figure, axes = panels(len(names), 2.2)
    for (name, label), ax in zip(names.items(), axes, strict=True):
        steps, values_XNH = stacked(run, name)
        values_XC = values_XNH.reshape(len(steps), -1) * (100 if label.startswith("%") else 1)
        ax.fill_between(steps, values_XC.min(1), values_XC.max(1), alpha=0.25, label="range of all units")
        line(ax, steps, np.median(values_XC, 1), label="median unit")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[0].legend()
    axes[-1].set_xlabel("parameter updates")
    return figure


def stacked(run: Run, name: str) -> tuple[list[int], np.ndarray]:
    """(steps, one array of all snapshots)."""
    return list(run.snapshots), np.stack([snapshot[name] for snapshot in run.snapshots.values()])


def line(ax: Any, steps: Sequence[int] | np.ndarray, values: np.ndarray, **how: Any) -> None:
    """A curve, or a dot if it has only one point."""
    ax.plot(steps, values, linewidth=1.2, marker="o" if len(steps) == 1 else None, **how)


def heat(ax: Any, shades_YX: np.ndarray, extent: tuple, **colours: Any) -> Any:
    ax.grid(False)
    return ax.imshow(shades_YX, aspect="auto", interpolation="nearest", extent=extent, **colours)


# Of all runs together: the title and what it shows.
TOGETHER: dict[str, tuple[str, Callable[[Sequence[Run]], Any]]] = {
    "loss": ("Loss", loss),
    "speed": ("Speed", speed),
    "time": ("Where the time went", time),
    "optimizer": ("Learning rate and gradient", optimizer),
    "lengths": ("Loss against length", lengths),
}
# Of each run.
EACH: dict[str, tuple[str, Callable[[Run], Any]]] = {
    "perplexity": ("Codes in use (perplexity)", perplexity),
    "codes": ("Use of each code", codes),
    "health": ("Health of codebooks", health),
}


def new_figure(height: float) -> Any:
    return importlib.import_module("matplotlib.figure").Figure(figsize=(9, height), layout="constrained")


def panels(n: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of n panels, one below the other, with a shared x axis; each `height` inches high."""
    figure = new_figure(n * height)
    axes = figure.subplots(n, squeeze=False, sharex=True)[:, 0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.locator_params(axis="x", integer=True)
        ax.xaxis.set_major_formatter(in_full())
        ax.yaxis.set_major_formatter(in_full())
    return figure, list(axes)


def in_full() -> Any:
    """Numbers without powers of ten."""
    return importlib.import_module("matplotlib.ticker").FuncFormatter(lambda x, _: f"{x:,.6g}")
