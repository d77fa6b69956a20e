"""Sampling: continue prompts one token at a time, at constant memory and cost a token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tvq import cluster, evaluate, mesh, metrics
from tvq.config import Config, Mesh, Model
from tvq.data.vocabulary import END, Vocabulary, from_json
from tvq.model import transformer

REMOVED = -1e10
# Blocks of a prompt read at a time: bounds memory, and the shapes to compile.
READ_BLOCKS = 16


def nucleus(logits_BC: jax.Array, p: float) -> jax.Array:
    """The logits with the tail outside the nucleus of probability p at -1e10 (SPEC.md "Sampling").

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
    log_probs_BC: jax.Array, key: jax.Array, position: jax.Array, temperature: float, p_nucleus: float
) -> jax.Array:
    """A token `[B]` int32 for each sequence; the draw is a function of key, sequence and position."""
    if temperature == 0.0:
        return jnp.argmax(log_probs_BC, -1).astype(jnp.int32)
    logits_BC = nucleus(log_probs_BC / temperature, p_nucleus)
    key = jax.random.fold_in(key, position)
    keys_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(logits_BC.shape[0]))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BC).astype(jnp.int32)


@partial(jax.jit, static_argnames="model")
def read(
    params: dict, codebooks: dict, tokens_BT: jax.Array, state: transformer.State, model: Model
) -> transformer.State:
    """The state after more tokens, whole blocks of them, read in parallel."""
    return transformer.forward(params, codebooks, tokens_BT, jnp.ones_like(tokens_BT), state, model)[1]


@partial(jax.jit, static_argnames=("model", "length", "temperature", "p_nucleus"))
def write(
    params: dict,
    codebooks: dict,
    tokens_BT: jax.Array,
    state: transformer.State,
    key: jax.Array,
    model: Model,
    length: int,
    temperature: float,
    p_nucleus: float,
) -> jax.Array:
    """Reads the tokens one at a time, then draws `length` more `[B,length]`; one loop on the device."""
    decoding = transformer.decoding(params, codebooks, state, model)
    step = lambda decoding, token_B: transformer.decode(params, token_B, decoding, model)[::-1]
    decoding, _ = jax.lax.scan(step, decoding, tokens_BT[:, :-1].T)

    def draw_one(carry: tuple, position: jax.Array) -> tuple:
        decoding, token_B = carry
        decoding, log_probs_BC = step(decoding, token_B)
        token_B = choose(log_probs_BC, key, position, temperature, p_nucleus)
        return (decoding, token_B), token_B

    _, drawn_TB = jax.lax.scan(draw_one, (decoding, tokens_BT[:, -1]), jnp.arange(length))
    return drawn_TB.T


def draw(
    params: dict,
    codebooks: dict,
    prompt_BT: np.ndarray,
    key: jax.Array,
    *,
    model: Model,
    length: int,
    temperature: float,
    p_nucleus: float,
) -> np.ndarray:
    """Continuations `[B,length]` int32 of prompts of at least one token each (the end id starts a text).

    Whole blocks of the prompt are read in parallel, the rest and every new token one at a time.
    """
    n_prompt = prompt_BT.shape[1]
    n_read = (n_prompt - 1) // model.block_len * model.block_len
    state = transformer.initial_state(model, prompt_BT.shape[0])
    piece = READ_BLOCKS * model.block_len
    for start in range(0, n_read, piece):
        tokens_BT = prompt_BT[:, start : min(start + piece, n_read)]
        state = read(params, codebooks, jnp.asarray(tokens_BT), state, model)
    rest_BT = jnp.asarray(prompt_BT[:, n_read:])
    tokens = write(params, codebooks, rest_BT, state, key, model, length, temperature, p_nucleus)
    return np.asarray(tokens)


def texts(params: dict, codebooks: dict, vocabulary: Vocabulary, c: Config) -> list[str]:
    """`sample.n_sample` texts that begin with `sample.prompt`, drawn by one device of this process.

    ValueError: the model has quadratic attention, which is there to be measured, not to decode.
    """
    if c.model.attention == "full":
        raise ValueError("config.model.attention=full cannot decode; train with vq to draw samples")
    params, codebooks = jax.tree.map(lambda x: x.addressable_data(0), (params, codebooks))
    prompt = vocabulary.encode(c.sample.prompt.encode(errors="surrogateescape")).astype(np.int32)
    prompt_BT = np.tile(np.concatenate([[END], prompt]).astype(np.int32), (c.sample.n_sample, 1))
    drawn_BT = draw(
        params,
        codebooks,
        prompt_BT,
        jax.random.key(c.sample.seed),
        model=c.model,
        length=c.sample.length,
        temperature=c.sample.temperature,
        p_nucleus=c.sample.nucleus,
    )
    # Decoded together: where the prompt ends decides how the first piece is written.
    return [
        vocabulary.decode(np.concatenate([prompt, tokens])).decode(errors="replace") for tokens in drawn_BT
    ]


def show(found: list[str]) -> str:
    """Texts for the terminal."""
    if len(found) == 1:
        return found[0]
    return "\n".join(f"--- sample {i + 1} of {len(found)} ---\n{text}" for i, text in enumerate(found))


def save(found: list[str], workdir: epath.Path, step: int) -> epath.Path:
    """Writes texts to `workdir/samples/step_N.txt`; returns the path."""
    path = workdir / "samples" / f"step_{step}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(show(found) + "\n")
    return path


def sample(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Prints continuations of a prompt by the newest checkpoint."""
    if place.n_process > 1:
        raise ValueError(f"tvq sample is for one process, but {place}; start it by itself")
    restored = evaluate.restore(c, workdir, mesh.make(Mesh(), jax.devices()[:1]), log.say)
    vocabulary = from_json(restored.data["vocabulary"])
    now = restored.state
    metrics.Console().say(show(texts(now.params, now.codebooks, vocabulary, c)))
    return 0
