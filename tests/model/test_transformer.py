"""The whole model: causality, decoding, dropout, size of the compiled program."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import small
from tests.model.small import MODEL, close
from tvq.model import layers, parameters, transformer
from tvq.model.layers import Draws
from tvq.model.parameters import Weights
from tvq.model.unit import gated_unit
from tvq.schema import END, Model

# Every option that changes what is computed without randomness.
OTHER = dataclasses.replace(MODEL, pe_abs=True, e_tie=True, e_preln=True, e_scale=0.5, block_len=5, mem_len=3)
APART, OTHER_APART = (dataclasses.replace(m, attend_across_documents=False) for m in (MODEL, OTHER))


@functools.partial(jax.jit, static_argnums=0)
def sensitivity(model: Model, weights: Weights, tokens: jax.Array) -> jax.Array:
    """How much each output depends on each row of the table `[T,C]`: the largest entry of their Jacobian."""
    toward = jax.random.normal(jax.random.key(1), (tokens.shape[1], model.n_vocab))

    def outputs(table: jax.Array) -> jax.Array:
        params = weights.params | {"embed": weights.params["embed"] | {"table": table}}
        log_probs, _ = small.forward(
            weights._replace(params=params), tokens, transformer.start(model, 1), model
        )
        return jnp.sum(log_probs[0] * toward, 1)

    return jnp.abs(jax.jacrev(outputs)(weights.params["embed"]["table"])).max(-1)


@pytest.mark.parametrize("agg_cache", [True, False])
def test_causality_by_jacobian(agg_cache):
    T, M = 30, 3
    model = dataclasses.replace(MODEL, n_vocab=T, block_len=5, mem_len=M, agg_cache=agg_cache)
    # Token t is id t, so that a row of the table is one position.
    got = np.asarray(sensitivity(model, small.parameters(model), jnp.arange(T)[None]))
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    assert (got[back < 0] == 0).all(), "an output sees a later token"
    # Two units reach back twice the memory; everything before comes through the cache alone.
    reach = 2 * M
    assert (got[(back >= 0) & (back <= reach)] > 1e-6).all(), "an output does not see a token of its window"
    if agg_cache:
        assert (got[back > reach] > 1e-9).all(), "an output does not see a token through the cache"
    else:
        assert (got[back > reach] == 0).all(), "an output sees beyond its memory"


def test_a_later_token_changes_no_earlier_output():
    """A Jacobian does not see codes change: here the token itself does."""
    weights = small.parameters(MODEL)
    empty = transformer.start(MODEL, 1)
    tokens = small.tokens(1, 24)
    want, _ = small.log_probs(weights, tokens, empty, MODEL)
    for t in (0, 5, 13, 23):
        changed = tokens.at[0, t].set((tokens[0, t] + 1) % MODEL.n_vocab)
        got, _ = small.log_probs(weights, changed, empty, MODEL)
        np.testing.assert_array_equal(got[:, :t], want[:, :t])
        assert np.all(np.abs(got - want)[0, t:].max(-1) > 0)


@pytest.mark.slow
def test_a_document_is_the_same_alone_and_behind_others():
    """Its log-probabilities; and nothing of it pulls at the others, nor they at it."""
    documents = [(0, 7), (7, 16), (16, 17), (17, 29), (29, 40)]
    tokens = np.arange(2, 42)[None]
    tokens[0, [start for start, _ in documents]] = END
    with jax.enable_x64(True):
        # Not tied: a row of the table is then nothing but an input.
        model = dataclasses.replace(
            OTHER_APART, n_vocab=42, e_tie=False, dtype="float64", param_dtype="float64"
        )
        weights = small.parameters(model)
        empty = transformer.start(model, 1)
        packed, _ = small.log_probs(weights, tokens, empty, model)
        for start, stop in documents:
            alone = np.pad(tokens[:, start:stop], [(0, 0), (0, 40 - (stop - start))])
            got, _ = small.log_probs(weights, alone, empty, model)
            close(got[:, : stop - start], packed[:, start:stop], 1e-9)
        pull = np.asarray(sensitivity(model, weights, tokens))[:, tokens[0]]
    number = np.searchsorted([start for start, _ in documents], np.arange(40), "right")
    other, end = number[:, None] != number[None], tokens == END
    assert (pull[other & ~end] == 0).all(), "a document pulls at another"
    assert (pull[~other & np.tri(40, dtype=bool)] > 1e-12).all(), "a document does not see itself"


@pytest.mark.slow
def test_decoding_goes_on_only_with_the_document():
    """What a carried state holds of documents that have ended is as if it never was."""
    weights = small.parameters(APART)
    head = jnp.full((1, 8), 5).at[0, [0, 6]].set(END)
    states = []
    for tokens in (head, head.at[0, 1:6].set(7)):
        _, state = small.log_probs(weights, tokens, transformer.start(APART, 1), APART)
        states.append(decode_all(weights, small.tokens(1, 12), state, APART))
    np.testing.assert_array_equal(*states)


@functools.partial(jax.jit, static_argnums=3)
def decode_all(weights: Weights, tokens: jax.Array, state: transformer.State, model: Model) -> jax.Array:
    def step(decoding: transformer.Decoding, token: jax.Array) -> tuple:
        return transformer.step(weights, token, decoding, model)[::-1]

    first = transformer.begin(weights, state, model)
    return jax.lax.scan(step, first, tokens.T)[1].swapaxes(0, 1)


WINDOW_ALONE = dataclasses.replace(MODEL, agg_cache=False)
DECODED = [(MODEL, "float64"), (MODEL, "float32"), (OTHER, "float64"), (WINDOW_ALONE, "float64")]
DECODED += [(APART, "float32"), (OTHER_APART, "float64")]
# The first and the last have everything between them; the others take long.
DECODED[1:-1] = [pytest.param(*case, marks=pytest.mark.slow) for case in DECODED[1:-1]]


@pytest.mark.parametrize(("model", "dtype"), DECODED, ids=lambda x: x if isinstance(x, str) else "")
def test_decoding_is_the_forward(model, dtype):
    tolerance = {"float32": 1e-5, "float64": 1e-9}[dtype]
    with jax.enable_x64(dtype == "float64"):
        model = dataclasses.replace(model, dtype=dtype, param_dtype=dtype)
        weights = small.parameters(model)
        L = model.block_len
        tokens, empty = small.tokens(2, 5 * L), transformer.start(model, 2)
        want, _ = small.log_probs(weights, tokens, empty, model)
        assert want.dtype == dtype
        close(decode_all(weights, tokens, empty, model), want, tolerance)
        head, state = small.log_probs(weights, tokens[:, : 2 * L], empty, model)
        tail = decode_all(weights, tokens[:, 2 * L :], state, model)
        close(jnp.concatenate([head, tail], 1), want, tolerance)


@pytest.mark.parametrize(
    "model", [pytest.param(OTHER, marks=pytest.mark.slow), OTHER_APART], ids=["across", "apart"]
)
def test_pieces_are_the_whole(model):
    """One call, or one for each block, with the state carried: the same outputs and the same last state."""
    weights = small.parameters(model)
    L = model.block_len
    tokens, state = small.tokens(2, 4 * L), transformer.start(model, 2)
    want, last = small.log_probs(weights, tokens, state, model)
    got = []
    for t in range(0, 4 * L, L):
        piece, state = small.log_probs(weights, tokens[:, t : t + L], state, model)
        got.append(piece)
    close(jnp.concatenate(got, 1), want, 1e-5)
    close(state, last, 1e-5)


RATES = {"p_dropemb": 0.2, "p_dropsin": 0.2, "p_dropres": 0.3, "p_droplyr": 0.5}


def draws(n_sequence: int, first: int = 0, ephemeral: int = 0, timeless: int = 0) -> Draws:
    return Draws(jax.random.key(ephemeral), jax.random.key(1000 + timeless), first + jnp.arange(n_sequence))


run = jax.jit(transformer.forward, static_argnums=4)


def hidden(model: Model, tokens: jax.Array, d: Draws | None) -> jax.Array:
    state = transformer.start(model, tokens.shape[0])
    return run(small.parameters(model), tokens, jnp.ones_like(tokens), state, model, d)[0]


@pytest.mark.slow
def test_draws_do_not_depend_on_how_the_batch_is_cut():
    model = dataclasses.replace(MODEL, **RATES)
    tokens = small.tokens(4, 8)
    whole = hidden(model, tokens, draws(4))
    for first in (0, 2):
        part = hidden(model, tokens[first : first + 2], draws(2, first))
        close(part, whole[first : first + 2], 1e-6)
    # Equal sequences at other places of the batch are dropped differently.
    same = hidden(model, jnp.broadcast_to(tokens[:1], tokens.shape), draws(4))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(np.asarray(same), 2))


@pytest.mark.slow
@pytest.mark.parametrize("rate", list(RATES))
def test_each_kind_of_dropout_draws(rate):
    """And from its own stream: layers and sinusoids once a call, embedding and residual at every update."""
    model = dataclasses.replace(MODEL, **{rate: 0.5})
    tokens = small.tokens(4, 8)
    off, first = hidden(MODEL, tokens, None), hidden(model, tokens, draws(4))
    assert np.abs(first - off).max() > 1e-3
    np.testing.assert_array_equal(hidden(model, tokens, draws(4)), first)
    later, elsewhere = (
        hidden(model, tokens, draws(4, ephemeral=1)),
        hidden(model, tokens, draws(4, timeless=1)),
    )
    timeless = rate in ("p_dropsin", "p_droplyr")
    assert (np.abs(later - first).max() == 0) == timeless
    assert (np.abs(elsewhere - first).max() == 0) == (not timeless)


def test_nothing_is_drawn_in_evaluation():
    model = dataclasses.replace(MODEL, **RATES)
    tokens = small.tokens(4, 8)
    np.testing.assert_array_equal(hidden(model, tokens, None), hidden(MODEL, tokens, None))
    weights = small.parameters(model)

    def traced(d: Draws | None) -> str:
        state = transformer.start(model, 4)
        return str(
            jax.make_jaxpr(lambda weights: transformer.forward(weights, tokens, tokens, state, model, d))(
                weights
            )
        )

    assert "random_bits" not in traced(None)
    assert "random_bits" in traced(draws(4))


def masks(rate: float, what: int, unit: int, n_sequence: int = 8, n_block: int = 4) -> np.ndarray:
    """Dropped entries of `[B, R, L D]` ones."""
    keys = layers.sequence_keys(jax.random.key(0), what, unit, jnp.arange(n_sequence))
    ones = jnp.ones((n_sequence, n_block * 16, 64))
    out = np.asarray(layers.token_dropout(ones, rate, keys, 16))
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-6)
    return out.reshape(n_sequence, n_block, -1) == 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(rate):
    dropped = masks(rate, layers.RESIDUAL, 0)
    # Five standard deviations of the mean of as many independent draws.
    assert abs(dropped.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / dropped.size)


def test_draws_of_units_blocks_sequences_and_kinds_are_independent():
    """Masks of rate p that share nothing agree in 1 - 2 p (1 - p) of their entries."""
    rate = 0.5
    rows = [
        row
        for what, unit in ((layers.RESIDUAL, 0), (layers.RESIDUAL, 1), (layers.EMBEDDING, 0))
        for row in masks(rate, what, unit, n_sequence=2, n_block=2).reshape(4, -1)
    ]
    for a, b in itertools.combinations(rows, 2):
        assert abs((a == b).mean() - 0.5) < 5 * np.sqrt(0.25 / a.size)


@pytest.mark.slow
def test_layer_drop_skips_a_unit_for_a_whole_sequence():
    """Each sequence is one of four sums of two units, kept ones doubled at a rate of a half."""
    n_sequence = 64
    model = dataclasses.replace(MODEL, p_droplyr=0.5, dtype="float64", param_dtype="float64")
    tokens = small.tokens(n_sequence, 8)
    pairs = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    with jax.enable_x64(True):
        got = hidden(model, tokens, draws(n_sequence))
        weights = small.parameters(model)

        @jax.jit
        def skipping(keep: jax.Array) -> jax.Array:
            x = transformer.embed(weights, tokens, jnp.arange(8)[None], model)
            state = transformer.start(model, n_sequence).units
            sinusoid = jnp.broadcast_to(
                transformer.distances(model)[None], (n_sequence, model.mem_len + 1, 16)
            )
            for unit in range(2):
                at = lambda tree, unit=unit: jax.tree.map(lambda a: a[unit], tree)
                y, _, _ = gated_unit(
                    at(weights.params["units"]),
                    at(weights.extra["codebooks"]),
                    x,
                    jnp.ones_like(tokens),
                    sinusoid,
                    at(state),
                    model,
                )
                x = x + y * keep[unit] / 0.5
            return x

        wanted = [skipping(jnp.asarray(keep)) for keep in pairs]
        off = np.stack([np.abs(got - want).max((1, 2)) for want in wanted])
    assert (off.min(0) < 1e-9).all(), "a sequence is no sum of kept units"
    kept = np.asarray(pairs)[off.argmin(0)]
    # Five standard deviations: 64 draws a unit, and the two units differ.
    assert np.all(np.abs(kept.mean(0) - 0.5) < 5 * np.sqrt(0.25 / n_sequence))
    assert {tuple(pair) for pair in kept} == set(pairs)


def test_the_program_does_not_grow_with_depth():
    def lowered(n_layer: int) -> int:
        model = dataclasses.replace(MODEL, n_layer=n_layer, **RATES)
        weights = jax.eval_shape(lambda: parameters.init(model, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        state = jax.eval_shape(lambda: transformer.start(model, 2))

        def loss(weights, tokens, state):
            x, *_, metrics = transformer.forward(weights, tokens, tokens, state, model, draws(2))
            return transformer.log_probs(weights, x, model).sum() + metrics["loss_commit_per_token"]

        return len(jax.jit(jax.grad(loss)).lower(weights, tokens, state).as_text())

    shallow, deep = lowered(2), lowered(6)
    # Sizes are written out: 12 units take a digit more than 4.
    assert abs(deep - shallow) < 0.01 * shallow


@pytest.mark.slow
def test_rematerialisation_changes_memory_and_nothing_else():
    weights = small.parameters(dataclasses.replace(MODEL, n_layer=2, d_v=64))
    tokens = small.tokens(2, 32)
    grads, sizes = {}, {}
    for remat in ("nothing", "names", "all"):
        model = dataclasses.replace(MODEL, n_layer=2, d_v=64, remat=remat, **RATES)

        def loss(weights, model=model):
            state = transformer.start(model, 2)
            x, *_, metrics = transformer.forward(weights, tokens, tokens, state, model, draws(2))
            return transformer.log_probs(weights, x, model).sum() + metrics["loss_commit_per_token"]

        compiled = jax.jit(jax.grad(loss)).lower(weights).compile()
        grads[remat] = compiled(weights)
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    close(grads["names"], grads["nothing"], 1e-5)
    close(grads["all"], grads["nothing"], 1e-5)
    assert sizes["nothing"] < sizes["names"] < sizes["all"], sizes
