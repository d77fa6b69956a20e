"""Running sums over blocks: few are written out, many are computed by halves, to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.small import close
from tvq.model import cache


@pytest.mark.parametrize("apart", [False, True])
def test_sums_written_out_are_the_sums(monkeypatch, apart):
    """Values and gradients, five blocks of three sequences."""
    rng = np.random.default_rng(0)
    x0, x, weight = (jnp.asarray(rng.normal(size=(3, 2, *n, 4))) for n in ((), (5,), (6,)))
    kept = jnp.asarray(rng.integers(0, 2, (3, 5)), bool) if apart else None

    def running(unrolled: int) -> tuple:
        monkeypatch.setattr(cache, "UNROLLED", unrolled)
        sums = lambda x0, x: cache.running(x0, x, kept)
        value, back = jax.vjp(sums, x0, x)
        return value, back(weight)

    written, halved = jax.jit(lambda: running(5))(), jax.jit(lambda: running(4))()
    close(written, halved, 1e-6)
    assert not apart or not np.array_equal(written[0], jax.jit(lambda: cache.running(x0, x))())
