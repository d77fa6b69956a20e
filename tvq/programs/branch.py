"""Where a run starts: new, from its newest checkpoint, or, as a branch, from a checkpoint of another run.

A branch has a config of its own. With the optimizer's state the step continues, and with it the schedule;
weights alone start at step 0.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from tvq import atomic, paths
from tvq import model as lm
from tvq.config import differences, to_dict
from tvq.data.corpus import Corpus
from tvq.errors import InputError
from tvq.programs import evaluate
from tvq.run import metrics, records, restore, tensors
from tvq.run.checkpoint import NOT_FINITE, Checkpoints
from tvq.run.workdir import CHECKPOINTS, steps
from tvq.schema import Config, Model
from tvq.training import state
from tvq.training.state import TrainState

FILE = "origin.json"  # in the workdir of a branch: where it started
Say = Callable[[str], None]


class Source(NamedTuple):
    """What `--from=RUN[@STEP]` or `--from_weights=RUN[@STEP]` asks for."""

    option: str  # as given, for messages
    run: epath.Path
    step: int | None  # None: the newest
    takes: str  # state, or weights


class Parent(NamedTuple):
    """A checkpoint to start from. `takes`: state (of the optimizer too), or weights."""

    source: Source
    step: int
    meta: dict  # what the checkpoint holds beside its arrays
    takes: str
    parts: tuple[str, ...] = ()  # of the optimizer's state, that are taken
    fresh: tuple[str, ...] = ()  # why the optimizer's state was asked for and is not taken

    @property
    def data(self) -> dict:
        data: dict = self.meta["data"]
        return data

    def arrays(self, prefix: str) -> dict[str, str]:
        """Shape and dtype of the arrays whose names begin like this."""
        return {name: kind for name, kind in self.meta["arrays"].items() if name.startswith(prefix)}

    @property
    def first_step(self) -> int:
        """The step at which the new run starts."""
        return self.step if self.takes == "state" else 0


def source(**options: str | None) -> Source | None:
    """From `from` and `from_weights`, of which at most one is given."""
    given = {name: text for name, text in options.items() if text}
    if len(given) > 1:
        raise InputError("--from takes the optimizer's state too, --from_weights does not; use one of them")
    for name, text in given.items():
        run, step = paths.run_and_step(text)
        return Source(f"--{name}={text}", epath.Path(run), step, "state" if name == "from" else "weights")
    return None


def find(
    config: Config, workdir: epath.Path, asked: Source | None, placed: TrainState, corpus: Corpus
) -> Parent | None:
    """The checkpoint that the run in `workdir` starts from; None if it has one of its own, or starts new.

    InputError: it does not fit the config, or the run in `workdir` started elsewhere.
    """
    if asked is None:
        return None
    check_origin(workdir, asked)
    if steps(workdir):
        return None
    parent = read_parent(asked)
    check_model(config.model, parent)
    evaluate.check_same_vocabulary(corpus, parent.step, parent.data)
    if parent.takes == "state":
        parent = with_optimizer(config, parent, placed)
    check_steps(config, parent)
    return parent


def check_origin(workdir: epath.Path, asked: Source) -> None:
    """InputError if there is a run in `workdir` that did not start from what is asked for."""
    if os.path.realpath(workdir) == os.path.realpath(asked.run):
        raise InputError(
            f"{asked.option} is the run in --workdir={workdir} itself; leave it out to resume that run, or"
            " use another workdir"
        )
    if not (workdir / FILE).exists():
        if steps(workdir) or (workdir / records.FILE).exists():
            raise InputError(
                f"--workdir={workdir} holds a run that did not start from another; leave out {asked.option}"
                " to resume it, or use another workdir"
            )
        return
    was = json.loads((workdir / FILE).read_text())
    is_same = was["run"] == _place(asked.run) and was["asked"] == asked.takes
    if not is_same or asked.step not in (None, was["step"]):
        raise InputError(
            f"--workdir={workdir} holds a run that started from the {was['asked']} of"
            f" {was['run']}@{was['step']}, not {asked.option}; leave that out to resume it, or use"
            " another workdir"
        )


def _place(run: epath.Path) -> str:
    return str(run) if "://" in str(run) else os.path.realpath(run)


def read_parent(asked: Source) -> Parent:
    """The checkpoint asked for, without its arrays. InputError: there is none."""
    folder = asked.run / CHECKPOINTS
    if not folder.exists():
        raise InputError(f"{asked.option}: {asked.run} holds no checkpoint")
    with Checkpoints(folder, keep=1, keep_every=0, read_only=True, at=asked.step) as checkpoints:
        newest = checkpoints.newest_meta()
    if newest is None:
        raise InputError(restore.none_there(asked.option, asked.run, asked.step))
    parent = Parent(asked, *newest, asked.takes)
    if parent.arrays("params."):
        raise InputError(f"{asked.option} is of an earlier version of tvq: tvq export there, import here")
    return parent


def check_model(model: Model, parent: Parent) -> None:
    """InputError if the weights have other shapes than the model's: it names the fields that decide them."""
    if _without_optional(parent.arrays("weights.")) == weight_kinds(model):
        return
    known = {f.name for f in dataclasses.fields(Model)}
    then = {name: value for name, value in parent.meta["config"]["model"].items() if name in known}
    changed = {name: value for name, value in then.items() if value != getattr(model, name)}
    deciding = [
        name
        for name, value in changed.items()
        if weight_kinds(dataclasses.replace(model, **{name: value})) != weight_kinds(model)
    ]
    lines = [
        f"  config.model.{name}: {then[name]!r} there, {getattr(model, name)!r} now; set it to {then[name]!r}"
        for name in deciding or changed
    ]
    raise InputError(
        f"{parent.source.option}: checkpoint {parent.step} holds a model of other shapes, which cannot be"
        " taken over; keep the fields that decide them:\n" + "\n".join(lines)
    )


def weight_kinds(model: Model) -> dict[str, str]:
    """The shape and dtype of each array of the weights, as a checkpoint names them."""
    like = {"weights": jax.eval_shape(lambda: lm.init(model, jax.random.key(0)))}
    return _without_optional({name: tensors.kind(x) for name, x in tensors.named(like).items()})


def _without_optional(kinds: dict[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in kinds.items() if name not in restore.OPTIONAL}


def with_optimizer(config: Config, parent: Parent, placed: TrainState) -> Parent:
    """The parent, with the parts of the optimizer's state that both have.

    It is taken for its weights alone if the optimizer's own part, or that of the schedule, is not among them.
    """
    kinds = lambda part: {name: tensors.kind(x) for name, x in tensors.named({"opt_state": part}).items()}
    parts = [
        name
        for name, part in placed.opt_state.items()
        if parent.arrays(f"opt_state.{name}.") == kinds({name: part})
    ]
    if {config.optimizer.name, "schedule"} & placed.opt_state.keys() <= set(parts):
        return parent._replace(parts=tuple(parts))
    now, then = dataclasses.asdict(config.optimizer), parent.meta["config"]["optimizer"]
    reasons = [
        f"config.optimizer.{name} is {now[name]!r}, not {then[name]!r}"
        for name in ("name", *then)
        if name in now and now[name] != then[name]
    ]
    return parent._replace(takes="weights", fresh=tuple(dict.fromkeys(reasons)) or ("its arrays differ",))


def check_steps(config: Config, parent: Parent) -> None:
    """InputError if there is nothing to train, or a sequence of several updates would be cut."""
    step, option = parent.first_step, parent.source.option
    n_update = config.train.sequence_len // config.train.update_len
    if step >= config.train.steps:
        raise InputError(
            f"{option} continues at step {step}, and config.train.steps is {config.train.steps}: raise it"
            f" above {step}, or take the weights alone with --from_weights, which starts at step 0"
        )
    fitting = [str(saved) for saved in steps(parent.source.run) if saved % n_update == 0]
    if step % n_update:
        raise InputError(
            f"{option} continues at step {step}, in the midst of a sequence of {n_update} updates"
            f" (config.train.sequence_len {config.train.sequence_len} / update_len"
            f" {config.train.update_len}); start from a multiple of {n_update} with RUN@STEP (it has"
            f" {', '.join(fitting) or 'none'}), or with --from_weights, which starts at step 0"
        )


def resume(
    config: Config,
    corpus: Corpus,
    placed: TrainState,
    tx: Any,
    checkpoints: Checkpoints,
    clock: metrics.Clock,
    parent: Parent | None,
    say: Callable[[str], None],
) -> tuple[TrainState, int]:
    """State and step of the newest whole checkpoint, or of a new run if there is none; the clock continues.

    A new run starts with new weights, or from a checkpoint of another. `placed` says how the state lies on
    the mesh. The place in the data needs no restoring: batch t is a function of (seed, t).
    """
    restored = checkpoints.restore(placed, say)
    if restored is None and parent is not None:
        return take(config, parent, placed, tx, say), parent.first_step
    if restored is None:
        shardings = jax.tree.map(lambda x: x.sharding, placed)
        init = jax.jit(state.init, static_argnums=(0, 1, 2), out_shardings=shardings)
        return init(config.model, tx, config.train.seed), 0
    evaluate.check_same_vocabulary(corpus, restored.step, restored.data)
    if restored.data["fingerprint"] not in (None, corpus.fingerprint):  # None: weights from elsewhere
        raise InputError(
            f"the data in {corpus.where} is not what checkpoint {restored.step} was trained on;"
            " set config.data to that, or use another workdir"
        )
    clock.add(restored.data["seconds"])
    return restored.state, restored.step


def take(config: Config, parent: Parent, placed: TrainState, tx: Any, say: Say) -> TrainState:
    """The state that the new run starts with, on its mesh."""
    wanted: dict[str, Any] = {"weights": placed.weights}
    if parent.takes == "state":
        wanted["opt_state"] = {name: placed.opt_state[name] for name in parent.parts}
    left = {name for name in parent.arrays("opt_state.") if name.split(".")[1] not in parent.parts}
    folder, option = parent.source.run / CHECKPOINTS, parent.source.option
    restored = restore.read_weights(folder, wanted, say, restore.OPTIONAL | left, at=parent.step)
    if restored is None:
        raise InputError(f"{option}: checkpoint {parent.step} was removed while it was read; start again")
    if broken := tensors.not_finite({"weights": restored.state["weights"]}):
        raise InputError(f"{option}: checkpoint {parent.step} holds {NOT_FINITE} in {', '.join(broken)}")

    def begin(weights: lm.Weights, kept: dict) -> TrainState:
        now = state.init(config.model, tx, config.train.seed, weights)  # its key is that of the seed
        return now._replace(step=jnp.int32(parent.first_step), opt_state=now.opt_state | kept)

    shardings = jax.tree.map(lambda x: x.sharding, placed)
    taken = restore.whole(wanted, restored.state)
    weights, kept = taken["weights"], taken.get("opt_state", {})
    now: TrainState = jax.jit(begin, out_shardings=shardings)(weights, kept)
    what = "weights, codebooks and optimizer state" if kept else "weights and codebooks"
    say(f"starting from step {parent.step:,} of {parent.source.run}: {what}; at step {parent.first_step:,}")
    if parent.fresh:
        say(
            f"the optimizer is new, and its schedule starts at step 0: {'; '.join(parent.fresh)}. To continue"
            " the step, keep the parent's optimizer"
        )
    for line in changes(config, parent):
        say(f"  {line}")
    return now


def changes(config: Config, parent: Parent) -> list[str]:
    """A line for each field that decides numbers and differs from the parent's."""
    return differences(parent.meta["config"], to_dict(config), "in the parent")


def record(workdir: epath.Path, config: Config, parent: Parent | None) -> None:
    """Writes where a branch starts, and the rows before that, so that the parent is not needed any more."""
    if parent is None:
        return
    lines = rows_before(parent.source.run, parent.first_step) if parent.takes == "state" else []
    atomic.write(workdir / records.BEFORE, b"".join(line + b"\n" for line in lines))
    origin = {
        "run": _place(parent.source.run),
        "step": parent.step,
        "asked": parent.source.takes,
        "takes": parent.takes,
        "first_step": parent.first_step,
        "changed": changes(config, parent),
        "fingerprint": parent.data["fingerprint"],  # of the data that the parent was trained on
    }
    atomic.write(workdir / FILE, json.dumps(origin, indent=1) + "\n")


def rows_before(run: epath.Path, step: int) -> list[bytes]:
    """The lines of a run's rows up to a step, after those of the runs that it started from."""
    lines = []
    for path in (run / records.BEFORE, run / records.FILE):
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                if int(json.loads(line)["step"]) <= step:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):  # cut short by a kill, or being written
                continue
    return lines
