"""The loop of a run: its updates, and the tasks that are due between them."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tvq import cluster, sharding
from tvq.config import to_dict
from tvq.data import vocabulary
from tvq.data.corpus import Corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches
from tvq.errors import DivergedError, InputError
from tvq.programs import evaluate, sample
from tvq.run import describe, metrics, records
from tvq.run.checkpoint import Checkpoints, SaveError
from tvq.run.snapshots import Snapshots
from tvq.run.workdir import Home
from tvq.schema import Config
from tvq.training.state import TrainState

# Metrics that end a run when they are not a number.
WATCHED = {
    "loss_lm_per_token_unscaled": "loss",
    "grad_norm": "norm of the gradient",
    "param_norm": "norm of the updated parameters",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run work with."""

    config: Config
    workdir: epath.Path
    corpus: Corpus
    mesh: Mesh
    processes: cluster.Processes
    watchdog: cluster.Watchdog
    console: metrics.Console
    checkpoints: Checkpoints
    clock: metrics.Clock
    records: records.Records | None  # on the main process
    home: Home | None  # on the main process
    snapshots: Snapshots
    # (step, metrics on the device) that have not been read yet.
    unread: list[tuple[int, dict]] = dataclasses.field(default_factory=list)

    def write(self, row: metrics.Row) -> None:
        if self.records is not None:
            self.records.write(row)

    @property
    def n_update(self) -> int:
        """Updates of a batch."""
        return self.config.train.sequence_len // self.config.train.update_len

    def is_due(self, every: int, step: int) -> bool:
        """Whether a multiple of `every`, or the last step, lies in the updates of the batch up to `step`."""
        is_last = step == self.config.train.steps
        return every > 0 and step > 0 and (is_last or step // every > (step - self.n_update) // every)


class StopAskedError(Exception):
    """A stop was requested. All processes raise it at the same point; `run_to_end` catches it."""


def check_stop(run: Run) -> None:
    if run.processes.stop_requested():
        raise StopAskedError


class Task(NamedTuple):
    """What is done every so many updates, and after the last."""

    name: str
    every: int  # 0: never
    do: Callable[[TrainState, int], None]  # with the state of a step
    # At the step of a stop. What is missed there, the next start makes up for.
    at_stop: Literal["missed", "if due", "always"] = "missed"


def tasks(run: Run) -> list[Task]:
    """All that is done between the updates, in this order. Another task is another entry.

    The row of a step is written before its checkpoint: a resumed run then has each row once.
    """
    config = run.config
    # The split of no evaluation may be empty.
    score: Any = evaluate.scorer(config, run.corpus, run.mesh) if config.evaluate.every else None
    draw = sample.sampler(config, run.corpus.vocabulary, run.corpus.image_size, run.mesh)
    split, sample_every = config.evaluate.split, config.sample.every if config.model.carries_state else 0
    return [
        Task("train", config.log.every, lambda now, step: log_metrics(run, step), at_stop="if due"),
        Task(split, config.evaluate.every, lambda now, step: score_split(run, score, now, step)),
        Task(records.SAMPLES, sample_every, lambda now, step: show_sample(run, draw, now, step)),
        Task("checkpoint", config.checkpoint.every, lambda now, step: save(run, now, step), at_stop="always"),
    ]


def missed(run: Run, tasks: Sequence[Task], step: int) -> list[str]:
    """The tasks, by name, that the stop or the kill after which the run resumes at `step` left undone."""
    names = [t.name for t in tasks if t.at_stop == "missed" and run.is_due(t.every, step)]
    left = [name for name in names if run.records is not None and name not in run.records.done]
    return run.processes.gather("missed", left)[0]


def run_to_end(
    run: Run,
    tasks: Sequence[Task],
    now: TrainState,
    step: int,
    update: Callable,
    sequences: Sequences,
    missed: Collection[str],
) -> int:
    """Updates until the last step, or until a stop is requested; saves either way; returns the exit code.

    What was `missed` of the tasks of `step` comes first.
    """
    train, code = run.config.train, 0
    left: Iterator[Task] = iter(())  # tasks of this step that are still to come
    batches = training_batches(
        sequences,
        batch_size=train.global_batch_size,
        seed=train.seed,
        start=step // run.n_update,
        rows=sharding.local_rows(run.mesh, train.global_batch_size),
        workers=run.config.data.workers,
    )
    with contextlib.closing(batches):
        try:
            for task in tasks:
                if task.name in missed:
                    task.do(now, step)
            run.clock.start(step)
            while step < train.steps:
                batch = next_batch(run, batches, step)
                run.watchdog.beat("step", step)
                now, numbers = update(now, batch)
                step += run.n_update
                probe = numbers.pop("probe")
                if run.is_due(run.config.log.every, step):
                    numbers |= run.snapshots.take(step, now.weights, probe)
                run.unread.append((step, numbers))
                left = iter(tasks)
                check_stop(run)
                for task in left:
                    if run.is_due(task.every, step):
                        read_metrics(run)  # the time of updates under way counts as steps
                        task.do(now, step)
        except StopAskedError:
            code = cluster.EXIT_STOPPED
            for task in left:
                if task.at_stop == "always" or (task.at_stop == "if due" and run.is_due(task.every, step)):
                    read_metrics(run)  # a state that is not a number is never saved
                    task.do(now, step)
        run.watchdog.beat("save", step)
        with run.clock.spending("save"):
            run.checkpoints.wait()
    finish(run, step, is_stopped=code != 0)
    return code


def next_batch(run: Run, batches: Iterator[dict], step: int) -> dict[str, jax.Array]:
    """The next batch, on the devices, once all processes have theirs."""
    is_busy = lambda: bool(run.unread) and not run.unread[-1][1]["grad_norm"].is_ready()
    with run.clock.waiting(is_busy):
        run.watchdog.beat("data", step)
        batch = sharding.global_batch(run.mesh, next(batches), run.config.train.global_batch_size)
        run.watchdog.beat("ready", step)
        run.processes.batch_ready()
    return batch


def score_split(run: Run, score: Callable, now: TrainState, step: int) -> None:
    """A row for the whole split of config.evaluate."""
    config = run.config
    so_far = metrics.Progress("evaluating", "pieces")
    with under_way(run, "evaluate", step) as tell:
        result, _ = score(now.weights, lambda *n: tell(so_far.line(*n)))
    run.write({"step": step, "split": config.evaluate.split, **result})
    run.console.say(f"step {step:,}: " + evaluate.line(config.evaluate.split, result, run.corpus))


def show_sample(run: Run, draw: Callable, now: TrainState, step: int) -> None:
    """A sample, in files and wherever rows go."""
    with under_way(run, "sample", step) as tell:
        drawn = draw(now.weights, tell)
    if run.records is not None:
        run.records.show(step, drawn)
    run.console.say(f"step {step:,}: {sample.line(drawn, run.workdir / records.SAMPLES)}")


@contextlib.contextmanager
def under_way(run: Run, kind: str, step: int) -> Iterator[Callable[[str], None]]:
    """Counts the time as `kind`. What it gives is to be called with a line of progress, now and then.

    That raises StopAskedError once a stop is requested: it takes too long to wait for.
    """

    def tell(line: str) -> None:
        run.watchdog.beat(kind, step)
        run.console.progress(line, brief=True)
        check_stop(run)

    run.watchdog.beat(kind, step, run.config.cluster.compile_timeout)
    with run.clock.spending(kind):
        yield tell


def log_metrics(run: Run, step: int) -> None:
    """A row of metrics, and the live line."""
    numbers, steps = read_metrics(run), run.config.train.steps
    pace = run.clock.lap(step) | describe.memory()
    row = metrics.row(step, "train", numbers, pace, run.corpus.bytes_per_token)
    run.write(row)
    run.snapshots.save(step)
    look_for_workdir(run)
    left, n_vocab = run.clock.left(step, steps), run.config.model.n_vocab
    run.console.progress(metrics.progress_line(row, steps, left, n_vocab))


def read_metrics(run: Run) -> dict[str, np.ndarray]:
    """The metrics of the last step, on the host. DivergedError names the first step that went wrong."""
    rows = jax.device_get(run.unread)
    for step, numbers in rows:
        for name, what in WATCHED.items():
            if not np.isfinite(numbers[name]):
                raise DivergedError(f"the {what} is {numbers[name]} at step {step}")
    del run.unread[:-1]
    return rows[-1][1]


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
            run.checkpoints.save(step, now, data, to_dict(run.config))
        except (SaveError, ValueError):  # Orbax raises several errors for a missing folder
            look_for_workdir(run)
            if run.home is None or not run.home.is_lost:
                raise
            # The previous save was lost with the folder, which has been made again.
            run.checkpoints.save(step, now, data, to_dict(run.config))


def look_for_workdir(run: Run) -> None:
    """Requests a stop if the workdir was moved or removed: later results would be split from its record."""
    if run.home is not None and run.home.look():
        run.processes.ask_to_stop()


def finish(run: Run, step: int, is_stopped: bool) -> None:
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
    if is_stopped and not is_here:
        raise InputError(f"stopped at step {step}: {fate}")
    if fate:
        run.console.say(fate)
    if is_stopped:
        run.console.say(f"stopped and saved at step {step}; the same command resumes the run")
