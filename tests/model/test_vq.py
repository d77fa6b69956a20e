"""Codebooks against plain loops and explicit formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tvq.model import layers, transformer, vq
from tvq.training import train_step

B, H, T, K, S = 2, 2, 6, 3, 5


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codebook(seed: int = 0) -> dict:
    count = np.random.default_rng(seed).uniform(0.5, 3.0, (H, S)).astype(np.float32)
    count[0, 1], count[1, 2] = 0.001, 2e6  # below the floor of a count, and beyond its bound
    return {"sum": random(H, S, K, seed=seed) * count[..., None], "count": count}


def test_codewords_are_means_of_at_least_a_hundredth_of_a_key():
    book = codebook()
    for h in range(H):
        for s in range(S):
            want = book["sum"][h, s] / max(book["count"][h, s], 0.01)
            np.testing.assert_allclose(vq.codewords(book)[h, s], want, rtol=1e-6)


def test_nearest_is_the_nearest():
    k, c = random(B, H, T, K), random(H, S, K, seed=1)
    got = jax.jit(vq.nearest)(k, c)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                assert got[b, h, t] == np.argmin(np.linalg.norm(k[b, h, t] - c[h], axis=1))


def test_the_lowest_of_equal_codes_is_taken():
    c = np.ones((1, 4, 2), np.float32)
    c[0, 0] = 9.0  # codes 1, 2, 3 are one point
    k = np.asarray([[1.0, 1.0], [0.0, 0.0], [-3.0, 2.0]], np.float32)[None, None]
    np.testing.assert_array_equal(vq.nearest(k, c), np.full((1, 1, 3), 1))
    # Two different codewords at equal distance.
    c = np.asarray([[[0.0, 5.0], [1.0, 0.0], [-1.0, 0.0]]], np.float32)
    assert vq.nearest(np.zeros((1, 1, 1, 2), np.float32), c).item() == 1


def test_lookup_gives_codewords_and_zeros_for_an_empty_slot():
    c = random(H, S, K)
    z = np.asarray([[[0, S, 2], [4, 4, S]]], np.int32)
    got = vq.lookup(z, c)
    for h in range(H):
        for t in range(3):
            want = np.zeros(K) if z[0, h, t] == S else c[h, z[0, h, t]]
            np.testing.assert_array_equal(got[0, h, t], want)


def test_straight_through_has_the_value_of_the_codeword_and_the_gradient_of_the_key():
    k, codeword, toward = random(B, H, T, K), random(B, H, T, K, seed=1), random(B, H, T, K, seed=2)
    np.testing.assert_allclose(vq.straight_through(k, codeword), codeword, atol=1e-6)
    to_k, to_codeword = jax.grad(lambda k, c: jnp.sum(vq.straight_through(k, c) * toward), (0, 1))(
        k, codeword
    )
    np.testing.assert_array_equal(to_k, toward)
    np.testing.assert_array_equal(to_codeword, np.zeros_like(codeword))


def test_squared_error_pulls_the_key_alone():
    k, codeword = random(B, H, T, K), random(B, H, T, K, seed=1)
    np.testing.assert_allclose(vq.squared_error(k, codeword), ((k - codeword) ** 2).sum(-1), rtol=1e-6)
    to_k, to_codeword = jax.grad(lambda k, c: jnp.sum(vq.squared_error(k, c)), (0, 1))(k, codeword)
    np.testing.assert_allclose(to_k, 2 * (k - codeword), rtol=1e-6)
    np.testing.assert_array_equal(to_codeword, np.zeros_like(codeword))


def summed(k: np.ndarray, z: np.ndarray, mask: np.ndarray) -> dict:
    want = {"sum": np.zeros((H, S, K)), "count": np.zeros((H, S))}
    for b in range(B):
        for h in range(H):
            for t in range(T):
                if mask[b, t]:
                    want["sum"][h, z[b, h, t]] += k[b, h, t]
                    want["count"][h, z[b, h, t]] += 1
    return want


def test_statistics_leave_masked_tokens_out():
    rng = np.random.default_rng(0)
    k, z = random(B, H, T, K), rng.integers(0, S, (B, H, T))
    for mask in (np.ones((B, T), np.int32), rng.integers(0, 2, (B, T)), np.zeros((B, T), np.int32)):
        got, want = jax.jit(vq.statistics, static_argnums=3)(k, z, mask, S), summed(k, z, mask)
        np.testing.assert_allclose(got["sum"], want["sum"], atol=1e-6)
        np.testing.assert_array_equal(got["count"], want["count"])


def test_moving_average_is_a_weighted_sum_of_all_updates():
    gamma, n_update = 0.9, 4
    first = codebook()
    stats = [{"sum": random(H, S, K, seed=i), "count": abs(random(H, S, seed=i))} for i in range(n_update)]
    book = first
    for new in stats:
        book = vq.moving_average(book, new, gamma)
    for name in ("sum", "count"):
        want = gamma**n_update * first[name].astype(np.float64)
        for i, new in enumerate(stats):
            want += (1 - gamma) * gamma ** (n_update - 1 - i) * new[name]
        np.testing.assert_allclose(book[name], want, rtol=1e-5, atol=1e-6)


def naive_metrics(book: dict) -> dict:
    """Per head, then averaged; distances through differences [S,S,K]."""
    heads: dict[str, list] = {}
    for h in range(H):
        n = np.maximum(book["count"][h].astype(np.float64), 0.01)
        c = book["sum"][h] / n[:, None]
        norm, p = np.linalg.norm(c, axis=1), n / n.sum()
        other = ~np.eye(S, dtype=bool)
        cosine = np.sum(c[:, None] * c[None, :], -1) / (norm[:, None] * norm[None, :])
        distance = np.linalg.norm(c[:, None] - c[None, :], axis=-1)
        values = {"c_norm": norm, "c_usage": n, "c_sim": cosine[other], "c_dist": distance[other]}
        for name, value in values.items():
            for how in ("min", "mean", "max"):
                heads.setdefault(f"{name}_{how}", []).append(getattr(value, how)())
        heads.setdefault("c_entropy", []).append(-np.sum(p * np.log(p)))
        heads.setdefault("c_thresh_oob", []).append(np.sum((n < 1) | (n > 1e6)))
    return {name: np.mean(values) for name, values in heads.items()}


def test_codebook_metrics():
    got, want = jax.jit(vq.codebook_metrics)(codebook()), naive_metrics(codebook())
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert got["c_thresh_oob"] > 0


def test_key_metrics():
    k, codeword = random(B, H, T, K), random(B, H, T, K, seed=1)
    e2 = ((k - codeword) ** 2).sum(-1)
    got = vq.key_metrics(k, codeword, e2, block_len=3)
    relative = np.sqrt(e2) / np.linalg.norm(k, axis=-1)
    blocks = [relative[:, :, t : t + 3] for t in range(0, T, 3)]
    want = {
        "vec_norm_mean": np.linalg.norm(k, axis=-1).mean(),
        "vec_hat_norm_mean": np.linalg.norm(codeword, axis=-1).mean(),
        "relative_err_min": np.mean([block.min(-1) for block in blocks]),
        "relative_err_mean": relative.mean(),
        "relative_err_max": np.mean([block.max(-1) for block in blocks]),
    }
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_the_same_in_training_evaluation_and_decoding(dtype):
    n_token = 16
    model = dataclasses.replace(small.MODEL, dtype=dtype, mem_len=n_token)
    weights = small.parameters(model)
    tokens = small.tokens(2, n_token)
    batch = {"inputs": tokens, "targets": tokens, "loss_mask": jnp.ones_like(tokens)}
    empty = transformer.start(model, 2)

    gradient = jax.jit(jax.value_and_grad(train_step.loss_fn, has_aux=True), static_argnums=5)
    (_, (trained, _, _)), _ = gradient(*weights, batch, empty, None, model)
    # Blocks of another length make other shapes of every product.
    longer = dataclasses.replace(model, block_len=8)
    _, evaluated = small.log_probs(weights, tokens, empty, longer)
    np.testing.assert_array_equal(evaluated.units.z_BHM, trained.units.z_BHM)

    decode = jax.jit(transformer.step, static_argnums=3)
    decoded = transformer.begin(weights, empty, model)
    for t in range(n_token):
        _, decoded = decode(weights, tokens[:, t], decoded, model)
    np.testing.assert_array_equal(decoded.rings.z_NBHX[..., :n_token], trained.units.z_BHM)
    assert len(np.unique(trained.units.z_BHM)) > 4


def test_a_probe_reads_its_keys_wherever_they_lie():
    """Two devices of one sequence each, three tokens at a time: the parts add up to the keys, exactly."""
    k, mask = random(B, H, T, K), np.random.default_rng(0).integers(0, 2, (B, T))
    probe = np.asarray([[0, 10], [0, 13], [1, 12], [1, 15]])  # sequence, position; the first token is at 10
    parts = []
    for b in range(B):
        for t in (0, 3):
            draws = layers.Draws(None, None, jnp.asarray([b]), jnp.asarray(probe))
            local = layers.local_probe(draws, jnp.asarray(10 + t), 3)
            parts.append(
                local.statistics(jnp.asarray(k[b : b + 1, :, t : t + 3]), mask[b : b + 1, t : t + 3])
            )
    got = jax.tree.map(lambda *x: sum(x), *parts)
    np.testing.assert_array_equal(got["key"], np.stack([k[b, :, t - 10] for b, t in probe], 1))
    np.testing.assert_array_equal(got["mask"], [mask[b, t - 10] for b, t in probe])


@pytest.mark.parametrize(("n_sequence", "n_token"), [(3, 7), (8, 100)])
def test_a_probe_takes_a_token_of_each_equal_stretch(n_sequence, n_token):
    drawn = {}
    for seed in range(2):
        got = np.asarray(layers.draw_probe(jax.random.key(seed), n_sequence, n_token))
        n = min(layers.N_PROBE, n_sequence * n_token)
        assert got.shape == (n, 2)
        assert (got[:, 1] < n_token).all()
        flat = got[:, 0] * n_token + got[:, 1]
        np.testing.assert_array_equal((flat + 1) * n // (n_sequence * n_token + 1e-9), np.arange(n))
        drawn[seed] = got.tobytes()
    assert (drawn[0] == drawn[1]) == (n_sequence * n_token <= layers.N_PROBE)


def test_idle_codes_are_seeded_with_keys_the_longest_idle_first():
    n_update, n_key = 3, 4
    averaged = codebook(seed=1)
    stats = {
        "count": np.asarray([[0, 0, 2, 0, 0], [1, 0, 0, 0, 0]], np.float32),
        "probe": {"key": random(H, n_key, K, seed=2), "mask": np.asarray([1, 0, 1, 1])},
    }
    idle = np.asarray([[2, 9, 9, 1, 5], [9, 2, 1, 8, 2]], np.int32)
    got = jax.jit(vq.revive, static_argnums=3)({"idle": idle}, averaged, stats, n_update)
    # Codes in the order of idleness; the second would have had the masked key.
    seeded = [{1: 0, 0: 2}, {3: 0, 4: 2}]
    want_idle = [[0, 0, 0, 2, 6], [0, 3, 2, 0, 0]]
    want = {name: averaged[name].copy() for name in ("sum", "count")}
    for h in range(H):
        for s, x in seeded[h].items():
            want["sum"][h, s], want["count"][h, s] = stats["probe"]["key"][h, x], 1.0
    np.testing.assert_array_equal(got["idle"], want_idle)
    for name in ("sum", "count"):
        np.testing.assert_array_equal(got[name], want[name])
