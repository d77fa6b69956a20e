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
from tvq.schema import Config
from tvq.training import state

TRIES = 10  # checkpoints that may be removed under a reader, one after the other, until it gives up


def weights(c: Config, workdir: epath.Path, mesh: Mesh, say: Callable[[str], None]) -> Restored:
    """The weights of the newest whole checkpoint of a run, on any mesh. InputError if there is none.

    What only training reads is zero where the checkpoint has none. Warns of arrays that are not finite.
    """
    if not (workdir / "checkpoints").exists():
        raise InputError(f"--workdir={workdir} holds no checkpoint; train first")
    wanted = state.place_weights(c, mesh)
    optional = [f"weights.extra.{path.replace('/', '.')}" for path in lm.TRAINING_ONLY]
    restored = read_weights(workdir / "checkpoints", wanted, say, optional)
    if restored is None:
        raise InputError(f"--workdir={workdir} holds no checkpoint yet")
    zeros = lambda like: jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
    whole = jax.tree.map(lambda like, x: zeros(like) if x is None else x, wanted, restored.state)
    restored = restored._replace(state=whole)
    broken = tensors.not_finite(restored.state)
    if broken:
        say(f"warning: checkpoint {restored.step} holds {NOT_FINITE} in {', '.join(broken)}")
    return restored


def read_weights(
    directory: epath.PathLike, abstract: Any, say: Callable[[str], None], optional: Collection[str] = ()
) -> Restored | None:
    """`Checkpoints.restore_weights` beside a run that saves, and that removes old checkpoints meanwhile.

    A checkpoint that is removed while it is read has a newer one in its place: that is taken then.
    """
    for _ in range(TRIES):
        newest, said, failure, restored = _newest_step(directory), list[str](), None, None
        try:
            with Checkpoints(directory, keep=1, keep_every=0, read_only=True) as checkpoints:
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


def _newest_step(directory: epath.PathLike) -> int:
    folder = epath.Path(directory)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def _on_any(flag: bool) -> bool:
    """Whether it is so on any process."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))
