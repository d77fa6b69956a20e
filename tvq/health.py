"""Codebook health, unit by unit and head by head: how codes are used, how far off keys are, how codes move.

A look costs a few products and is taken where a row of metrics is written. The row gets the averages; the
whole goes to a file of its own, `WORKDIR/codebook/step_STEP.npz` (`load` reads one):

    usage           [N,H,S] float16  keys that chose a code, over an even share of them: 1 where all codes are
                                     used alike, by the moving average
    perplexity      [N,H]  the number of codes that, used alike, would be as various
    dead            [N,H]  share of codes with less than DEAD of an even share
    overused        [N,H]  share of codes with more than OVERUSED even shares
    relative_error  [N,H]  mean |k - c| / |k|
    churn           [N,H]  share of keys for which another code is nearest than at the last look
    norm            [N,H]  mean |c| / |k|
    norm_drift      [N,H]  norm over that of the last look, less 1

Means over keys are over the probe's (`vq.Probe`), the same keys for the codebook of now and of the last look:
churn tells how much codewords move, not texts. The first look of a start compares with the codebook it began
with.
"""

import io
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tvq import atomic, mesh
from tvq.model import vq

FOLDER = "codebook"
DEAD, OVERUSED = 0.01, 10.0
# Averages of these are in a row of metrics, after `c_`; that of relative_error is there already.
IN_ROWS = ("perplexity", "dead", "overused", "churn", "norm_drift")


def use(codebook: dict, initial: jax.Array | float) -> dict[str, jax.Array]:
    """What one unit's moving averages alone tell.

    `initial` is what is left in them of the count of one that every code starts with, c_gamma^step: it would
    hide for hundreds of updates that a code was never chosen.
    """
    count_HS = jnp.maximum(codebook["count"] - initial, 0.0)
    p_HS = count_HS / jnp.maximum(jnp.sum(count_HS, -1, keepdims=True), 1e-30)
    usage_HS = p_HS * p_HS.shape[-1]
    entropy_H = -jnp.sum(jnp.where(p_HS > 0, p_HS * jnp.log(p_HS), 0.0), -1)
    return {
        "usage": usage_HS,
        "perplexity": jnp.exp(entropy_H),
        "dead": jnp.mean(usage_HS < DEAD, -1),
        "overused": jnp.mean(usage_HS > OVERUSED, -1),
    }


def look(
    codebook: dict, probe: dict, before_HSK: jax.Array, initial: jax.Array | float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The health of one unit's codebook, and its codewords for the next look."""
    c_HSK, k_BHTK = vq.codewords(codebook), probe["key"][None]
    z_BHT = vq.nearest(k_BHTK, c_HSK)
    error_HX = jnp.sqrt(vq.squared_error(k_BHTK, vq.lookup(z_BHT, c_HSK)))[0]
    size_HX = jnp.linalg.norm(probe["key"], axis=-1)
    weight_X = probe["mask"] / jnp.maximum(probe["mask"].sum(), 1)
    mean = lambda x_HX: jnp.sum(x_HX * weight_X[None], -1)
    used = use(codebook, initial)
    p_HS = used["usage"] / c_HSK.shape[1]
    norm = lambda c_HSK: jnp.sum(p_HS * jnp.linalg.norm(c_HSK, axis=-1), -1)
    key_H = jnp.maximum(mean(size_HX), 1e-30)
    found = used | {
        "relative_error": mean(error_HX) / key_H,
        "churn": mean(z_BHT[0] != vq.nearest(k_BHTK, before_HSK)[0]),
        "norm": norm(c_HSK) / key_H,
        "norm_drift": norm(c_HSK) / norm(before_HSK) - 1.0,
    }
    return found, c_HSK


def look_at_all(
    codebooks: dict, probe: dict, before_NHSK: jax.Array, initial: jax.Array | float
) -> tuple[dict, dict, jax.Array]:
    """What is found in all units, its averages, and the codewords."""
    found, c_NHSK = jax.vmap(look, in_axes=(0, 0, 0, None))(codebooks, probe, before_NHSK, initial)
    return found, {f"c_{name}": found[name].mean() for name in IN_ROWS}, c_NHSK


class Looks:
    """The looks of a run, each compared with the last. Every process makes one; the first writes files."""

    def __init__(
        self,
        devices: Mesh,
        codebooks: dict,
        gamma: float,
        workdir: epath.Path,
        step: int,
        say: Callable[[str], None],
    ):
        """`codebooks` are those of `step`; files of later steps, which the run repeats, go."""
        whole = mesh.sharding(devices, mesh.WHOLE)
        self._look = jax.jit(look_at_all, out_shardings=whole)
        self._before = jax.jit(jax.vmap(vq.codewords), out_shardings=whole)(codebooks)
        self._found: dict[str, jax.Array] = {}
        self._gamma, self._folder, self._say = gamma, workdir / FOLDER, say
        self._is_written = jax.process_index() == 0
        for later in [s for s in steps(self._folder) if s > step and self._is_written]:
            path(self._folder, later).unlink()

    def look(self, step: int, codebooks: dict, probe: dict) -> dict[str, jax.Array]:
        """Looks, and returns the averages, on the devices."""
        initial = self._gamma**step
        self._found, averages, self._before = self._look(codebooks, probe, self._before, initial)
        return averages

    def save(self, step: int) -> None:
        """Writes what the last look found. Where that fails training goes on, and says so once."""
        if self._is_written:
            try:
                save(self._folder, step, jax.device_get(self._found))
            except OSError as error:
                self._say(f"codebook health cannot be written ({error}); training goes on without its files")
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
