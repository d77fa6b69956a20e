"""What is wrong with a run, in words, and what to change: `tvq doctor`.

It reads the rows of metrics and the codebook snapshots; without a snapshot, the newest checkpoint.
"""

import math
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from tvq import cluster, schema, sharding
from tvq import model as lm
from tvq.errors import InputError
from tvq.programs.report import runs
from tvq.run import describe, health, metrics, records, restore
from tvq.schema import Config

FOUND, FAILED = 1, 4  # exit codes: something is wrong with the run; the doctor itself failed
N_NAMED = 3  # units that a finding names
LEAST_ROWS = 10  # fewer show no trend
DEAD, CROWDED, FAR, RESTLESS, DRIFT = 0.1, 0.5, 0.9, 0.3, 0.2
SPIKE, SPIKE_NATS = 1.25, 0.3  # a loss so many times, and so many nats, over the rows before
SPIKE_NORM = 1.5  # and its gradient
FLAT, RISING, GAP = 0.005, 1.05, 1.2


class Finding(NamedTuple):
    what: str  # where, and the numbers
    remedy: str
    is_lost: bool = False  # the run is lost: all other findings follow from this one


def doctor(config: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Prints what is wrong; returns 0 if nothing is, else FOUND. InputError: there is nothing to read yet.

    A failure of the doctor itself exits with FAILED, not with FOUND as an exception would.
    """
    try:
        return examine(config, workdir, log)
    except InputError:
        raise
    except Exception as error:
        log.say(
            "".join(traceback.format_exception(error)) + "tvq doctor failed; this says nothing about the run"
        )
        raise SystemExit(FAILED) from error


def examine(config: Config, workdir: epath.Path, log: cluster.Log) -> int:
    console = metrics.Console()
    path = workdir / records.FILE
    rows, broken = runs.read_rows(path) if path.exists() else ([], [])
    snapshot, step = newest_snapshot(config, workdir, bool(rows), console.say, broken)
    findings = all_findings(config, rows, snapshot)
    last = f"{rows[-1]['step']:,}" if rows else "none"
    seen = f"codebooks of step {step:,}" if snapshot else "no codebooks"
    console.say(f"{workdir}: rows to step {last}, {seen}")
    for line in broken:
        console.say(f"left out: {line}")
    for i, finding in enumerate(findings):
        console.say(f"{i + 1}. {finding.what}\n   {finding.remedy}")
    if not findings:
        console.say("nothing is wrong that can be seen from here")
    return FOUND if findings else 0


def newest_snapshot(
    config: Config, workdir: epath.Path, has_rows: bool, say: Callable[[str], None], broken: list[str]
) -> tuple[dict[str, np.ndarray], int]:
    """The newest readable snapshot, or the use of codes in the newest checkpoint, and its step.

    Nothing if there are only rows; `broken` gets a line for each that cannot be read. InputError: there is
    nothing at all.
    """
    for step in reversed(health.steps(workdir / health.FOLDER)):
        try:
            return runs.read_snapshot(workdir, step), step
        except InputError as error:
            broken.append(str(error))
    try:
        restored = restore.weights(config, workdir, sharding.make(schema.Mesh(), jax.devices()[:1]), say)
    except InputError as error:
        if not has_rows:
            raise
        broken.append(str(error))
        return {}, 0
    initial = config.model.c_gamma**restored.step
    return jax.device_get(lm.use(restored.state.weights, initial)), restored.step


def all_findings(
    config: Config, rows: Sequence[metrics.Row], snapshot: dict[str, np.ndarray]
) -> list[Finding]:
    findings = list(of_rows(config, rows))
    return findings if any(f.is_lost for f in findings) else [*findings, *of_codebooks(config, snapshot)]


def of_rows(config: Config, rows: Sequence[metrics.Row]) -> Iterator[Finding]:
    trained = [row for row in rows if row["split"] == "train" and "grad_norm" in row]
    broken = next((row["step"] for row in trained if row["loss"] is None or row["grad_norm"] is None), None)
    if broken is not None:
        yield Finding(
            f"the loss or its gradient is not a number at step {broken}",
            "resume from the checkpoint before, with a lower config.optimizer.lr_max or grad_clip",
            is_lost=True,
        )
        return
    newest = [row["loss"] for row in trained[-5:]]
    if newest and metrics.has_diverged(median(newest), config.model.n_vocab):
        yield Finding(
            f"the loss is {newest[-1]:.4g} at step {trained[-1]['step']:,}, worse than the"
            f" {math.log(config.model.n_vocab):.3f} of guessing",
            f"it has diverged: lower config.optimizer.lr_max {config.optimizer.lr_max:g}, in another workdir",
            is_lost=True,
        )
        return
    yield from (Finding(f"the schedule: {what}", remedy) for what, remedy in describe.of_schedule(config))
    settled = [row for row in trained if row["step"] > config.optimizer.n_warmup_step]
    yield from of_spikes(config, trained)
    if len(settled) >= LEAST_ROWS:
        yield from of_trend(config, settled)
        yield from of_clipping(config, settled)
    yield from of_evaluations(rows)
    if trained:
        yield from of_time(trained[-1])


def of_spikes(config: Config, trained: Sequence[metrics.Row]) -> Iterator[Finding]:
    """Losses far above those before, with a high gradient or neighbour too: else it is a hard batch."""
    losses, norms = ([row[name] for row in trained] for name in ("loss", "grad_norm"))
    usual = lambda values, i: median(values[i - 5 : i])
    heights = {i: losses[i] - usual(losses, i) for i in range(5, len(losses))}
    high = {i for i, height in heights.items() if height > max(SPIKE_NATS, (SPIKE - 1) * usual(losses, i))}
    spikes = [i for i in high if norms[i] > SPIKE_NORM * usual(norms, i) or high & {i - 1, i + 1}]
    if spikes:
        i = max(spikes, key=heights.__getitem__)
        o, clip = config.optimizer, float(f"{1.5 * median(norms):.2g}")
        is_tighter = not 0 < o.grad_clip <= clip
        yield Finding(
            f"the loss spikes in {len(spikes)} of {len(losses)} rows: at step {trained[i]['step']:,} it is"
            f" {losses[i]:.3f}, {heights[i]:.3f} above the rows before",
            f"lower config.optimizer.lr_max {o.lr_max:g}, or raise config.optimizer.n_warmup_step"
            f" {o.n_warmup_step}" + (f", or set config.optimizer.grad_clip={clip:g}" if is_tighter else ""),
        )


def of_trend(config: Config, settled: Sequence[metrics.Row]) -> Iterator[Finding]:
    third = len(settled) // 3
    thirds = [settled[:third], settled[third:-third], settled[-third:]]
    first, middle, last = (median(row["loss"] for row in part) for part in thirds)
    span = f"over steps {settled[0]['step']:,} to {settled[-1]['step']:,}"
    if last > RISING * min(first, middle):
        yield Finding(
            f"the loss rises {span}: {min(first, middle):.3f}, then {last:.3f}",
            f"the run is diverging: lower config.optimizer.lr_max {config.optimizer.lr_max:g}",
        )
    elif first - last < FLAT * first:
        yield Finding(
            f"the loss is flat {span}: {first:.3f}, then {last:.3f}",
            f"raise config.optimizer.lr_max {config.optimizer.lr_max:g}, or stop: it has learnt what it can",
        )


def of_clipping(config: Config, settled: Sequence[metrics.Row]) -> Iterator[Finding]:
    norms, clip = [row["grad_norm"] for row in settled], config.optimizer.grad_clip
    if 0 < clip < min(norms):
        yield Finding(
            f"the gradient is clipped in every row: its norm is {median(norms):.2g}, the limit {clip:g}",
            f"unless that is meant, set config.optimizer.grad_clip={2 * median(norms):.2g}",
        )


def of_evaluations(rows: Sequence[metrics.Row]) -> Iterator[Finding]:
    valued = [row for row in rows if row["loss"] is not None]
    scores = [row for row in valued if row["split"] not in ("train", "test")]
    losses = [row["loss"] for row in valued if row["split"] == "train"][-5:]
    if not scores or not losses:
        return
    best, last, seen = min(scores, key=lambda row: row["loss"]), scores[-1], median(losses)
    if last["loss"] > GAP * seen:
        yield Finding(
            f"the {last['split']} loss is {last['loss']:.3f} at step {last['step']:,}, the training loss"
            f" {seen:.3f}; the lowest was {best['loss']:.3f} at step {best['step']:,}",
            "it is overfitting: use more data, more dropout (config.model.p_dropres), or fewer steps",
        )


def of_time(row: metrics.Row) -> Iterator[Finding]:
    seconds = {
        name.removeprefix("seconds_"): x or 0.0 for name, x in row.items() if name.startswith("seconds_")
    }
    total = sum(seconds.values())
    for kind, (share, remedy) in describe.SLOW.items():
        if total >= describe.LEAST_SECONDS and seconds.get(kind, 0.0) > share * total:
            yield Finding(
                f"{seconds[kind] / total:.0%} of the time went into {kind}".replace("%", " %"), remedy
            )


def of_codebooks(config: Config, snapshot: dict[str, np.ndarray]) -> Iterator[Finding]:
    """`snapshot` is the result of `lm.snapshot`, or of `lm.use` alone, or nothing."""
    if not snapshot:
        return
    m, o = config.model, config.optimizer
    crowded_NHS = np.where(snapshot["usage"] > lm.OVERUSED, snapshot["usage"], 0.0)
    yield from over(
        snapshot["dead"], DEAD, f"{{:.0%}} of {m.n_code} codes are dead", more_even(config, snapshot)
    )
    yield from over(
        crowded_NHS.sum(-1) / m.n_code,
        CROWDED,
        f"{{:.0%}} of the keys choose codes used over {lm.OVERUSED:g} times an even share",
        more_even(config, snapshot),
    )
    if "churn" not in snapshot:
        return
    yield from over(
        snapshot["relative_error"],
        FAR,
        "keys are {:.2f} of their norm from their codeword",
        f"raise config.model.n_code {m.n_code} or config.model.c_beta {m.c_beta:g}",
    )
    revival = f"raise config.model.revive_codes {m.revive_codes}, " if m.revive_codes else ""
    yield from over(
        snapshot["churn"],
        RESTLESS,
        "{:.0%} of the keys have another code than at the last snapshot",
        f"codewords move too much: {revival}raise config.model.c_gamma {m.c_gamma:g}, or lower"
        f" config.optimizer.lr_max {o.lr_max:g}",
    )
    if "norm_drift" not in snapshot:
        return
    yield from over(
        abs(snapshot["norm_drift"]),
        DRIFT,
        "the norm of the codewords has changed by {:.0%} since the last snapshot",
        f"codewords diverge or vanish: lower config.optimizer.lr_max {o.lr_max:g}",
    )


def more_even(config: Config, snapshot: dict[str, np.ndarray]) -> str:
    """What to do about codes that are hardly used."""
    m, t = config.model, config.train
    # In this many updates a code with a hundredth of an even share is chosen about once.
    n = max(20, t.sequence_len // t.update_len, 100 * m.n_code // (t.global_batch_size * t.update_len))
    n = min(n, m.revive_codes // 2) if m.revive_codes else n
    used = float(np.median(snapshot["perplexity"]))
    enough = 2 ** round(math.log2(2 * used)) if 1 <= used < m.n_code else m.n_code
    fewer = f", or config.model.n_code={enough}" if enough < m.n_code else ""
    return f"in a new run, set config.model.revive_codes={n}{fewer}"


def over(values_NH: np.ndarray, limit: float, what: str, remedy: str) -> Iterator[Finding]:
    """One finding for all units and heads beyond the limit, including those that are not a number."""
    places = [tuple(place) for place in np.argwhere(~(values_NH <= limit))]
    if places:
        places.sort(key=lambda place: -values_NH[place])
        number = re.search(r"\{.*\}", what)[0]  # type: ignore[index]
        where = [f"unit {i + 1}, head {h + 1}" for i, h in places[:N_NAMED]]
        more = [
            f"{number.format(values_NH[place])} in {name}" for place, name in zip(places, where, strict=False)
        ]
        rest = [f"too much in {len(places) - N_NAMED} more"] if len(places) > N_NAMED else []
        text = "; ".join([f"{what.format(values_NH[places[0]])} in {where[0]}", *more[1:], *rest])
        yield Finding(text.replace("%", " %"), remedy)
