"""Sampling: the nucleus and the draws by plain loops, prompts of any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.model.small import MODEL
from tvq import sample
from tvq.model import transformer

L = MODEL.block_len


def nucleus_by_hand(logits: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens, the highest id first among equals, until their probability reaches p - 1e-4."""
    e = np.exp(logits - logits.max())
    probability = e / e.sum()
    order = sorted(range(len(logits)), key=lambda i: (probability[i], i), reverse=True)
    kept, mass = np.full(len(logits), False), 0.0
    for rank, i in enumerate(order):
        if rank == 0 or mass < p - 1e-4:
            kept[i] = True
        mass += probability[i]
    return np.where(kept, logits, -1e10)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_nucleus(p):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 12)).astype(np.float32) * 2
    logits[5:10] = np.round(logits[5:10])  # ties
    logits[10] = 0.0  # all equal
    got = sample.nucleus(jnp.asarray(logits), p)
    for row, want in zip(got, (nucleus_by_hand(row, p) for row in logits), strict=True):
        np.testing.assert_array_equal(row, want)


def test_nucleus_of_nothing_is_greedy_and_of_all_is_all():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0]])
    np.testing.assert_array_equal(sample.nucleus(logits, 0.0), [[-1e10, -1e10, 3.0, -1e10]])
    np.testing.assert_array_equal(sample.nucleus(logits, 1.0), logits)


def log_probs(n_sequence: int, n_vocab: int = 5) -> jax.Array:
    rng = np.random.default_rng(0)
    row = jax.nn.log_softmax(jnp.asarray(rng.normal(size=n_vocab), jnp.float32))
    return jnp.broadcast_to(row[None], (n_sequence, n_vocab))


choose = jax.jit(sample.choose, static_argnums=(3, 4))


def test_temperature_zero_takes_the_likeliest():
    got = choose(log_probs(4), jax.random.key(0), jnp.int32(0), 0.0, 0.5)
    np.testing.assert_array_equal(got, np.full(4, np.argmax(log_probs(1)[0])))
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(("temperature", "p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (0.5, 0.9)])
def test_tokens_come_as_often_as_they_should(temperature, p):
    n = 4000
    drawn = choose(log_probs(n), jax.random.key(0), jnp.int32(0), temperature, p)
    logits = nucleus_by_hand(np.asarray(log_probs(1)[0]) / temperature, p)
    want = np.exp(logits) / np.exp(logits).sum()
    got = np.bincount(drawn, minlength=5) / n
    assert np.all(np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / n))


def test_a_draw_is_a_function_of_key_position_and_sequence():
    draw = lambda n, seed, position: np.asarray(
        choose(log_probs(n, 50), jax.random.key(seed), jnp.int32(position), 1.0, 1.0)
    )
    first = draw(64, 0, 0)
    np.testing.assert_array_equal(draw(64, 0, 0), first)
    np.testing.assert_array_equal(draw(16, 0, 0), first[:16])  # not of how many there are
    assert len(set(first)) > 10
    assert np.mean(draw(64, 1, 0) == first) < 0.3
    assert np.mean(draw(64, 0, 1) == first) < 0.3


@functools.cache
def greedy_by_hand(prompt: tuple[int, ...], length: int) -> list[int]:
    """The whole text read again for every token, padded: what follows changes nothing."""
    text = list(prompt)
    n_padded = 7 * L
    for _ in range(length):
        padded = jnp.asarray([text + [0] * (n_padded - len(text))], jnp.int32)
        found, _ = small.log_probs(
            *small.parameters(MODEL), padded, transformer.initial_state(MODEL, 1), MODEL
        )
        text.append(int(np.argmax(found[0, len(text) - 1])))
    return text[len(prompt) :]


def draw(prompt: np.ndarray, seed: int = 0, length: int = 8, temperature: float = 0.0) -> np.ndarray:
    return sample.draw(
        *small.parameters(MODEL), prompt, jax.random.key(seed), model=MODEL, length=length,
        temperature=temperature, p_nucleus=0.9,
    )  # fmt: skip


# One token; up to a block; one more; some blocks and a rest; many blocks.
@pytest.mark.parametrize("n_prompt", [1, L, L + 1, 2 * L + 3, 4 * L + 1])
def test_greedy_text_is_that_of_the_full_forward(n_prompt):
    prompt = np.asarray(small.tokens(2, n_prompt, seed=n_prompt))
    got = draw(prompt)
    assert got.dtype == np.int32
    for row, tokens in zip(got, prompt, strict=True):
        assert row.tolist() == greedy_by_hand(tuple(tokens.tolist()), 8)


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    prompt = np.asarray(small.tokens(2, 4 * L + 1))
    want = draw(prompt)
    monkeypatch.setattr(sample, "READ_BLOCKS", 2)
    np.testing.assert_array_equal(draw(prompt), want)


def test_samples_differ_by_seed_and_by_row_and_repeat():
    prompt = np.ones((3, 1), np.int32)
    first = draw(prompt, temperature=1.0)
    np.testing.assert_array_equal(draw(prompt, temperature=1.0), first)
    assert not np.array_equal(draw(prompt, seed=1, temperature=1.0), first)
    assert len({tuple(row) for row in first.tolist()}) == 3
    # A shorter text is the beginning of a longer one.
    np.testing.assert_array_equal(draw(prompt, temperature=1.0, length=5), first[:, :5])
