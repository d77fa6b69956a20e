"""The pictures of a report: each takes runs and returns a figure, or None where they have nothing of it."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tvq.metrics import KINDS
from tvq.report.runs import Run, evenly

MAX_UNITS = 12  # of a picture of codebooks
# From what is used to what is lost; a colour for each of metrics.KINDS.
COLOURS = dict(
    zip(
        KINDS,
        ("#2a9d57", "#e07b39", "#7e6fc4", "#4a90c2", "#d176a8", "#c9a227", "#9a9a9a", "#c0453b"),
        strict=True,
    )
)


def loss(runs: Sequence[Run]) -> Any:
    """Bits a byte of training and of evaluations."""
    unit = "byte" if all(len(run.column("bits_per_byte")[0]) for run in runs) else "token"
    figure, axes = panels(1, 4.2)
    highest, lowest = 0.0, np.inf
    for i, run in enumerate(runs):
        steps, bits = run.column(f"bits_per_{unit}")
        axes[0].plot(steps, bits, color=f"C{i}", linewidth=1.2, label=f"{run.name}, training")
        highest = max([highest, *bits[len(bits) // 20 :]])
        lowest = min([lowest, *bits])
        for split, mark in zip(run.splits(), "osD^v", strict=False):
            at, values = run.column(f"bits_per_{unit}", split)
            axes[0].plot(at, values, mark + "--", color=f"C{i}", markersize=5, label=f"{run.name}, {split}")
            highest = max(highest, *values)
    axes[0].set(ylabel=f"bits a {unit}", xlabel="parameter updates")
    if highest > 20 * lowest:  # it diverged
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(in_full())
    elif highest:
        axes[0].set_ylim(top=1.04 * highest)  # the very first updates would press the rest together
    axes[0].legend()
    return figure


def speed(runs: Sequence[Run]) -> Any:
    """Tokens a second, what share of the devices' peak that is, and the wait for data."""
    columns = {
        "tokens_per_second": "tokens/s",
        "model_flops_use": "% of peak FLOP/s",
        "data_wait": "% data wait",
    }
    return curves(runs, columns, percent=("model_flops_use", "data_wait"))


def optimizer(runs: Sequence[Run]) -> Any:
    columns = {"learning_rate": "learning rate", "grad_norm": "norm of the gradient"}
    return curves(runs, columns, log=("grad_norm",))


def curves(
    runs: Sequence[Run], columns: dict[str, str], log: Sequence[str] = (), percent: Sequence[str] = ()
) -> Any:
    """A panel a column that some run has, against parameter updates."""
    there = [name for name in columns if any(len(run.column(name)[0]) for run in runs)]
    if not there:
        return None
    figure, axes = panels(len(there), 2.4)
    for name, ax in zip(there, axes, strict=True):
        for i, run in enumerate(runs):
            steps, values = run.column(name)
            factor = 100 if name in percent else 1
            ax.plot(steps, factor * values, color=f"C{i}", linewidth=1.2, label=run.name)
        ax.set_ylabel(columns[name])
        if name in log:
            ax.set_yscale("log", subs=[2, 5])
            ax.yaxis.set_major_formatter(in_full())
            ax.yaxis.set_minor_formatter(in_full())
        else:
            ax.set_ylim(bottom=0)
    axes[0].legend()
    axes[-1].set_xlabel("parameter updates")
    return figure


def time(runs: Sequence[Run]) -> Any:
    """What the wall time of each run went into; the share of steps is the goodput."""
    there = [run for run in runs if run.spent()]
    if not there:
        return None
    figure, axes = panels(1, 1.3 + 0.45 * len(there))
    left = np.zeros(len(there))
    for kind in KINDS:
        shares = [100 * run.spent().get(kind, 0.0) / sum(run.spent().values()) for run in there]
        bars = axes[0].barh(range(len(there)), shares, left=left, color=COLOURS[kind], label=kind)
        axes[0].bar_label(
            bars, [f"{s:.0f} %" if s >= 4 else "" for s in shares], label_type="center", color="white"
        )
        left += shares
    axes[0].set_yticks(range(len(there)), [run.name for run in there])
    axes[0].invert_yaxis()
    axes[0].set(xlim=(0, 100), xlabel="% of the wall time")
    axes[0].grid(False)
    figure.legend(ncols=len(KINDS), loc="outside upper center", frameon=False)
    return figure


def lengths(runs: Sequence[Run]) -> Any:
    """Loss against the number of tokens before, from the last evaluation that carried whole documents."""
    figure, axes = panels(1, 3.6)
    for i, run in enumerate(runs):
        for (split, table), mark in zip(run.contexts.items(), "osD^v", strict=False):
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
    """Use of each code over time, a panel a unit; codes in the order of their last use, heads together."""
    if not run.looks:
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
    for ax in list(grid.flat)[len(shown) :]:
        ax.set_visible(False)
    for ax in list(grid.flat)[len(shown) - n_column : len(shown)]:
        ax.tick_params(labelbottom=True)  # where there is none below
    figure.supxlabel("parameter updates", fontsize=10)
    figure.supylabel("codes, the most used at the end on top", fontsize=10)
    bar = figure.colorbar(image, ax=grid, ticks=[-2, -1, 0, 1], fraction=0.03)
    bar.ax.set_yticklabels(["1/100 or less", "1/10", "1: all alike", "10 or more"])
    bar.set_label("use of a code, in even shares")
    return figure


def perplexity(run: Run) -> Any:
    """How many codes each unit uses over time, the mean of its heads."""
    if not run.looks:
        return None
    steps, found_XNH = stacked(run, "perplexity")
    N, n_code = found_XNH.shape[1], stacked(run, "usage")[1].shape[-1]
    figure, axes = panels(1, 1.6 + 0.16 * N)
    extent = (steps[0], steps[-1] + (len(steps) == 1), N + 0.5, 0.5)
    image = heat(axes[0], found_XNH.mean(-1).T, extent, cmap="viridis", vmin=1, vmax=n_code)
    axes[0].set(xlabel="parameter updates", ylabel="unit", yticks=evenly(list(range(1, N + 1)), 12))
    figure.colorbar(image, ax=axes[0]).set_label(f"perplexity, of {n_code}")
    return figure


def health(run: Run) -> Any:
    """Dead codes, error and churn over time: the median and the range of all units and heads."""
    names = {
        "dead": "% dead codes", "relative_error": "relative error", "churn": "% churn of keys",
    }  # fmt: skip
    if not run.looks:
        return None
    figure, axes = panels(len(names), 2.2)
    for (name, label), ax in zip(names.items(), axes, strict=True):
        steps, found_XNH = stacked(run, name)
        found_XC = found_XNH.reshape(len(steps), -1) * (100 if label.startswith("%") else 1)
        ax.fill_between(steps, found_XC.min(1), found_XC.max(1), alpha=0.25, label="all units")
        ax.plot(steps, np.median(found_XC, 1), label="median unit")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[0].legend()
    axes[-1].set_xlabel("parameter updates")
    return figure


def stacked(run: Run, name: str) -> tuple[list[int], np.ndarray]:
    """(steps, one array of all looks)."""
    return list(run.looks), np.stack([look[name] for look in run.looks.values()])


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
    "perplexity": ("Codes in use", perplexity),
    "codes": ("Use of each code", codes),
    "health": ("Health of codebooks", health),
}


def new_figure(height: float) -> Any:
    return importlib.import_module("matplotlib.figure").Figure(figsize=(9, height), layout="constrained")


def panels(n: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of n panels below one another, which share their x axis; each `height` inches."""
    figure = new_figure(n * height)
    axes = figure.subplots(n, squeeze=False, sharex=True)[:, 0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_formatter(in_full())
        ax.yaxis.set_major_formatter(in_full())
    return figure, list(axes)


def in_full() -> Any:
    """Numbers without powers of ten."""
    return importlib.import_module("matplotlib.ticker").FuncFormatter(lambda x, _: f"{x:,.6g}")
