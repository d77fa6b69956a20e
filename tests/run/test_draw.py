"""Drawing: the nucleus and the draws by plain loops; prompts of any length, side by side, read and saved."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.model import small
from tvq.data.vocabulary import END
from tvq.model import transformer
from tvq.run import draw, tensors
from tvq.run.draw import Prefix
from tvq.schema import Model

# Prompts hold end ids: documents are kept apart.
MODEL = dataclasses.replace(small.MODEL, attend_across_documents=False)
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
    got = draw.nucleus(jnp.asarray(logits), p)
    for row, want in zip(got, (nucleus_by_hand(row, p) for row in logits), strict=True):
        np.testing.assert_array_equal(row, want)


def test_nucleus_of_nothing_is_greedy_and_of_all_is_all():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0]])
    np.testing.assert_array_equal(draw.nucleus(logits, 0.0), [[-1e10, -1e10, 3.0, -1e10]])
    np.testing.assert_array_equal(draw.nucleus(logits, 1.0), logits)


def log_probs(n_sequence: int, n_vocab: int = 5) -> jax.Array:
    rng = np.random.default_rng(0)
    row = jax.nn.log_softmax(jnp.asarray(rng.normal(size=n_vocab), jnp.float32))
    return jnp.broadcast_to(row[None], (n_sequence, n_vocab))


choose = jax.jit(draw.choose, static_argnums=(4, 5, 6))


def test_temperature_zero_takes_the_likeliest():
    got = choose(log_probs(4), jax.random.key(0), jnp.int32(0), jnp.arange(4), 0.0, 0.5)
    np.testing.assert_array_equal(got, np.full(4, np.argmax(log_probs(1)[0])))
    assert got.dtype == jnp.int32


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-37, 1e-40, 1e-300])
@pytest.mark.parametrize("p", [0.0, 0.9, 1.0])
def test_a_low_temperature_is_greedy(temperature, p):
    for spread in (1.0, 1e4):
        cold = choose(
            spread * log_probs(4, 50), jax.random.key(0), jnp.int32(0), jnp.arange(4), temperature, p
        )
        np.testing.assert_array_equal(cold, np.full(4, np.argmax(log_probs(1, 50)[0])))


@pytest.mark.parametrize("temperature", [1e10, 1e38, 1e39, 1e300])
def test_a_high_temperature_takes_all_alike(temperature):
    hot = choose(log_probs(500), jax.random.key(0), jnp.int32(0), jnp.arange(500), temperature, 1.0)
    assert np.bincount(hot, minlength=5).min() > 60


@pytest.mark.parametrize(("temperature", "p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (0.5, 0.9)])
def test_tokens_come_as_often_as_they_should(temperature, p):
    n = 4000
    drawn = choose(log_probs(n), jax.random.key(0), jnp.int32(0), jnp.arange(n), temperature, p)
    logits = nucleus_by_hand(np.asarray(log_probs(1)[0]) / temperature, p)
    want = np.exp(logits) / np.exp(logits).sum()
    got = np.bincount(drawn, minlength=5) / n
    assert np.all(np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / n))


@pytest.mark.parametrize(("min_p", "temperature", "p"), [(0.5, 1.0, 1.0), (0.7, 2.0, 1.0), (0.3, 1.0, 0.8)])
def test_nothing_far_less_likely_than_the_likeliest_is_drawn(min_p, temperature, p):
    """The tokens of at least min_p times the largest probability that are in the nucleus too."""
    n = 4000
    drawn = choose(log_probs(n), jax.random.key(0), jnp.int32(0), jnp.arange(n), temperature, p, min_p)
    logits = np.asarray(log_probs(1)[0]) / temperature
    probability = np.exp(logits) / np.exp(logits).sum()
    kept = (probability >= min_p * probability.max()) & (nucleus_by_hand(logits, p) > -1e9)
    want = np.where(kept, probability, 0) / probability[kept].sum()
    assert 1 < kept.sum() < 5
    got = np.bincount(drawn, minlength=5) / n
    assert np.all(np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / n))


def test_min_p_of_one_is_greedy():
    got = choose(log_probs(4), jax.random.key(0), jnp.int32(0), jnp.arange(4), 1.0, 1.0, 1.0)
    np.testing.assert_array_equal(got, np.full(4, np.argmax(log_probs(1)[0])))


def test_repetition_is_penalised():
    """The log-probability of what was said is multiplied; the end of a text is never penalised."""
    log_probs_BC = np.log(np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], np.float32))
    said_BC = np.array([[1, 1, 0, 1], [0, 1, 1, 0]], bool)
    got = draw.penalised(jnp.asarray(log_probs_BC), jnp.asarray(said_BC), 1.5)
    want = log_probs_BC * np.where(said_BC & (np.arange(4) != 1), np.float32(1.5), np.float32(1))
    np.testing.assert_array_equal(got, want)


def test_a_draw_is_a_function_of_key_position_and_sequence():
    drawn = lambda sequences, seed, position: np.asarray(
        choose(log_probs(64, 50), jax.random.key(seed), jnp.int32(position), sequences, 1.0, 1.0)
    )
    first = drawn(jnp.arange(64), 0, 0)
    np.testing.assert_array_equal(drawn(jnp.arange(64), 0, 0), first)
    np.testing.assert_array_equal(drawn(63 - jnp.arange(64), 0, 0), first[::-1])  # not of the row
    assert len(set(first)) > 10
    assert np.mean(drawn(jnp.arange(64), 1, 0) == first) < 0.3
    assert np.mean(drawn(jnp.arange(64), 0, 1) == first) < 0.3


@functools.cache
def greedy_by_hand(prompt: tuple[int, ...], length: int, penalty: float = 1.0) -> list[int]:
    """The whole text read again for every token, padded: what follows changes nothing."""
    text = list(prompt)
    n_padded = 7 * L
    for _ in range(length):
        padded = jnp.asarray([text + [0] * (n_padded - len(text))], jnp.int32)
        found, _ = small.log_probs(small.parameters(MODEL), padded, transformer.start(MODEL, 1), MODEL)
        row = np.asarray(found[0, len(text) - 1])
        factor = [penalty if i in text and i != END else 1.0 for i in range(len(row))]
        text.append(int(np.argmax(row * np.asarray(factor, row.dtype))))
    return text[len(prompt) :]


def options(**changed: Any) -> dict[str, Any]:
    return {"model": MODEL, "length": 8, "temperature": 0.0, "p_nucleus": 0.9} | changed


def read_prompt(tokens: np.ndarray, model: Model = MODEL) -> Prefix:
    nothing = Prefix(transformer.start(model, 1), np.empty(0, np.int32))
    return draw.read_on(small.parameters(model), nothing, np.asarray(tokens), model)


def continuations(
    prefixes: Sequence[Prefix], sequences: Sequence[int], seed: int = 0, batch_size: int = 4, **changed: Any
) -> list[list[int]]:
    found = draw.continuations(
        small.parameters(MODEL), prefixes, sequences, jax.random.key(seed),
        batch_size=batch_size, **options(**changed),
    )  # fmt: skip
    assert all(row.dtype == np.int32 for row in found)
    return [row.tolist() for row in found]


def test_drawing_and_reading_tell_how_far_they_are():
    said = []
    drawn = options(length=20) | {"tell": said.append}
    prefixes = [read_prompt(prompts()[0])] * 3
    draw.continuations(small.parameters(MODEL), prefixes, [0, 1, 2], jax.random.key(0), batch_size=2, **drawn)
    assert said == [f"drawing: {done} of 40 tokens" for done in (16, 20, 36, 40)]
    del said[:]
    tokens, nothing = np.full(33 * L, 7), draw.empty(MODEL)
    draw.read_on(small.parameters(MODEL), nothing, tokens, MODEL, said.append)
    found = [line.partition(" tokens")[0] for line in said]
    assert found == [f"reading: {n * L:,} of {33 * L + 1:,}" for n in (0, 16, 32)]


# One token; up to a block; one more; some blocks and a rest; many blocks.
LENGTHS = (1, L, L + 1, 2 * L + 3, 4 * L + 1)


@functools.cache
def prompts() -> list[np.ndarray]:
    return [np.asarray(small.tokens(1, n, seed=n))[0] for n in LENGTHS]


def test_greedy_text_is_that_of_the_full_forward():
    found = continuations([read_prompt(prompt) for prompt in prompts()], [0] * len(LENGTHS))
    for tokens, prompt in zip(found, prompts(), strict=True):
        assert tokens == greedy_by_hand(tuple(prompt.tolist()), 8)


def test_penalised_text_is_that_of_the_full_forward():
    """What the prompt holds counts, in blocks that were read and in the rest, and what was drawn before."""
    asked = prompts()[:3]
    drawn = continuations([read_prompt(p) for p in asked], [0] * 3, penalty=3.0, prompts=asked, length=12)
    assert drawn == [greedy_by_hand(tuple(prompt.tolist()), 12, 3.0) for prompt in asked]
    assert drawn != [greedy_by_hand(tuple(prompt.tolist()), 12) for prompt in asked]


def test_nothing_is_drawn_after_all_are_over(monkeypatch):
    """A text that is over is drawn on beside others; none of them is changed."""
    asked = prompts()[:2]
    prefixes = [read_prompt(prompt) for prompt in asked]
    on = continuations(prefixes, [0, 1], temperature=2.0, length=64, prompts=asked)
    seen: list[tuple[list[int], int]] = []

    def is_over(prompt_T: np.ndarray, drawn_T: np.ndarray) -> bool:
        seen.append((prompt_T.tolist(), len(drawn_T)))
        row = [prompt.tolist() for prompt in asked].index(prompt_T.tolist())
        assert drawn_T.tolist() == on[row][: len(drawn_T)]
        return len(drawn_T) >= 20

    got = continuations(prefixes, [0, 1], temperature=2.0, length=64, prompts=asked, is_over=is_over)
    assert [row[:20] for row in got] == [row[:20] for row in on]
    assert got != on
    assert max(n for _, n in seen) < 20 + draw.CHUNK


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    want = continuations([read_prompt(prompts()[-1])], [0])
    monkeypatch.setattr(draw, "READ_BLOCKS", 2)
    assert continuations([read_prompt(prompts()[-1])], [0]) == want


def test_side_by_side_each_is_as_if_alone():
    prefixes = [read_prompt(prompt) for prompt in prompts()] * 2
    sequences = [i // len(LENGTHS) for i in range(len(prefixes))]
    want = [
        continuations([prefix], [number], batch_size=1, temperature=2.0)[0]
        for prefix, number in zip(prefixes, sequences, strict=True)
    ]
    assert len({tuple(tokens) for tokens in want}) >= 9
    for batch_size in (3, 16):
        assert continuations(prefixes, sequences, batch_size=batch_size, temperature=2.0) == want
    # In another order, and from the middle.
    backward = continuations(prefixes[::-1], sequences[::-1], temperature=2.0)
    assert backward[::-1] == want


def test_a_stream_is_the_same_text():
    for prompt in prompts():
        prefix = read_prompt(prompt)
        (want,) = continuations([prefix], [3], temperature=2.0, length=40)
        pieces = draw.continuation(
            small.parameters(MODEL), prefix, 3, jax.random.key(0), **options(temperature=2.0, length=40)
        )
        found = [piece.tolist() for piece in pieces]
        assert [token for piece in found for token in piece] == want
        assert 3 <= len(found) <= 4, "some tokens at a time"
        assert all(found)


def test_texts_do_not_depend_on_chunks(monkeypatch):
    prefix = read_prompt(prompts()[3])
    want = continuations([prefix], [0], temperature=2.0, length=20)
    monkeypatch.setattr(draw, "CHUNK", 5)
    assert continuations([prefix], [0], temperature=2.0, length=20) == want


def test_a_text_stops_where_it_ends():
    """Each row by itself, in a batch and in a stream; only an end that is drawn is one, none in a prompt."""
    prefixes = [read_prompt(prompt) for prompt in prompts()] * 2
    sequences = [i // len(LENGTHS) for i in range(len(prefixes))]
    drawn = {"temperature": 2.0, "length": 40}
    on = continuations(prefixes, sequences, **drawn)
    common = np.bincount(np.concatenate(on))
    for end in (int(common.argmax()), int(np.where(common, common, 99).argmin())):
        want = [row[: row.index(end)] if end in row else row for row in on]
        assert len({len(row) for row in want}) > 1
        for batch_size in (1, 3, 16):
            assert continuations(prefixes, sequences, batch_size=batch_size, end=end, **drawn) == want
        for prefix, number, text in zip(prefixes, sequences, want, strict=True):
            pieces = draw.continuation(
                small.parameters(MODEL), prefix, number, jax.random.key(0), **options(end=end, **drawn)
            )
            assert [token for piece in pieces for token in piece.tolist()] == text


def test_nothing_is_drawn_after_all_have_ended(monkeypatch):
    """But it tells as often: processes that draw the same must stop at the same word."""
    prefix, calls, said = read_prompt(prompts()[0]), [], []
    (on,) = continuations([prefix], [0], temperature=2.0, length=100)
    write = draw.write
    monkeypatch.setattr(draw, "write", lambda *a: calls.append(0) or write(*a))
    drawn = options(length=100, temperature=2.0, end=on[3], tell=said.append)
    draw.continuations(small.parameters(MODEL), [prefix], [0], jax.random.key(0), batch_size=1, **drawn)
    assert len(calls) == 1
    assert said == [f"drawing: {done} of 100 tokens" for done in (*range(16, 97, 16), 100)]


def test_samples_differ_by_seed_and_by_sequence_and_repeat():
    prefixes = [read_prompt(np.ones(1, np.int32))] * 3
    first = continuations(prefixes, range(3), temperature=2.0)
    assert continuations(prefixes, range(3), temperature=2.0) == first
    assert continuations(prefixes, range(3), seed=1, temperature=2.0) != first
    assert len({tuple(row) for row in first}) == 3
    # A shorter text is the beginning of a longer one.
    shorter = continuations(prefixes, range(3), temperature=2.0, length=5)
    assert shorter == [row[:5] for row in first]


def test_a_saved_prefix_goes_on_bitwise(tmp_path):
    path = epath.Path(tmp_path) / "here" / "state"
    document, question = prompts()[4], prompts()[3]
    prefix = read_prompt(document)
    draw.save(path, prefix, MODEL, "weights")
    loaded = draw.load(path, MODEL, "weights")
    for name, x in tensors.named(prefix).items():
        y = tensors.named(loaded)[name]
        assert (np.asarray(x).tobytes(), x.dtype, x.shape) == (np.asarray(y).tobytes(), y.dtype, y.shape)
    asked = [draw.read_on(small.parameters(MODEL), p, question, MODEL) for p in (prefix, loaded)]
    assert tensors.fingerprint(asked[0]) == tensors.fingerprint(asked[1])
    bits = np.zeros(4, np.float32)
    others = [{"a": bits}, {"b": bits}, {"a": bits.reshape(2, 2)}, {"a": bits.view(np.int32)}]
    assert len({tensors.fingerprint(x) for x in others}) == 4, "names, shapes and dtypes count too"
    (want,) = continuations(asked[:1], [0], temperature=2.0)
    assert continuations(asked[1:], [0], temperature=2.0) == [want]
    # Document and question at once: the same text.
    at_once = read_prompt(np.concatenate([document, question]))
    assert continuations([at_once], [0], temperature=2.0) == [want]


def test_a_saved_prefix_is_as_large_after_any_text(tmp_path):
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    size = {}
    for n in (2 * L, 9 * L):
        path = epath.Path(tmp_path) / f"{n}"
        size[n] = draw.save(path, read_prompt(np.ones(n, np.int32), model), model, "")
        assert path.stat().length == size[n]
        assert draw.load(path, model, "").state.units.v_BHMV.dtype == jnp.bfloat16
    assert size[2 * L] == size[9 * L]


def test_a_prefix_of_another_model_is_refused(tmp_path):
    path = epath.Path(tmp_path) / "state"
    draw.save(path, read_prompt(prompts()[0]), MODEL, "old")
    other = dataclasses.replace(MODEL, n_code=MODEL.n_code + 1, n_parallel=1)
    with pytest.raises(ValueError, match="saved by another model") as error:
        draw.load(path, other, "new")
    assert str(error.value).splitlines()[1:] == [
        "  weights: old in the file, new now",
        f"  config.model.n_code: {MODEL.n_code} in the file, {MODEL.n_code + 1} now",
    ]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no such file"), (b"some text", "is not a safetensors file")]
)
def test_what_is_no_saved_prefix(tmp_path, content, message):
    path = epath.Path(tmp_path) / "state"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--from_state={path}.* {message}"):
        draw.load(path, MODEL, "")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda arrays: arrays.pop("state.units.v_BHMV"), "  state.units.v_BHMV: absent in the file"),
        (lambda arrays: arrays.pop("rest_T"), "  rest_T: absent in the file"),
        (lambda arrays: arrays.update(rest_T=np.zeros(0, np.int32)), "  rest_T: int32[0] in the file"),
        (
            lambda arrays: arrays.update(rest_T=np.zeros((1, 2), np.int32)),
            "  rest_T: int32[1, 2] in the file",
        ),
        (lambda arrays: arrays.update(more=np.zeros(2)), "  more: float64[2] in the file, absent wanted"),
        (lambda arrays: arrays.update(rest_T=np.full(2, 10**6, np.int32)), "it holds ids outside the"),
    ],
)
def test_a_saved_prefix_that_another_program_changed(tmp_path, change, line):
    path = epath.Path(tmp_path) / "state"
    draw.save(path, read_prompt(prompts()[2]), MODEL, "")
    arrays, facts = tensors.read("", path)
    change(arrays)
    tensors.write(path, arrays, facts)
    with pytest.raises(ValueError, match=f"^--from_state={path} is damaged") as error:
        draw.load(path, MODEL, "")
    assert line in str(error.value)
