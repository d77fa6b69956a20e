"""Codebook health, unit by unit and head by head: how codes are used, how far off keys are, how codes move.

A look costs a few products and is taken where a row of metrics is written. The row gets the averages; the
whole goes to a file of its own, `WORKDIR/codebook/step_STEP.npz` (`load` reads one):

    usage           [N,H,S] float16  keys that chose a code, over an even share of them: 1 where all codes are
                                     used alike, by the moving average
    perplexity      [N,H]  the number of codes that, used alike, would be as various
    dead            [N,H]  share of codes with less than a hundredth of an even share
    overused        [N,H]  share of codes with more than ten even shares
    relative_error  [N,H]  mean |k - c| / |k|
    churn           [N,H]  share of keys for which another code is nearest than at the last look
    norm            [N,H]  mean |c| / |k|
    norm_drift      [N,H]  norm over that of the last look, less 1

Means over keys are over the probe's, the same keys for the codebook of now and of the last look:
churn tells how much codewords move, not texts. The first look of a start compares with the codebook it began
with.
"""

import io
import re
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tvq import atomic, sharding
from tvq import model as lm

FOLDER = "codebook"


class Looks:
    """The looks of a run, each compared with the last. Every process makes one; the first writes files."""

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
        self._look = jax.jit(lm.snapshot, out_shardings=whole)
        self._before = jax.jit(lm.remember, out_shardings=whole)(weights)
        self._found: dict[str, jax.Array] = {}
        self._gamma, self._folder, self._say = gamma, workdir / FOLDER, say
        self._is_written = jax.process_index() == 0
        for later in [s for s in steps(self._folder) if s > step and self._is_written]:
            path(self._folder, later).unlink()

    def look(self, step: int, weights: lm.Weights, probe: dict) -> dict[str, jax.Array]:
        """Looks, and returns the averages, on the devices."""
        initial = self._gamma**step
        self._found, averages, self._before = self._look(weights, probe, self._before, initial)
        return averages

    def save(self, step: int) -> None:
        """Writes what the last look found. Where that fails training goes on, and says so once."""
        if self._is_written and self._found:
            try:
                save(self._folder, step, jax.device_get(self._found))
            except OSError as error:
                self._say(
                    f"codebook health cannot be written ({error}); training continues without its files"
                )
                self._is_written = False


def path(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"step_{step}.npz"


def steps(folder: epath.Path) -> list[int]:
    """The steps that there are files of, in order; none where there is no folder."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d+)\.npz", name)))


def save(folder: epath.Path, step: int, found: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **found | {"usage": found["usage"].astype(np.float16)})  # type: ignore[arg-type]
    atomic.write(path(folder, step), content.getvalue())


def load(folder: epath.Path, step: int) -> dict[str, np.ndarray]:
    """What was found at a step."""
    with np.load(io.BytesIO(path(folder, step).read_bytes())) as arrays:
        return {name: arrays[name].astype(np.float32) for name in arrays}
