"""A training run from top to bottom: the file to read first."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tvq import cluster, config, sharding
from tvq.config import Config
from tvq.data import vocabulary
from tvq.data.corpus import AnyCorpus, open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches
from tvq.errors import DivergedError, InputError
from tvq.programs import evaluate, sample
from tvq.run import describe, metrics, records, trace
from tvq.run.checkpoint import Checkpoints, SaveError
from tvq.run.looks import Looks
from tvq.run.workdir import CHECKPOINTS, Home, check_workdir, record
from tvq.training import optimizer, state, train_step
from tvq.training.state import TrainState

# Metrics that end a run when they are not a number.
WATCHED = {
    "loss_lm_per_token_unscaled": "loss",
    "grad_norm": "norm of the gradient",
    "param_norm": "norm of the updated parameters",
}


class StopAskedError(Exception):
    """A stop was requested, so an evaluation or a sample ended early, at the same point in all processes."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run work with."""

    config: Config
    workdir: epath.Path
    corpus: AnyCorpus
    mesh: Mesh
    processes: cluster.Processes
    watchdog: cluster.Watchdog
    console: metrics.Console
    checkpoints: Checkpoints
    clock: metrics.Clock
    records: records.Records | None  # on the main process
    home: Home | None  # on the main process
    looks: Looks

    def write(self, row: metrics.Row) -> None:
        if self.records is not None:
            self.records.write(row)


def train(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Trains until `train.steps`, resuming from the newest checkpoint in `workdir`; returns the exit code.

    InputError: the input is wrong; nothing has been written then. DivergedError: the loss is not a number;
    the last good checkpoint is kept.
    """
    began = time.monotonic()
    records.check(c.log)
    corpus, sequences = open_data(c)
    check_workdir(workdir, c)
    processes = cluster.start(place, c.cluster, config.common(c), log.say)
    mesh = sharding.make(c.mesh, jax.devices(), c)
    sharding.check(mesh, c)
    sharding.check_batch(mesh, "train.global_batch_size", c.train.global_batch_size, c.train.accumulate)
    sharding.check_batch(mesh, "evaluate.batch_size", evaluate.batch_size(c))
    tx = optimizer.make(c.optimizer, c.model)
    placed = state.place(c, tx, mesh)
    sample.check(c, corpus.image_size, placed)
    if processes.is_main:
        record(workdir, c, log)  # first: a start that is killed from here on leaves a run

    with contextlib.ExitStack() as stack:
        console = metrics.Console(silent=not processes.is_main)
        watchdog = stack.enter_context(cluster.Watchdog(processes, c.cluster, log))
        watchdog.beat("restore", 0, c.cluster.compile_timeout)
        checkpoints = stack.enter_context(
            Checkpoints(workdir / CHECKPOINTS, keep=c.checkpoint.keep, keep_every=c.checkpoint.keep_every)
        )
        n_token = c.train.global_batch_size * c.train.update_len
        clock = metrics.Clock(n_token, describe.roof(c, mesh), began)
        now, step = resume(c, corpus, placed, tx, checkpoints, clock, console.say)
        # Process 0 wrote the config before the restore: one that does not see it has another folder.
        shared = {f"{config.FILE} in --workdir, which all must share": (workdir / config.FILE).exists()}
        processes.agree("run", {"checkpoint step": step, "data": corpus.fingerprint} | shared)
        rows = home = None
        if processes.is_main:
            home = stack.enter_context(Home(workdir, c, console.say))
            rows = records.Records(c, workdir, step, cluster.local_folder(str(workdir)), console.say)
            stack.callback(rows.close)
            clock.repeat(rows.dropped)
        stack.enter_context(console)  # last: its live line ends before the records close, which may print
        # The stop that made this checkpoint may have left out the evaluation and the sample of its step.
        missed = processes.gather("missed", sorted(due(c, step) - rows.done if rows is not None else ()))[0]
        looks = Looks(mesh, now.weights, c.model.c_gamma, workdir, step, console.say)
        run = Run(
            c, workdir, corpus, mesh, processes, watchdog, console, checkpoints, clock, rows, home, looks
        )
        console.say(describe.start(c, mesh, corpus, workdir, state.n_param(now), checkpoints.steps()))
        if step < c.train.steps or missed:
            try:
                now, stopped = loop(run, now, step, compile_step(run, now, tx), sequences, missed)
            except DivergedError as error:
                raise DivergedError(f"{error}; {remedies(run)}") from error
            finish(run, int(now.step), stopped)
        else:
            stopped = False
            console.say(f"step {step} of config.train.steps {c.train.steps} is done; raise it to continue")
    processes.finish()
    return cluster.EXIT_STOPPED if stopped else 0


def open_data(c: Config) -> tuple[AnyCorpus, Sequences]:
    """What to train on. InputError: faults that would otherwise show only later, even after hours."""
    corpus = open_corpus(c.data)
    evaluate.check_vocabulary(corpus, c.model)
    sequences = Sequences(corpus, "train", c.train.sequence_len)
    sequences[0]  # fails on tokens of another vocabulary
    if c.evaluate.every:
        if c.evaluate.split == "train":  # its rows would be taken for those of the updates
            raise InputError(
                "config.evaluate.split=train is for tvq eval; train with validation or test, or with"
                " config.evaluate.every=0"
            )
        corpus.info(c.evaluate.split)  # fails on an empty split
    return corpus, sequences


def resume(
    c: Config,
    corpus: AnyCorpus,
    placed: TrainState,
    tx: Any,
    checkpoints: Checkpoints,
    clock: metrics.Clock,
    say: Callable[[str], None],
) -> tuple[TrainState, int]:
    """State and step of the newest whole checkpoint, or of a new run if there is none; the clock continues.

    `placed` says how it lies on the mesh. The place in the data needs no restoring: batch t is a function of
    (seed, t).
    """
    restored = checkpoints.restore(placed, say)
    if restored is None:
        shardings = jax.tree.map(lambda x: x.sharding, placed)
        init = jax.jit(state.init, static_argnums=(0, 1, 2), out_shardings=shardings)
        return init(c.model, tx, c.train.seed), 0
    evaluate.check_same_vocabulary(corpus, restored)
    if restored.data["fingerprint"] not in (None, corpus.fingerprint):  # None: weights from elsewhere
        raise InputError(
            f"the data in {corpus.folder} is not what checkpoint {restored.step} was trained on;"
            " set config.data to that, or use another workdir"
        )
    clock.add(restored.data["seconds"])
    return restored.state, restored.step


def compile_step(run: Run, now: TrainState, tx: Any) -> Callable:
    """The compiled train step for the shapes of this run."""
    c = run.config.train
    tokens = jax.ShapeDtypeStruct(
        (c.global_batch_size, c.sequence_len),
        jnp.int32,
        sharding=sharding.sharding(run.mesh, sharding.BATCH),
    )
    batch = dict.fromkeys(("inputs", "targets", "loss_mask"), tokens)
    run.watchdog.beat("compile", int(now.step), run.config.cluster.compile_timeout)
    run.console.progress("compiling the train step", brief=True)
    began = time.monotonic()
    with run.clock.spending("compile"), describe.counting_cache_hits() as hits:
        update = train_step.make(run.config, run.mesh, tx).lower(now, batch).compile()
    run.console.say(describe.compiled(update, time.monotonic() - began, bool(hits)))
    run.console.progress("training", brief=True)
    updates = config.traced_updates(run.config.profile)
    if updates and run.processes.is_main:
        folder = (
            cluster.local_folder(str(run.workdir)) / "profile"
        )  # traces cannot be written to object stores
        n_update = c.sequence_len // c.update_len
        return trace.Traced(update, int(now.step), n_update, updates, folder, run.console.say)
    return update


def loop(
    run: Run, now: TrainState, step: int, update: Callable, sequences: Sequences, missed: Collection[str]
) -> tuple[TrainState, bool]:
    """Updates until the last step or until a stop is requested: (state, stopped). Either way it is saved.

    What was `missed` of what is due at `step` comes first.
    """
    c = run.config
    n_update = c.train.sequence_len // c.train.update_len
    score = evaluate.scorer(c, run.corpus, run.mesh)
    draw = sample.sampler(c, run.corpus.vocabulary, run.corpus.image_size, run.mesh)
    batches = training_batches(
        sequences,
        batch_size=c.train.global_batch_size,
        seed=c.train.seed,
        start=step // n_update,
        rows=sharding.local_rows(run.mesh, c.train.global_batch_size),
        workers=c.data.workers,
    )
    unread: list[tuple[int, dict]] = []  # (step, metrics on the device) that have not been read yet
    with contextlib.closing(batches):
        stopped = not take_stock(run, score, draw, now, step, missed)
        run.clock.start(step)
        while step < c.train.steps and not stopped:
            batch = next_batch(run, batches, step, unread)
            run.watchdog.beat("step", step)
            now, numbers = update(now, batch)
            step += n_update
            last = step == c.train.steps
            is_logged = last or is_due(c.log.every, step, n_update)
            probe = numbers.pop("probe")
            if is_logged:
                numbers |= run.looks.look(step, now.weights, probe)
            unread.append((step, numbers))
            stopped = run.processes.stop_requested()

            # The rows of a step are written before its checkpoint: a resumed run then has each row once.
            if is_logged:
                log_metrics(run, step, unread)
            if due(c, step) and not stopped:
                read_metrics(unread)  # the time of updates under way counts as steps
                stopped = not take_stock(run, score, draw, now, step, due(c, step))
            if last or stopped or is_due(c.checkpoint.every, step, n_update):
                read_metrics(unread)  # a state that is not a number is never saved
                save(run, now, step)
        run.watchdog.beat("save", step)
        with run.clock.spending("save"):
            run.checkpoints.wait()
    return now, stopped


def next_batch(
    run: Run, batches: Iterator[dict], step: int, unread: list[tuple[int, dict]]
) -> dict[str, jax.Array]:
    """The next batch, on the devices, once all processes have theirs."""
    is_busy = lambda: bool(unread) and not unread[-1][1]["grad_norm"].is_ready()
    with run.clock.waiting(is_busy):
        run.watchdog.beat("data", step)
        batch = sharding.global_batch(run.mesh, next(batches), run.config.train.global_batch_size)
        run.watchdog.beat("ready", step)
        run.processes.batch_ready()
    return batch


def save(run: Run, now: TrainState, step: int) -> None:
    """Starts saving; the files are written in the background."""
    run.watchdog.beat("save", step)
    look_for_workdir(run)
    data = {
        "fingerprint": run.corpus.fingerprint,
        "vocabulary": vocabulary.to_json(run.corpus.vocabulary),
        "image_size": run.corpus.image_size,
        "seconds": run.clock.spent,
    }
    with run.clock.spending("save"):
        try:
            run.checkpoints.save(step, now, data, config.to_dict(run.config))
        except (SaveError, ValueError):  # Orbax raises several errors for a missing folder
            look_for_workdir(run)
            if run.home is None or not run.home.is_lost:
                raise
            # The previous save was lost with the folder, which has been made again.
            run.checkpoints.save(step, now, data, config.to_dict(run.config))


def look_for_workdir(run: Run) -> None:
    """Requests a stop if the workdir was moved or removed: later results would be split from its record."""
    if run.home is not None and run.home.look():
        run.processes.ask_to_stop()


def due(c: Config, step: int) -> set[str]:
    """What is due at a step: the split to evaluate, samples, or both."""
    n_update = c.train.sequence_len // c.train.update_len
    every = {
        c.evaluate.split: c.evaluate.every,
        records.SAMPLES: c.sample.every if c.model.carries_state else 0,
    }
    last = step == c.train.steps
    return {name for name, n in every.items() if n and step and (last or is_due(n, step, n_update))}


def is_due(every: int, step: int, n_update: int) -> bool:
    """Whether a multiple of `every` lies in the n_update updates up to `step`; 0 is never due."""
    return every > 0 and step // every > (step - n_update) // every


def read_metrics(unread: list[tuple[int, dict]]) -> dict[str, np.ndarray]:
    """The metrics of the last step, on the host. DivergedError names the first step that went wrong."""
    rows = jax.device_get(unread)
    for step, numbers in rows:
        for name, what in WATCHED.items():
            if not np.isfinite(numbers[name]):
                raise DivergedError(f"the {what} is {numbers[name]} at step {step}")
    del unread[:-1]
    return rows[-1][1]


def remedies(run: Run) -> str:
    """How to fix a run that diverged: runs repeat, so the same command would diverge again."""
    remedy = "lower config.optimizer.lr_max or config.optimizer.grad_clip"
    if not run.config.optimizer.grad_clip:
        remedy = "lower config.optimizer.lr_max or clip, with config.optimizer.grad_clip"
    saved = run.checkpoints.steps()
    if not saved:
        return f"there is no checkpoint yet: {remedy}, and start in another workdir"
    return (
        f"checkpoint {saved[-1]} is from before that: {remedy}, in another workdir or,"
        f" to resume from there, in {run.workdir / config.FILE} too"
    )


def log_metrics(run: Run, step: int, unread: list[tuple[int, dict]]) -> None:
    """A row of metrics, and the live line."""
    numbers, steps = read_metrics(unread), run.config.train.steps
    pace = run.clock.lap(step) | describe.memory()
    row = metrics.row(step, "train", numbers, pace, run.corpus.bytes_per_token)
    run.write(row)
    run.looks.save(step)
    look_for_workdir(run)
    left, n_vocab = run.clock.left(step, steps), run.config.model.n_vocab
    run.console.progress(metrics.progress_line(row, steps, left, n_vocab))


def take_stock(
    run: Run, score: Callable, draw: Callable, now: TrainState, step: int, wanted: Collection[str]
) -> bool:
    """A row for the whole split of config.evaluate, and a sample. False: a stop was requested first."""
    c = run.config

    def tell(kind: str, line: str) -> None:
        run.watchdog.beat(kind, step)
        run.console.progress(line, brief=True)
        if run.processes.stop_requested():
            raise StopAskedError

    try:
        if c.evaluate.split in wanted:
            run.watchdog.beat("evaluate", step, c.cluster.compile_timeout)
            with run.clock.spending("evaluate"):
                so_far = metrics.Progress("evaluating", "batches")
                result, _ = score(now.weights, lambda *n: tell("evaluate", so_far.line(*n)))
            run.write({"step": step, "split": c.evaluate.split, **result})
            run.console.say(f"step {step:,}: " + evaluate.line(c.evaluate.split, result, run.corpus))
        if records.SAMPLES in wanted:
            run.watchdog.beat("sample", step, c.cluster.compile_timeout)
            with run.clock.spending("sample"):
                drawn = draw(now.weights, lambda line: tell("sample", line))
            if run.records is not None:
                run.records.show(step, drawn)
            run.console.say(f"step {step:,}: {sample.line(drawn, run.workdir / records.SAMPLES)}")
    except StopAskedError:
        return False
    return True


def finish(run: Run, step: int, stopped: bool) -> None:
    """Reports where the time went, and how to resume.

    InputError: the run stopped because its workdir was moved; the message says how to resume there.
    """
    run.console.say(describe.spent(run.clock.spent))
    fate, is_here = "", True
    if run.home is not None:
        run.home.look()
        if run.home.is_lost:
            fate, is_here = run.home.settle(step)
    fate, is_here = run.processes.gather("workdir", [fate, is_here])[0]
    if stopped and not is_here:
        raise InputError(f"stopped at step {step}: {fate}")
    if fate:
        run.console.say(fate)
    if stopped:
        run.console.say(f"stopped and saved at step {step}; the same command resumes the run")
