"""A training run from top to bottom: the file to read first."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from tvq import cluster, sharding
from tvq.config import FILE as CONFIG_FILE
from tvq.config import common
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.packing import Sequences
from tvq.errors import DivergedError, InputError
from tvq.programs import branch, evaluate, loop, sample
from tvq.programs.loop import Run
from tvq.rules import traced_updates
from tvq.run import describe, metrics, records, trace
from tvq.run.checkpoint import Checkpoints
from tvq.run.snapshots import Snapshots
from tvq.run.workdir import CHECKPOINTS, Home, check_workdir, record
from tvq.schema import Config
from tvq.training import optimizer, state, train_step
from tvq.training.state import TrainState


def train(
    config: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log, **source: str | None
) -> int:
    """Trains until `train.steps`, resuming from the newest checkpoint in `workdir`; returns the exit code.

    A new run may start from a checkpoint of another, its `source`: the options `from` and `from_weights`.
    InputError: the input is wrong; nothing has been written then. DivergedError: the loss is not a number;
    the last good checkpoint is kept.
    """
    began = time.monotonic()
    records.check(config.log)
    corpus, sequences = open_data(config)
    check_workdir(workdir, config)
    processes = cluster.start(place, config.cluster, common(config), log.say)
    mesh = make_mesh(config)
    tx = optimizer.make(config.optimizer, config.model)
    placed = state.place(config, tx, mesh)
    sample.check(config, corpus.image_size, placed)
    start = branch.find(config, workdir, branch.source(**source), placed, corpus)
    if processes.is_main:
        record(workdir, config, log)  # first: a start that is killed from here on leaves a run
        branch.record(workdir, config, start)

    with contextlib.ExitStack() as stack:
        console = metrics.Console(silent=not processes.is_main)
        watchdog = stack.enter_context(cluster.Watchdog(processes, config.cluster, log))
        watchdog.beat("restore", 0, config.cluster.compile_timeout)
        keep, keep_every = config.checkpoint.keep, config.checkpoint.keep_every
        kept = Checkpoints(workdir / CHECKPOINTS, keep=keep, keep_every=keep_every)
        checkpoints = stack.enter_context(kept)
        n_token = config.train.global_batch_size * config.train.update_len
        clock = metrics.Clock(n_token, describe.peak(config, mesh), began)
        now, step = branch.resume(config, corpus, placed, tx, checkpoints, clock, start, console.say)
        # Process 0 wrote the config before the restore: one that does not see it has another folder.
        shared = {f"{CONFIG_FILE} in --workdir, which all must share": (workdir / CONFIG_FILE).exists()}
        processes.agree("run", {"checkpoint step": step, "data": corpus.fingerprint} | shared)
        home, rows = open_record(config, workdir, step, stack, console) if processes.is_main else (None, None)
        clock.repeat(rows.dropped if rows is not None else [])
        stack.enter_context(console)  # last: its live line ends before the records close, which may print
        snapshots = Snapshots(mesh, now.weights, config.model.c_gamma, workdir, step, console.say)
        run = Run(
            config,
            workdir,
            corpus,
            mesh,
            processes,
            watchdog,
            console,
            checkpoints,
            clock,
            rows,
            home,
            snapshots,
        )
        console.say(describe.start(config, mesh, corpus, workdir, state.n_param(now), checkpoints.steps()))
        if start is not None:
            loop.save(run, now, step)  # at once: from here on the parent is not needed
        code = train_on(run, now, step, tx, sequences)
    processes.finish()
    return code


def open_record(
    config: Config, workdir: epath.Path, step: int, stack: contextlib.ExitStack, console: metrics.Console
) -> tuple[Home, records.Records]:
    """What the main process keeps the record with, to be closed by `stack`."""
    home = stack.enter_context(Home(workdir, config, console.say))
    rows = records.Records(config, workdir, step, cluster.local_folder(str(workdir)), console.say)
    stack.callback(rows.close)
    return home, rows


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run. InputError: it does not fit the devices, or the batches do not fit it."""
    mesh = sharding.make(config.mesh, jax.devices(), config)
    sharding.check(mesh, config)
    sharding.check_batch(
        mesh, "train.global_batch_size", config.train.global_batch_size, config.train.accumulate
    )
    sharding.check_batch(mesh, "evaluate.batch_size", evaluate.batch_size(config))
    return mesh


def open_data(config: Config) -> tuple[Corpus, Sequences]:
    """What to train on. InputError: faults that would otherwise show only later, even after hours."""
    corpus = open_corpus(config.data)
    evaluate.check_vocabulary(corpus, config.model)
    sequences = Sequences(corpus, "train", config.train.sequence_len)
    sequences[0]  # fails on tokens of another vocabulary
    if config.evaluate.every:
        if config.evaluate.split == "train":  # its rows would be taken for those of the updates
            raise InputError(
                "config.evaluate.split=train is for tvq eval; train with validation or test, or with"
                " config.evaluate.every=0"
            )
        corpus.info(config.evaluate.split)  # fails on an empty split
    return corpus, sequences


def train_on(run: Run, now: TrainState, step: int, tx: Any, sequences: Sequences) -> int:
    """What is left to do of the run; returns the exit code."""
    steps, tasks = run.config.train.steps, loop.tasks(run)
    missed = loop.missed(run, tasks, step)
    if step >= steps and not missed:
        run.console.say(f"step {step} of config.train.steps {steps} is done; raise it to continue")
        return 0
    try:
        return loop.run_to_end(run, tasks, now, step, compile_step(run, now, tx), sequences, missed)
    except DivergedError as error:
        raise DivergedError(f"{error}; {remedies(run)}") from error


def compile_step(run: Run, now: TrainState, tx: Any) -> Callable:
    """The compiled train step for the shapes of this run."""
    config = run.config.train
    tokens = jax.ShapeDtypeStruct(
        (config.global_batch_size, config.sequence_len),
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
    updates = traced_updates(run.config.profile)
    if updates and run.processes.is_main:
        folder = (
            cluster.local_folder(str(run.workdir)) / "profile"
        )  # traces cannot be written to object stores
        n_update = config.sequence_len // config.update_len
        return trace.Traced(update, int(now.step), n_update, updates, folder, run.console.say)
    return update


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
        f" to resume from there, in {run.workdir / CONFIG_FILE} too"
    )
