"""Weights of a run for programs that do not train, beside the run, which may be saving meanwhile."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tvq import model as lm
from tvq.errors import InputError
from tvq.run import tensors
from tvq.run.checkpoint import NOT_FINITE, Checkpoints, Restored
from tvq.run.workdir import CHECKPOINTS, steps, steps_in
from tvq.schema import Config
from tvq.training import state

# The arrays of a state that a checkpoint may lack, or have for nothing.
OPTIONAL = frozenset(f"weights.extra.{path.replace('/', '.')}" for path in lm.TRAINING_ONLY)
TRIES = 10  # checkpoints that may be removed under a reader, one after the other, until it gives up


def weights(
    config: Config, workdir: epath.Path, mesh: Mesh, say: Callable[[str], None], at: int | None = None
) -> Restored:
    """The weights of the newest whole checkpoint of a run, or of that of a step, on any mesh.

    InputError if there is none. What only training reads is zero where the checkpoint has none. Warns of
    arrays that are not finite.
    """
    if not (workdir / CHECKPOINTS).exists():
        raise InputError(f"--workdir={workdir} holds no checkpoint; train first")
    wanted = state.place_weights(config, mesh)
    restored = read_weights(workdir / CHECKPOINTS, wanted, say, OPTIONAL, at)
    if restored is None:
        raise InputError(none_there(f"--workdir={workdir}", workdir, at))
    restored = restored._replace(state=whole(wanted, restored.state))
    broken = tensors.not_finite(restored.state)
    if broken:
        say(f"warning: checkpoint {restored.step} holds {NOT_FINITE} in {', '.join(broken)}")
    return restored


def none_there(option: str, workdir: epath.Path, at: int | None) -> str:
    """Says that a run has no checkpoint at all, or none of a step."""
    saved = ", ".join(map(str, steps(workdir)))
    if at is None or not saved:
        return f"{option} holds no checkpoint yet"
    return f"{option} has no checkpoint of step {at}; there are those of {saved}"


def read_weights(
    directory: epath.PathLike,
    abstract: Any,
    say: Callable[[str], None],
    optional: Collection[str] = (),
    at: int | None = None,
) -> Restored | None:
    """`Checkpoints.restore_weights` beside a run that saves, and that removes old checkpoints meanwhile.

    A checkpoint that is removed while it is read has a newer one in its place: that is taken then, unless
    that of a step is asked for.
    """
    for _ in range(TRIES):
        newest, said, failure, restored = _newest_step(directory), list[str](), None, None
        try:
            with Checkpoints(directory, keep=1, keep_every=0, read_only=True, at=at) as checkpoints:
                restored = checkpoints.restore_weights(abstract, said.append, optional)
        except (OSError, ValueError, KeyError) as error:  # what Orbax and TensorStore say of missing files
            failure = error
        has_newer = _newest_step(directory) != newest
        if not _on_any((failure is not None or bool(said)) and has_newer):
            break
    else:
        raise InputError(
            f"{TRIES} checkpoints in {directory} were removed while they were read: the run saves faster than"
            " they can be read; raise its config.checkpoint.keep or config.checkpoint.every"
        )
    if failure is not None:
        raise failure
    for line in said:
        say(line)
    return restored


def whole(wanted: Any, state: Any) -> Any:
    """The state, with zeros where an optional array is missing."""
    zeros = lambda like: jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
    return jax.tree.map(lambda like, x: zeros(like) if x is None else x, wanted, state)


def _newest_step(directory: epath.PathLike) -> int:
    return max(steps_in(epath.Path(directory)), default=-1)


def _on_any(flag: bool) -> bool:
    """Whether it is so on any process."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))
