"""The snapshots of a run's codebooks: taken on the devices, compared with the last, and written down.

What a snapshot tells and how it lies in its file is in `tvq.run.health`, which knows no model.
"""

from collections.abc import Callable

import jax
from etils import epath
from jax.sharding import Mesh

from tvq import model as lm
from tvq import sharding
from tvq.run import health


class Snapshots:
    """The snapshots of a run, each compared with the last. The first process writes files."""

    def __init__(
        self,
        mesh: Mesh,
        weights: lm.Weights,
        gamma: float,
        workdir: epath.Path,
        step: int,
        say: Callable[[str], None],
    ):
        """`weights` are those of `step`; files of later steps, which the run repeats, go."""
        whole = sharding.sharding(mesh, sharding.WHOLE)
        self._snapshot = jax.jit(lm.snapshot, out_shardings=whole)
        self._before = jax.jit(lm.remember, out_shardings=whole)(weights)
        self._last: dict[str, jax.Array] = {}
        self._gamma, self._folder, self._say = gamma, workdir / health.FOLDER, say
        self._is_written = jax.process_index() == 0
        for later in [s for s in health.steps(self._folder) if s > step and self._is_written]:
            health.path(self._folder, later).unlink()

    def take(self, step: int, weights: lm.Weights, probe: dict) -> dict[str, jax.Array]:
        """Takes one, and returns the averages, on the devices."""
        initial = self._gamma**step
        self._last, averages, self._before = self._snapshot(weights, probe, self._before, initial)
        return averages

    def save(self, step: int) -> None:
        """Writes the last snapshot. Where that fails, training continues and says so once."""
        if self._is_written and self._last:
            try:
                health.save(self._folder, step, jax.device_get(self._last))
            except OSError as error:
                self._say(f"codebook health cannot be written ({error}); training continues without it")
                self._is_written = False
