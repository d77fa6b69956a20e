"""A training run from top to bottom: the file to read first."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tvq import cluster, config, evaluate, mesh, metrics, optimizer, sample, state, train_step
from tvq.checkpoint import Checkpoints
from tvq.config import Config
from tvq.data import vocabulary
from tvq.data.corpus import AnyCorpus, open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches
from tvq.state import TrainState

# What a start leaves in a workdir that was killed before it was a run.
STARTED = ("logs", f"{config.FILE}.tmp")

# Metrics that end a run when they are not a number.
WATCHED = {
    "loss_lm_per_token_unscaled": "loss",
    "grad_norm": "norm of the gradient",
    "param_norm": "norm of the updated parameters",
}


class DivergedError(RuntimeError):
    """Loss or gradient is no longer a number."""


class StopAskedError(Exception):
    """An evaluation was given up, at the same batch in all processes, because a stop was asked for."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run work with."""

    config: Config
    workdir: epath.Path
    corpus: AnyCorpus
    devices: Mesh
    processes: cluster.Processes
    watchdog: cluster.Watchdog
    console: metrics.Console
    checkpoints: Checkpoints
    rows: metrics.JsonlWriter | None  # on the main process

    def write(self, row: metrics.Row) -> None:
        if self.rows is not None:
            self.rows.write(row)


def train(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Trains until `train.steps`, going on from the newest checkpoint in `workdir`; returns the exit code.

    ValueError: the input is wrong; nothing has been written then. DivergedError: the loss is not a number;
    the last good checkpoint is kept.
    """
    corpus = open_corpus(c.data)
    evaluate.check_vocabulary(corpus, c.model)
    sequences = Sequences(corpus, "train", c.train.sequence_len)
    sequences[0]  # tokens of another vocabulary are an error now, not once there is a run
    if c.evaluate.every:
        corpus.info(c.evaluate.split)  # an empty split is an error now, not after hours
    check_workdir(workdir, c)
    processes = cluster.start(place, c.cluster, config.common(c), log.say)
    devices = mesh.make(c.mesh, jax.devices())
    mesh.check_batch(devices, "train.global_batch_size", c.train.global_batch_size)
    mesh.check_batch(devices, "evaluate.batch_size", evaluate.batch_size(c))
    tx = optimizer.make(c.optimizer)
    if processes.is_main:
        record(workdir, c)  # first: a start that is killed from here on leaves a run

    with contextlib.ExitStack() as stack:
        console = stack.enter_context(metrics.Console(quiet=not processes.is_main))
        watchdog = stack.enter_context(cluster.Watchdog(processes, c.cluster, log))
        watchdog.beat("restore", 0, c.cluster.compile_timeout)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=c.checkpoint.keep, keep_every=c.checkpoint.keep_every)
        )
        now, step, seconds = resume(c, corpus, devices, tx, checkpoints, console.say)
        # Process 0 wrote the config before the restore: who does not see it has another folder of that name.
        shared = {f"{config.FILE} in --workdir, which all must share": (workdir / config.FILE).exists()}
        processes.agree("run", {"checkpoint step": step, "data": corpus.fingerprint} | shared)
        rows = None
        if processes.is_main:
            rows = stack.enter_context(
                contextlib.closing(metrics.JsonlWriter(workdir / "metrics.jsonl", step))
            )
        # The stop that made this checkpoint may have left out the evaluation of its step.
        missed = is_evaluated(c, step) and rows is not None and c.evaluate.split not in rows.splits
        missed = processes.gather("missed evaluation", missed)[0]
        run = Run(c, workdir, corpus, devices, processes, watchdog, console, checkpoints, rows)
        console.say(describe(run, now, step))
        if step < c.train.steps or missed:
            update = compile_step(run, now, tx)
            try:
                now, stopped = loop(run, now, step, seconds, update, sequences, missed)
            except DivergedError as error:
                raise DivergedError(f"{error}; {way_out(run)}") from error
            finish(run, now, stopped)
        else:
            stopped = False
            console.say(f"step {step} of config.train.steps {c.train.steps} is done; raise it to go on")
    processes.finish()
    return cluster.EXIT_STOPPED if stopped else 0


def check_workdir(workdir: epath.Path, c: Config) -> None:
    """ValueError if the folder holds another run, or something that is no run."""
    path = workdir / config.FILE
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is not a folder; use another")
    if path.exists():
        differing = config.differences(config.recorded(path), config.to_dict(c))
        if differing:
            raise ValueError(
                f"--workdir={workdir} holds a run with another config; go on with that one's,"
                " or use another workdir:\n  " + "\n  ".join(differing)
            )
    elif workdir.exists() and any(path.name not in STARTED for path in workdir.iterdir()):
        raise ValueError(f"--workdir={workdir} is not empty and holds no run; use another folder")


def resume(
    c: Config,
    corpus: AnyCorpus,
    devices: Mesh,
    tx: Any,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
) -> tuple[TrainState, int, float]:
    """State, step and train seconds of the newest whole checkpoint; of a new run where there is none.

    The data position needs no restoring: batch t is a function of (seed, t).
    """
    abstract = mesh.with_sharding(devices, state.abstract(c.model, tx))
    restored = checkpoints.restore(abstract, say)
    if restored is None:
        whole = mesh.sharding(devices, mesh.WHOLE)
        init = jax.jit(lambda: state.init(c.model, tx, c.train.seed), out_shardings=whole)
        return init(), 0, 0.0
    evaluate.check_same_vocabulary(corpus, restored)
    if restored.data["fingerprint"] not in (None, corpus.fingerprint):  # None: weights from elsewhere
        raise ValueError(
            f"the data in {corpus.folder} is not what checkpoint {restored.step} was trained on;"
            " set config.data to that, or use another workdir"
        )
    return restored.state, restored.step, restored.data["train_seconds"]


def record(workdir: epath.Path, c: Config) -> None:
    """Writes the config of the run, whole or not at all. ValueError: the workdir cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f"{config.FILE}.tmp"
        temporary.write_text(json.dumps(config.to_dict(c), indent=1) + "\n")
        temporary.replace(workdir / config.FILE)
    except OSError as error:
        raise ValueError(
            f"--workdir={workdir}: cannot write there ({error.strerror}); use another folder"
        ) from error


def describe(run: Run, now: TrainState, step: int) -> str:
    """What runs where, for the console."""
    c, info = run.config, run.corpus.info("train")
    n_device, kind = run.devices.size, run.devices.devices.flat[0].device_kind
    n_sequence = c.train.global_batch_size // mesh.n_data(run.devices)
    return "\n".join(
        [
            f"model    {state.n_param(now):,} parameters, {c.model.dtype}",
            f"devices  {n_device} x {kind}, {n_sequence} sequences each",
            f"data     {run.corpus.folder}: {info.n_token:,} tokens in {info.n_document:,} documents",
            f"workdir  {run.workdir}: "
            + (f"going on from step {step}" if run.checkpoints.steps() else "a new run"),
        ]
    )


def compile_step(run: Run, now: TrainState, tx: Any) -> Callable:
    """The compiled train step for the shapes of this run."""
    c = run.config.train
    tokens = jax.ShapeDtypeStruct(
        (c.global_batch_size, c.sequence_len), jnp.int32, sharding=mesh.sharding(run.devices, mesh.BATCH)
    )
    batch = dict.fromkeys(("inputs", "targets", "doc_ids", "loss_mask"), tokens)
    run.watchdog.beat("compile", int(now.step), run.config.cluster.compile_timeout)
    run.console.progress("compiling the train step", brief=True)
    began = time.monotonic()
    update = train_step.make(run.config, run.devices, tx).lower(now, batch).compile()
    text = f"compile  {metrics.duration(time.monotonic() - began)}"
    memory = update.memory_analysis()
    if memory is not None:  # not every backend says
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        text += f", {needed / 2**20:,.0f} MiB a device"
    run.console.progress("training", brief=True)
    run.console.say(text)
    return update


def loop(
    run: Run,
    now: TrainState,
    step: int,
    seconds: float,
    update: Callable,
    sequences: Sequences,
    missed: bool,
) -> tuple[TrainState, bool]:
    """Updates until the last step, or until a stop is asked for: (state, stopped). Either way it is saved.

    `missed`: the evaluation of `step` comes first.
    """
    c = run.config
    n_update = c.train.sequence_len // c.train.update_len
    clock = metrics.Clock(c.train.global_batch_size * c.train.update_len, seconds)
    score = evaluate.make(c.model, run.devices, evaluate.piece_len(c))
    batches = training_batches(
        sequences,
        batch_size=c.train.global_batch_size,
        seed=c.train.seed,
        start=step // n_update,
        rows=mesh.local_rows(run.devices, c.train.global_batch_size),
        workers=c.data.workers,
    )
    unread: list[tuple[int, dict]] = []  # (step, metrics on the device), since they were last looked at
    stopped, line = False, ""
    with contextlib.closing(batches):
        if missed:
            stopped = not evaluate_now(run, score, now, step)
        clock.start(step)
        while step < c.train.steps and not stopped:
            run.watchdog.beat("data", step)
            batch = mesh.global_batch(run.devices, next(batches), c.train.global_batch_size)
            run.watchdog.beat("ready", step)
            run.processes.batch_ready()
            run.watchdog.beat("step", step)
            now, numbers = update(now, batch)
            step += n_update
            unread.append((step, numbers))
            stopped = run.processes.stop_requested()
            last = step == c.train.steps

            # The rows of a step are written before its checkpoint: a resumed run then has each row once.
            if last or is_due(c.log.every, step, n_update):
                line = log_metrics(run, clock, step, unread)
            if is_evaluated(c, step) and not stopped:
                with clock.pause():
                    stopped = not evaluate_now(run, score, now, step)
                    run.console.progress(line, brief=True)  # training goes on
            if last or stopped or is_due(c.checkpoint.every, step, n_update):
                read_metrics(unread)  # a state that is not a number is never saved
                with clock.pause():
                    save(run, now, step, clock.seconds)
        run.watchdog.beat("save", step)
        run.checkpoints.wait()
    return now, stopped


def save(run: Run, now: TrainState, step: int, seconds: float) -> None:
    """Begins to save: written in the background."""
    run.watchdog.beat("save", step)
    data = {
        "next_batch": step // (run.config.train.sequence_len // run.config.train.update_len),
        "fingerprint": run.corpus.fingerprint,
        "vocabulary": vocabulary.to_json(run.corpus.vocabulary),
        "train_seconds": seconds,
    }
    run.checkpoints.save(step, now, data, config.to_dict(run.config))


def is_evaluated(c: Config, step: int) -> bool:
    """Whether an evaluation belongs to a step."""
    n_update = c.train.sequence_len // c.train.update_len
    last = step == c.train.steps
    return step > 0 and c.evaluate.every > 0 and (last or is_due(c.evaluate.every, step, n_update))


def is_due(every: int, step: int, n_update: int) -> bool:
    """Whether a multiple of `every` lies in the n_update updates up to `step`; 0 is never due."""
    return every > 0 and step // every > (step - n_update) // every


def read_metrics(unread: list[tuple[int, dict]]) -> dict[str, np.ndarray]:
    """The metrics of the last step, on the host. DivergedError names the first step that went wrong."""
    found = jax.device_get(unread)
    for step, numbers in found:
        for name, what in WATCHED.items():
            if not np.isfinite(numbers[name]):
                raise DivergedError(f"the {what} is {numbers[name]} at step {step}")
    del unread[:-1]
    return found[-1][1]


def way_out(run: Run) -> str:
    """What to do about a run that diverged: it is repeatable, so the same command would diverge again."""
    remedy = "lower config.optimizer.lr_max or config.optimizer.grad_clip"
    saved = run.checkpoints.steps()
    if not saved:
        return f"there is no checkpoint yet: {remedy} and start in another workdir"
    return (
        f"checkpoint {saved[-1]} is from before that: {remedy}, in another workdir or,"
        f" to go on from there, in {run.workdir / config.FILE} too"
    )


def log_metrics(run: Run, clock: metrics.Clock, step: int, unread: list[tuple[int, dict]]) -> str:
    """A row of metrics, and the live line, which is returned."""
    numbers = read_metrics(unread)
    row = metrics.row(step, "train", numbers, clock.lap(step), run.corpus.bytes_per_token)
    run.write(row)
    steps = run.config.train.steps
    line = metrics.progress_line(row, steps, clock.left(step, steps))
    run.console.progress(line)
    return line


def evaluate_now(run: Run, score: Callable, now: TrainState, step: int) -> bool:
    """A row for the whole split of config.evaluate. False: a stop was asked for before its end, no row."""
    c = run.config

    def progress(done: int, of: int) -> None:
        run.watchdog.beat("evaluate", step)
        run.console.progress(f"evaluating: batch {done} of {of}", brief=True)
        if run.processes.stop_requested():
            raise StopAskedError

    run.watchdog.beat("evaluate", step, c.cluster.compile_timeout)
    try:
        result = evaluate.split(
            score,
            now.params,
            now.codebooks,
            run.corpus,
            c.evaluate.split,
            run.devices,
            sequence_len=c.train.sequence_len,
            batch_size=evaluate.batch_size(c),
            progress=progress,
        )
    except StopAskedError:
        return False
    run.write({"step": step, "split": c.evaluate.split, **result})
    run.console.say(f"step {step:,}: " + evaluate.line(c.evaluate.split, result, run.corpus))
    return True


def finish(run: Run, now: TrainState, stopped: bool) -> None:
    """The last words: how to go on, or a sample of what was learnt."""
    step = int(now.step)
    if stopped:
        run.console.say(f"stopped and saved at step {step}; the same command goes on")
    elif run.processes.is_main and run.config.model.attention == "vq":
        run.watchdog.beat("sample", step, run.config.cluster.compile_timeout)
        texts = sample.texts(now.params, now.codebooks, run.corpus.vocabulary, run.config)
        path = sample.save(texts, run.workdir, step)
        run.console.say(sample.show(texts) + f"\n(in {path})")
