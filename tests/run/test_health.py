"""Snapshots of codebooks, against plain loops; their files."""

import jax
import numpy as np
import pytest
from etils import epath

from tvq import model as lm
from tvq import schema, sharding
from tvq.run import health
from tvq.run.snapshots import Snapshots

N, H, S, K, X = 2, 2, 12, 3, 5
GAMMA = 0.5
RNG = np.random.default_rng(0)
KEY = RNG.normal(size=(N, H, X, K)).astype(np.float32)
MASK = np.asarray([[1, 0, 1, 1, 1]] * N)


def weights(seed: int) -> lm.Weights:
    rng = np.random.default_rng(seed)
    count = rng.uniform(1.0, 2.0, (N, H, S)).astype(np.float32)
    count[0, 1, 3:] = 0.001  # three codes in use
    count[1, 0, 0] = 1000.0  # nearly all keys choose one
    codebooks = {"sum": rng.normal(size=(N, H, S, K)).astype(np.float32) * count[..., None], "count": count}
    return lm.Weights({}, {"codebooks": codebooks})


def codebooks_of(weights: lm.Weights) -> dict:
    return weights.extra["codebooks"]


def written_out(now: dict, before: dict, initial: float) -> dict:
    """The definitions of the module's first lines, a head at a time."""
    found: dict[str, list] = {}
    for n in range(N):
        for h in range(H):
            count = np.maximum(now["count"][n, h] - initial, 0.0)
            p = count / count.sum()
            old, new = (
                book["sum"][n, h] / np.maximum(book["count"][n, h], 0.01)[:, None] for book in (before, now)
            )
            keys = KEY[n, h, MASK[n] == 1]
            far = lambda c, keys=keys: np.linalg.norm(keys[:, None] - c[None], axis=-1)
            size = np.linalg.norm(keys, axis=-1).mean()
            norm = lambda c, p=p, size=size: (p * np.linalg.norm(c, axis=-1)).sum() / size
            values = {
                "usage": p * S,
                "perplexity": np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()),
                "dead": np.mean(p * S < 0.01),
                "overused": np.mean(p * S > 10),
                "relative_error": far(new).min(1).mean() / size,
                "churn": np.mean(far(new).argmin(1) != far(old).argmin(1)),
                "norm": norm(new),
                "norm_drift": norm(new) / norm(old) - 1,
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
    return {name: np.reshape(x, (N, H, *np.shape(x[0]))) for name, x in found.items()}


@pytest.fixture
def snapshots(tmp_path):
    return Snapshots(
        sharding.make(schema.Mesh(), jax.devices()[:1]), weights(1), GAMMA, epath.Path(tmp_path), 0, print
    )


def test_a_snapshot_compares_with_the_last(snapshots, tmp_path):
    probe = {"key": KEY, "mask": MASK}
    for step, seed in ((10, 2), (20, 3)):
        averages = snapshots.take(step, weights(seed), probe)
        snapshots.save(step)
        want = written_out(codebooks_of(weights(seed)), codebooks_of(weights(seed - 1)), GAMMA**step)
        got = health.load(epath.Path(tmp_path) / "codebook", step)
        assert set(got) == set(want)
        for name, value in want.items():
            tolerance = 1e-3 if name == "usage" else 1e-5  # its file has float16
            np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=1e-6, err_msg=name)
        for name in lm.IN_ROWS:
            np.testing.assert_allclose(averages[f"c_{name}"], want[name].mean(), rtol=1e-5, err_msg=name)
    assert want["churn"].any()
    assert want["dead"][0, 1] == 0.75
    assert want["overused"][1, 0] > 0


def test_files_of_steps_that_are_repeated_go(snapshots, tmp_path):
    folder = epath.Path(tmp_path) / "codebook"
    assert health.steps(folder) == []
    snapshots.take(1, weights(2), {"key": KEY, "mask": MASK})
    for step in (2, 10, 100):
        snapshots.save(step)
    (folder / "step_3.npz.tmp").write_bytes(b"torn")
    assert health.steps(folder) == [2, 10, 100]
    Snapshots(
        sharding.make(schema.Mesh(), jax.devices()[:1]), weights(1), GAMMA, epath.Path(tmp_path), 10, print
    )
    assert health.steps(folder) == [2, 10]


def test_a_folder_that_cannot_be_written_is_said_once(snapshots, tmp_path, capsys):
    (tmp_path / "codebook").write_text("a file")
    snapshots.take(1, weights(2), {"key": KEY, "mask": MASK})
    snapshots.save(2)
    snapshots.save(4)
    assert health.steps(epath.Path(tmp_path) / "codebook") == [], "nor does it stop the next start"
    assert capsys.readouterr().out.count("training continues without") == 1


def test_no_array_of_two_codes_and_a_width():
    """[S,S,K] would be the largest by far."""
    jaxpr = jax.make_jaxpr(lm.snapshot)(
        weights(1), {"key": KEY, "mask": MASK}, codebooks_of(weights(2))["sum"], 0.0
    )
    assert max(x.aval.size for e in jaxpr.eqns for x in e.outvars) <= N * H * X * S
