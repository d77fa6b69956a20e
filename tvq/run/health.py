"""Codebook health, unit by unit and head by head: how codes are used, how far off keys are, how codes move.

A snapshot costs a few products and is taken where a row of metrics is written. The row gets the averages; the
whole goes to a file of its own, `WORKDIR/codebook/step_STEP.npz` (`load` reads one):

    usage           [N,H,S] float16  keys that chose a code, over an even share of them: 1 where all codes are
                                     used alike, by the moving average
    perplexity      [N,H]  the number of codes that, used alike, would be as various
    dead            [N,H]  share of codes with less than a hundredth of an even share
    overused        [N,H]  share of codes with more than ten even shares
    relative_error  [N,H]  mean |k - c| / |k|
    churn           [N,H]  share of keys for which another code is nearest than at the last snapshot
    norm            [N,H]  mean |c| / |k|
    norm_drift      [N,H]  norm over that of the last snapshot, less 1

Means over keys are over the probe's, the same keys for the codebook of now and of the last snapshot:
churn tells how much codewords move, not texts. The first snapshot of a start compares with the codebook
that it began with.
"""

import io
import re

import numpy as np
from etils import epath

from tvq import atomic

FOLDER = "codebook"


def path(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"step_{step}.npz"


def steps(folder: epath.Path) -> list[int]:
    """The steps that there are files of, in order; none where there is no folder."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)\.npz", name)))


def save(folder: epath.Path, step: int, snapshot: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **snapshot | {"usage": snapshot["usage"].astype(np.float16)})  # type: ignore[arg-type]
    atomic.write(path(folder, step), content.getvalue())


def load(folder: epath.Path, step: int) -> dict[str, np.ndarray]:
    """The snapshot of a step."""
    with np.load(io.BytesIO(path(folder, step).read_bytes())) as arrays:
        return {name: arrays[name].astype(np.float32) for name in arrays}
