"""Checkpoints: one commit holds the train state, a description of the data, and the config.

    directory/STEP/state/      the arrays, by name, whatever mesh they lay on
    directory/STEP/meta/       JSON: data, config, settings of jax, and shape and dtype of each array
    directory/STEP/*/SEAL.json size and checksum of each file
    directory/damaged_STEP/    a checkpoint whose files no longer match their seal, out of the way

Orbax writes in the background and commits by renaming, so a killed save leaves nothing that counts. It does
not notice a flipped bit in an array, and reports a lost file in hundreds of lines: hence the seal
(`tvq.run.seal`), written within the commit and verified before Orbax reads.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.handlers import DefaultCheckpointHandlerRegistry

from tvq import numerics
from tvq.errors import InputError, SaveError
from tvq.run import seal, tensors

MAX_LISTED = 20  # differing arrays that an error lists
WEIGHTS = "weights."  # how the names of their arrays begin
NOT_FINITE = "weights that are not numbers (NaN or infinite)"
# What Python, TensorStore and Orbax say of files that were removed under a save.
GONE = ("No such file", "NOT_FOUND", "directory does not exist", "are missing")
# What Orbax warns of in the normal course of things, across the line that shows progress: that a save waits
# for the one before, and that the removal of an old checkpoint was killed half-way (the next save ends it).
SILENCED = ("Waiting for previous save to complete", "Metadata file does not exist")
# And what it logs, with hundreds of lines, of a save that fails, before it raises it.
RAISED = (
    "_SignalingThread.run() raised",
    "Handler Commit operations",
    "Finalize thread (",
    "Checkpointer failed",
)


class Restored(NamedTuple):
    step: int
    state: Any
    data: dict


class Checkpoints:
    """The checkpoints of a run. A context manager: leaving it waits for the save that is on its way.

    Every process of a run makes one and calls the same methods in the same order.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int,
        keep_every: int,
        read_only: bool = False,
        at: int | None = None,
    ):
        """Takes the checkpoints in `directory`, a local path or a bucket's.

        The last `keep` are kept, and for good the first at or after each multiple of `keep_every` (0: none).
        A writer makes the directory and removes what a killed save left there. `read_only` does neither, so
        that it may look while a run writes; its `save` is an error. `at`: that step is the only one there.
        """
        logging.getLogger("absl").addFilter(_worth_saying)
        handlers = DefaultCheckpointHandlerRegistry()
        arrays, values, some = seal.Arrays(), seal.Json(), ocp.PyTreeCheckpointHandler()
        handlers.add("state", ocp.args.StandardSave, arrays)
        handlers.add("state", ocp.args.StandardRestore, arrays)
        handlers.add("state", ocp.args.PyTreeRestore, some)
        handlers.add("meta", ocp.args.JsonSave, values)
        handlers.add("meta", ocp.args.JsonRestore, values)
        path = epath.Path(directory)
        self._directory = path if path.is_absolute() else path.absolute()  # absolute() spoils gs://
        self._read_only, self._at = read_only, at
        self._damaged: list[int] = []
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Keep(keep, keep_every),
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
            handler_registry=handlers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._saving():
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """SaveError for what a disk or a bucket refuses, or lost; TensorStore says it in a ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            is_gone = any(words in str(error) for words in GONE)
            if isinstance(error, ValueError) and not is_gone and "os_error_code" not in str(error):
                raise
            remedy = "do not remove its files while it is written" if is_gone else "make room"
            raise SaveError(
                f"a checkpoint cannot be written ({str(error).splitlines()[0]}); {remedy}, and start again:"
                " the same command resumes from the one before"
            ) from error

    def steps(self) -> list[int]:
        """The steps saved, oldest first, with the one on its way; damaged ones count until they are found."""
        steps = [step for step in self._manager.all_steps() if step not in self._damaged]
        return steps if self._at is None else [step for step in steps if step == self._at]

    def save(self, step: int, state: Any, data: dict, config: dict) -> None:
        """Saves `state`, a tree of global arrays, with `data` and `config`, which must be JSON.

        Returns once the arrays are copied to host memory, so they may be donated; writing continues in the
        background, after any earlier save. An error of an earlier save is raised here, in `wait` or at exit.
        A step that is saved already is left as it is.
        """
        assert not self._read_only, "these checkpoints were opened to read"
        if self._damaged:
            self._set_aside()
        if step in self._manager.all_steps():
            return
        arrays = tensors.named(state)
        meta = {
            "data": data,
            "config": config,
            "settings": numerics.deciding(),
            "arrays": {name: tensors.kind(x) for name, x in arrays.items()},
        }
        with self._saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)),
                force=True,  # when to save is the caller's decision
            )

    def wait(self) -> None:
        """Waits until all saves are committed."""
        with self._saving():
            self._manager.wait_until_finished()

    def restore(self, abstract_state: Any, say: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        `abstract_state` is the tree of `jax.ShapeDtypeStruct` with shardings to restore, on any mesh. For
        each damaged checkpoint that is passed over, `say` gets a line (on process 0); the next `save` moves
        those out of the way. InputError if all are damaged, or if an array has another shape or dtype.
        """
        step, self._damaged = self._newest(say)
        if step is None:
            return None
        meta = self._read_meta(step)
        if "settings" in meta:  # older checkpoints do not record them
            numerics.check(step, meta["settings"])
        wanted = tensors.named(abstract_state)
        _check_arrays(step, meta["arrays"], {name: tensors.kind(x) for name, x in wanted.items()})
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        ).state
        weights = {name: x for name, x in arrays.items() if name.startswith(WEIGHTS)}
        if broken := tensors.not_finite(weights):
            raise InputError(
                f"checkpoint {step} holds {NOT_FINITE} in {', '.join(broken)}: no run can resume from it;"
                " move its folder away to resume from the one before, or import weights that are finite"
            )
        return Restored(step, _like(abstract_state, arrays), meta["data"])

    def restore_weights(
        self, abstract: Any, say: Callable[[str], None], optional: Collection[str] = ()
    ) -> Restored | None:
        """The same of a part of the state alone, such as params and codebooks; the rest is not read.

        `abstract` is a tree whose fields are some of the state's. An array whose name is in `optional` may
        be missing on either side: `state` then has None in its place.
        """
        step, self._damaged = self._newest(say)
        if step is None:
            return None
        meta = self._read_meta(step)
        wanted = tensors.named(abstract)
        parts = {name.partition(".")[0] for name in wanted}
        saved = {name: x for name, x in meta["arrays"].items() if name.partition(".")[0] in parts}
        one_sided = {name for name in optional if (name in saved) != (name in wanted)}
        kinds = {name: tensors.kind(x) for name, x in wanted.items()}
        _check_arrays(step, _without(saved, one_sided), _without(kinds, one_sided))
        here = _without(wanted, one_sided)
        how = ocp.checkpoint_utils.construct_restore_args(here)
        arrays = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item=here, restore_args=how, partial_restore=True)
            ),
        ).state
        return Restored(step, _like(abstract, arrays), meta["data"])

    def newest_meta(self) -> tuple[int, dict] | None:
        """Step and metadata of the newest whole checkpoint, None where there is none; no array is read."""
        step, _ = self._newest(lambda line: None)
        return None if step is None else (step, self._read_meta(step))

    def _read_meta(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def _newest(self, say: Callable[[str], None]) -> tuple[int | None, list[int]]:
        """The newest step that is whole, and the damaged steps after it. Decided by process 0."""
        self._manager.wait_until_finished()
        steps = sorted(self.steps(), reverse=True)
        if not steps:
            return None, []
        damage: list[str] = []
        if jax.process_index() == 0:
            for step in steps:
                broken = seal.damage(self._directory / str(step))
                if broken is None:
                    break
                damage.append(f"checkpoint {step} is damaged ({broken})")
        n_damaged = int(multihost_utils.broadcast_one_to_all(np.int32(len(damage))))
        if n_damaged == len(steps):
            detail = "\n".join(damage) or "the log of process 0 says how"
            raise InputError(
                f"all {n_damaged} checkpoints in {self._directory} are damaged; restore them from a copy,"
                f" or use another workdir\n{detail}"
            )
        for line in damage:
            say(f"{line}; falling back to {steps[n_damaged]}")
        return steps[n_damaged], steps[:n_damaged]

    def _set_aside(self) -> None:
        if jax.process_index() == 0:
            for step in self._damaged:
                aside = self._directory / f"damaged_{step}"
                if aside.exists():
                    aside.rmtree()
                (self._directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("checkpoint: damaged ones set aside")
        self._damaged = []
        self._manager.reload()


def _like(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """The tree with `arrays` as its leaves; None where there is none of a name."""
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays.get(name) for name in tensors.named(tree)])


def _without(named: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: x for name, x in named.items() if name not in names}


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax would ask jax, and from another thread: jax would take this for the training loop's own call,
        # and the processes would no longer agree on the step at which to stop. The loop asks for itself.
        return False


def _worth_saying(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return not text.startswith(SILENCED) and not any(part in text for part in RAISED)


class _Keep:
    """A preservation policy of Orbax's. Its own keep only exact multiples, or drift away from them."""

    def __init__(self, keep: int, keep_every: int):
        self.keep, self.keep_every = keep, keep_every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return kept([info.step for info in checkpoints], self.keep, self.keep_every)


def kept(steps: Sequence[int], keep: int, keep_every: int) -> list[bool]:
    """Which of the ascending `steps` stay: the last `keep`, and the first at or after each multiple."""
    last = [i >= len(steps) - keep for i in range(len(steps))]
    if not keep_every:
        return last
    first = [
        step // keep_every > before // keep_every for before, step in zip([0, *steps], steps, strict=False)
    ]
    return [a or b for a, b in zip(last, first, strict=True)]


def _check_arrays(step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differing = tensors.differing(saved, wanted, "saved")
    if any(name.startswith("weights.") for name in wanted) and any(n.startswith("params.") for n in saved):
        raise InputError(f"checkpoint {step} is of an earlier version of tvq: tvq export there, import here")
    if differing:
        more = len(differing) - MAX_LISTED
        raise InputError(
            f"checkpoint {step} holds another model or optimizer: {len(differing)} arrays differ;"
            " use the config it was saved with, or another workdir\n"
            + "\n".join(differing[:MAX_LISTED])
            + (f"\n  and {more} more" if more > 0 else "")
        )
