"""Trains configs/debug.py for 32 updates on many shapes of the mesh, and compares: `make invariance`.

A line a shape: the largest relative deviation of a loss from that of one device, and how many of the tokens
read took another code, in the first call of four updates and in all. Twice means: again, bitwise the same.
Then shapes with train.reproducible, all bitwise the same: the state after the last update, and all metrics.
Exit 1 if a loss deviates by more than 1e-5 or bits differ.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import conftest  # noqa: F401  eight CPU devices
from tvq import config, rules, schema, sharding
from tvq.data.corpus import open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches
from tvq.training import optimizer, state, train_step

N_CALL = 8
SHAPES: list[dict[str, Any]] = [
    {},
    {"devices": 2},
    {"devices": 8},
    {"devices": 8, "shard_params": True},
    {"replica": 2},
    {"replica": 4, "devices": 2, "shard_params": True},
    {"sequence": 2},
    {"sequence": 4},
    {"tensor": 2},
    {"tensor": 8},
    {"accumulate": 4},
    {"devices": 2, "shard_params": True, "accumulate": 2},
    {"devices": 2, "sequence": 4},
    {"sequence": 4, "tensor": 2},
    {"devices": 2, "sequence": 2, "tensor": 2, "shard_params": True},
    {"replica": 2, "devices": 2, "sequence": 2, "shard_params": True, "accumulate": 2},
]
REPRODUCIBLE: list[dict[str, Any]] = [
    {"devices": 8},
    {"devices": 4, "accumulate": 2},
    {"replica": 2, "devices": 2, "accumulate": 2},
    {"devices": 2, "accumulate": 4},
    {"accumulate": 8},
]


def run(
    c: schema.Config, batches: list[dict[str, np.ndarray]]
) -> tuple[list[float], list[np.ndarray], bytes]:
    """Loss and codebook counts after each call; the last state and metrics, bit by bit."""
    n_device = math.prod(getattr(c.mesh, axis) for axis in sharding.AXES)
    devices, tx = sharding.make(c.mesh, jax.devices()[:n_device]), optimizer.make(c.optimizer, c.model)
    shardings = jax.tree.map(lambda x: x.sharding, state.place(c, tx, devices))
    now = jax.jit(lambda: state.init(c.model, tx, c.train.seed), out_shardings=shardings)()
    update = train_step.make(c, devices, tx)
    losses, counts = [], []
    for batch in batches:
        now, metrics = update(now, sharding.global_batch(devices, batch, c.train.global_batch_size))
        losses.append(float(metrics["loss_lm_per_token_unscaled"]))
        counts.append(np.asarray(now.weights.extra["codebooks"]["count"]))
    last = jax.tree.leaves((now._replace(key=0), metrics))
    return losses, counts, b"".join(np.asarray(x).tobytes() for x in last)


def shaped(base: schema.Config, shape: dict[str, Any], reproducible: bool = False) -> schema.Config:
    sizes = {"devices": 1} | {name: value for name, value in shape.items() if name != "accumulate"}
    accumulate = shape.get("accumulate", 1)
    trained = dataclasses.replace(base.train, accumulate=accumulate, reproducible=reproducible)
    c = dataclasses.replace(base, mesh=schema.Mesh(**sizes), train=trained)
    rules.validate(c)
    return c


def named(shape: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items()) or "one device"


def main() -> int:
    base = config.build(config.load(str(Path(__file__).parents[1] / "configs" / "debug.py")))
    sequences = Sequences(open_corpus(base.data), "train", base.train.sequence_len)
    reader = training_batches(sequences, batch_size=base.train.global_batch_size, seed=0)
    batches = [next(reader) for _ in range(N_CALL)]
    reader.close()
    ones: list = []
    worst = 0.0
    for i, shape in enumerate(SHAPES):
        c, began = shaped(base, shape), time.monotonic()
        losses, counts, bits = run(c, batches)
        ones = ones or [losses, counts]
        off = max(abs(a / b - 1) for a, b in zip(losses, ones[0], strict=True))
        # A code that one more token takes gains 1 - gamma; each token that changes its code shows twice.
        moved = [
            np.abs(a - b).sum() / (1 - base.model.c_gamma) / 2 for a, b in zip(counts, ones[1], strict=True)
        ]
        again = ""
        if i in (0, len(SHAPES) - 2):
            same = run(c, batches)[2] == bits
            again = "  twice: " + ("bitwise the same" if same else "DIFFERS")
            worst = worst if same else math.inf
        worst = max(worst, off)
        seconds = time.monotonic() - began
        print(
            f"{named(shape):60} loss {off:.1e}  codes {moved[0]:.1f} {moved[-1]:.1f}  {seconds:.0f} s{again}",
            flush=True,
        )
    want = b""
    for shape in REPRODUCIBLE:
        bits = run(shaped(base, shape, reproducible=True), batches)[2]
        want = want or bits
        worst = worst if bits == want else math.inf
        same = "bitwise the same" if bits == want else "DIFFERS"
        print(f"{named(shape):60} train.reproducible: {same}", flush=True)
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
