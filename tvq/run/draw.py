"""Drawing: a prompt is read in parallel, then continued at constant memory and cost a token."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tvq import model as lm
from tvq.config import CHANGEABLE
from tvq.data.vocabulary import END
from tvq.errors import InputError
from tvq.run import metrics, tensors
from tvq.schema import Model

REMOVED = -1e10
# Blocks of a prompt read at a time: bounds memory, and the shapes to compile.
READ_BLOCKS = 16
# Tokens written by one call: often enough for the eye, seldom enough for the device.
CHUNK = 16
# In the place of a token that is to be drawn.
DRAWN = -1
# Hears in words how far it is.
Tell = Callable[[str], Any]
# Whether a text is over, told the ids of its prompt and those drawn so far.
IsOver = Callable[[np.ndarray, np.ndarray], bool]


class Prefix(NamedTuple):
    """A text that has been read: the state after whole blocks, and the one or more tokens after them."""

    state: lm.State  # of one sequence
    rest_T: np.ndarray  # int32


def nucleus(logits_BC: jax.Array, p: float) -> jax.Array:
    """The logits with the tail outside the nucleus of probability p at -1e10.

    Tokens are taken from the likeliest, the highest id first among equals, while the mass before a token is
    below p - 1e-4; the first always stays. p = 0 leaves it alone.
    """
    probability = jax.nn.softmax(logits_BC)
    order = jnp.argsort(probability, -1, stable=True)[..., ::-1]
    ranked = jnp.take_along_axis(probability, order, -1)
    before = jnp.cumsum(ranked, -1) - ranked
    first = jnp.arange(logits_BC.shape[-1]) == 0
    keep = (before < p - 1e-4) | jnp.broadcast_to(first, before.shape)
    keep = jnp.take_along_axis(keep, jnp.argsort(order, -1), -1)
    return jnp.where(keep, logits_BC, REMOVED)


def choose(
    log_probs_BC: jax.Array,
    key: jax.Array,
    position: jax.Array,
    sequence_B: jax.Array,
    temperature: float,
    p_nucleus: float,
    min_p: float = 0.0,
) -> jax.Array:
    """A token `[B]` int32 for each sequence; the draw is a function of key, position and sequence.

    It is drawn from the nucleus, less the tokens whose probability is below min_p times the largest.
    """
    limits = jnp.finfo(log_probs_BC.dtype)
    if temperature < float(limits.tiny):  # on some devices it would be zero
        return jnp.argmax(log_probs_BC, -1).astype(jnp.int32)
    # The likeliest token is at zero, so that no quotient of its own overflows, however cold.
    shifted_BC = log_probs_BC - jnp.max(log_probs_BC, -1, keepdims=True)
    logits_BC = shifted_BC / min(temperature, float(limits.max))
    is_likely_BC = logits_BC >= math.log(min_p) if min_p > 0 else True
    logits_BC = jnp.where(is_likely_BC, nucleus(logits_BC, p_nucleus), REMOVED)
    key = jax.random.fold_in(key, position)
    keys_B = jax.vmap(lambda sequence: jax.random.fold_in(key, sequence))(sequence_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BC).astype(jnp.int32)


def penalised(log_probs_BC: jax.Array, said_BC: jax.Array, penalty: float) -> jax.Array:
    """The log-probability of each token that was `said` times the penalty; the end of a text never is."""
    said_BC = said_BC & (jnp.arange(said_BC.shape[-1]) != END)[None]
    return jnp.where(said_BC, penalty * log_probs_BC, log_probs_BC)


@partial(jax.jit, static_argnames="model")
def read(weights: lm.Weights, tokens_BT: jax.Array, state: lm.State, model: Model) -> lm.State:
    """The state after more tokens, whole blocks of them, read in parallel."""
    return lm.forward(weights, tokens_BT, jnp.ones_like(tokens_BT), state, model)[1]


@partial(
    jax.jit,
    static_argnames=("model", "temperature", "p_nucleus", "min_p", "penalty"),
    donate_argnames="decoding",
)
def write(
    weights: lm.Weights,
    decoding: lm.Decoding,
    token_B: jax.Array,
    given_BT: jax.Array,
    sequence_B: jax.Array,
    key: jax.Array,
    model: Model,
    temperature: float,
    p_nucleus: float,
    min_p: float = 0.0,
    said_BC: jax.Array | None = None,
    penalty: float = 1.0,
) -> tuple[lm.Decoding, jax.Array, jax.Array | None]:
    """The T tokens that follow `token_B`, `[B,T]` int32: those given, drawn where DRAWN stands.

    One loop on the device. Sequences of another length are then read and continued side by side. Tokens that
    were `said` are penalised, and those that are drawn are said from then on; None: none is.
    """

    def follow(carry: tuple, given_B: jax.Array) -> tuple:
        decoding, token_B, said_BC = carry
        position = decoding.position
        log_probs_BC, decoding = lm.step(weights, token_B, decoding, model)
        if said_BC is not None:
            log_probs_BC = penalised(log_probs_BC, said_BC, penalty)
        token_B = choose(log_probs_BC, key, position, sequence_B, temperature, p_nucleus, min_p)
        token_B = jnp.where(given_B == DRAWN, token_B, given_B)
        if said_BC is not None:
            said_BC |= jax.nn.one_hot(token_B, said_BC.shape[-1], dtype=bool)
        return (decoding, token_B, said_BC), token_B

    (decoding, _, said_BC), tokens_TB = jax.lax.scan(follow, (decoding, token_B, said_BC), given_BT.T)
    return decoding, tokens_TB.T, said_BC


@partial(jax.jit, static_argnames="model")
def begin(weights: lm.Weights, state: lm.State, model: Model) -> lm.Decoding:
    return lm.begin(weights, state, model)


def empty(model: Model) -> Prefix:
    """Before any text: the end id."""
    return Prefix(lm.start(model, 1), np.array([END], np.int32))


def read_on(
    weights: lm.Weights,
    before: Prefix,
    tokens_T: np.ndarray,
    model: Model,
    tell: Tell = lambda line: None,
) -> Prefix:
    """The prefix and more tokens: all whole blocks of them are read, but for the last token.

    Sixteen blocks at a time and then single ones, so that two programs read texts of any length.
    """
    state, rest_T = before.state, np.concatenate([before.rest_T, tokens_T.astype(np.int32)])
    n_token, progress = len(rest_T), metrics.Progress("reading", "tokens")
    for piece in (READ_BLOCKS * model.block_len, model.block_len):
        while len(rest_T) > piece:
            tell(progress.line(n_token - len(rest_T), n_token))
            behind = state
            state = read(weights, jnp.asarray(rest_T[None, :piece]), state, model)
            jax.block_until_ready(behind)  # or what is told would run far ahead of the device
            rest_T = rest_T[piece:]
    return Prefix(state, rest_T)


def beside(states: Sequence[lm.State], model: Model) -> lm.State:
    """One state of many sequences, which are equally long."""

    def join(dims: str, *x: jax.Array) -> jax.Array:
        return jnp.concatenate(x, dims.index("B")) if "B" in dims else x[0]

    return jax.tree.map(join, lm.state_dims(model), *states)


def chunks(
    weights: lm.Weights,
    prefixes: Sequence[Prefix],
    sequences: Sequence[int],
    key: jax.Array,
    *,
    model: Model,
    length: int,
    temperature: float,
    p_nucleus: float,
    min_p: float = 0.0,
    penalty: float = 1.0,
    end: int | None = None,
    prompts: Sequence[np.ndarray] = (),
    is_over: IsOver | None = None,
) -> Iterator[np.ndarray]:
    """What follows the first unread token of each prefix, `[B,CHUNK]` at a time, until all drew `length`.

    The prefixes' states are equally long; `sequences` are the numbers that draw. The tokens of the `prompts`
    are penalised too. Once every sequence has drawn `end` or is over, the rest is filled with ends: the
    number of chunks does not depend on what is drawn.
    """
    decoding = begin(weights, beside([prefix.state for prefix in prefixes], model), model)
    n_token = max(len(prefix.rest_T) for prefix in prefixes) - 1 + length
    given_BT = np.full((len(prefixes), -(-n_token // CHUNK) * CHUNK), DRAWN, np.int32)
    for row, prefix in zip(given_BT, prefixes, strict=True):
        row[: len(prefix.rest_T) - 1] = prefix.rest_T[1:]
    token_B = jnp.asarray([prefix.rest_T[0] for prefix in prefixes])
    sequence_B = jnp.asarray(sequences)
    has_ended_B = np.zeros(len(prefixes), bool)
    said_BC = None if penalty == 1 else jnp.asarray(said(prompts, len(prefixes), model))
    before: list[np.ndarray] = []
    for start in range(0, given_BT.shape[1], CHUNK):
        given = given_BT[:, start : start + CHUNK]
        if has_ended_B.all():
            yield np.full_like(given, END)
            continue
        decoding, tokens_BT, said_BC = write(
            weights, decoding, token_B, jnp.asarray(given), sequence_B, key, model, temperature, p_nucleus,
            min_p, said_BC, penalty,
        )  # fmt: skip
        token_B, drawn_BT = tokens_BT[:, -1], np.asarray(tokens_BT)
        if end is not None:
            has_ended_B |= ((drawn_BT == end) & (given == DRAWN)).any(1)
        if is_over is not None:
            before.append(drawn_BT)
            for i, row in enumerate(np.concatenate(before, 1)):
                first = len(prefixes[i].rest_T) - 1
                has_ended_B[i] |= is_over(prompts[i], row[first : first + length])
        yield drawn_BT


def said(prompts: Sequence[np.ndarray], n_row: int, model: Model) -> np.ndarray:
    """Which tokens occur in each prompt, `[B,C]`; none where there are no prompts."""
    said_BC = np.zeros((n_row, model.n_vocab), bool)
    for row, prompt_T in zip(said_BC, prompts, strict=False):
        row[prompt_T] = True
    return said_BC


def until(tokens_T: np.ndarray, end: int | None) -> np.ndarray:
    """The tokens before the first `end`; all where there is none."""
    ends = [] if end is None else np.flatnonzero(tokens_T == end)
    return tokens_T[: ends[0]] if len(ends) else tokens_T


def answers(
    weights: lm.Weights,
    before: Prefix,
    prompts: list[np.ndarray],
    n_sample: int,
    key: jax.Array,
    *,
    model: Model,
    tell: Tell = lambda line: None,
    **options: Any,
) -> list[np.ndarray]:
    """`n_sample` continuations of each prompt after `before`, with the prompt; options: `continuations`."""
    prefixes = [read_on(weights, before, prompt_T, model, tell) for prompt_T in prompts]
    asked = [(i, number) for i in range(len(prompts)) for number in range(n_sample)]
    rows = continuations(
        weights,
        [prefixes[i] for i, _ in asked],
        [number for _, number in asked],
        key,
        model=model,
        tell=tell,
        prompts=[prompts[i] for i, _ in asked],
        **options,
    )
    return [np.concatenate([prompts[i], row_T]) for (i, _), row_T in zip(asked, rows, strict=True)]


def continuations(
    weights: lm.Weights,
    prefixes: Sequence[Prefix],
    sequences: Sequence[int],
    key: jax.Array,
    *,
    batch_size: int,
    length: int,
    end: int | None = None,
    prompts: Sequence[np.ndarray] = (),
    tell: Tell = lambda line: None,
    **options: Any,
) -> list[np.ndarray]:
    """Continuations `[length]` int32 of prefixes of any length; `options` are those of `chunks`.

    Each stops before the first `end` that it draws; None: there is none. A continuation is a function of
    prefix, sequence number and key: those of equally long states are drawn side by side, `batch_size` at a
    time, and a batch is filled up, so that one program draws all.
    """
    groups: dict[int, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        groups.setdefault(int(prefix.state.position), []).append(i)
    B = min(batch_size, max(map(len, groups.values())))
    batches = [group[i : i + B] for group in groups.values() for i in range(0, len(group), B)]
    rows_of = {}
    for number, batch in enumerate(batches):
        rows = batch + batch[-1:] * (B - len(batch))
        of_rows = [prefixes[i] for i in rows], [sequences[i] for i in rows]
        options["prompts"] = [prompts[i] for i in rows] if prompts else ()
        drawn: list[np.ndarray] = []
        for more_BT in chunks(weights, *of_rows, key, length=length, end=end, **options):
            drawn.append(more_BT)
            done = number * length + min(len(drawn) * CHUNK, length)
            tell(f"drawing: {done:,} of {len(batches) * length:,} tokens")
        for i, row in zip(batch, np.concatenate(drawn, 1), strict=False):
            start = len(prefixes[i].rest_T) - 1
            rows_of[i] = until(row[start : start + length], end)
    return [rows_of[i] for i in range(len(prefixes))]


def continuation(
    weights: lm.Weights,
    prefix: Prefix,
    sequence: int,
    key: jax.Array,
    *,
    length: int,
    end: int | None = None,
    **options: Any,
) -> Iterator[np.ndarray]:
    """The same continuation, some tokens at a time as they are drawn."""
    start, stop, last = len(prefix.rest_T) - 1, 0, len(prefix.rest_T) - 1 + length
    for tokens_1T in chunks(weights, [prefix], [sequence], key, length=length, end=end, **options):
        begun, stop = stop, stop + tokens_1T.shape[1]
        if stop > start:
            drawn_T = tokens_1T[0, max(start - begun, 0) : last - begun]
            shown_T = until(drawn_T, end)
            if len(shown_T):
                yield shown_T
            if len(shown_T) < len(drawn_T):
                return


def save(path: epath.Path, prefix: Prefix, model: Model, weights: str) -> int:
    """Writes a prefix and which model read it; returns its bytes: of a text of any length as many."""
    return tensors.write(path, tensors.named(prefix), {"weights": weights, **_origin(model)})


def is_saved(path: epath.Path) -> bool:
    """Whether `save` wrote this file."""
    try:
        return "weights" in tensors.read("--save_state", path)[1]
    except InputError:
        return False


def load(path: epath.Path, model: Model, weights: str) -> Prefix:
    """What `save` wrote. InputError: it is no such file, or of another model; each difference is named."""
    arrays, origin = tensors.read("--from_state", path)
    wanted = {"weights": weights, **_origin(model)}
    differing = [
        f"  {name}: {origin.get(name, 'absent')} in the file, {value} now"
        for name, value in wanted.items()
        if origin.get(name) != value
    ]
    if differing:
        raise InputError(
            f"--from_state={path} was saved by another model; use that one, or read the document again:\n"
            + "\n".join(differing)
        )
    rest_T = arrays.get("rest_T", np.empty(0, np.int32))
    like = Prefix(jax.eval_shape(lambda: lm.start(model, 1)), np.empty(max(rest_T.size, 1), np.int32))
    kinds = {name: tensors.kind(x) for name, x in arrays.items()}
    wanted = {name: tensors.kind(x) for name, x in tensors.named(like).items()}
    lines = tensors.differing(kinds, wanted, "in the file")
    if lines:
        raise InputError(
            f"--from_state={path} is damaged, or was saved again by another program: {len(lines)} arrays"
            " differ; read the document again:\n" + "\n".join(lines)
        )
    if rest_T.min() < 0 or rest_T.max() >= model.n_vocab:
        raise InputError(
            f"--from_state={path} is damaged: it holds ids outside the {model.n_vocab} of the model; read the"
            " document again"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in tensors.named(like)])


def _origin(model: Model) -> dict[str, str]:
    """What decides the state besides the weights."""
    flat = {f"config.model.{name}": value for name, value in dataclasses.asdict(model).items()}
    return {name: repr(x) for name, x in flat.items() if name.removeprefix("config.") not in CHANGEABLE}
