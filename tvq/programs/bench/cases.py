"""What is measured: train step, attention core, decoding and data, each checked before it is timed."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tvq import model as lm
from tvq import sharding
from tvq.data.corpus import open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches
from tvq.errors import DisagreementError, InputError
from tvq.programs.bench.session import STEP, Case, Row, Session, compiled
from tvq.rules import validate
from tvq.run import draw
from tvq.schema import Config, Model
from tvq.training import loss, optimizer, state, train_step

# model.attention and model.n_parallel of each; `serial:nothing` also sets model.remat.
FORMULATIONS = {
    "auto": ("vq", 0), "serial": ("vq", 1), "all": ("vq", sys.maxsize),
    "full": ("full", 0), "flash": ("flash", 0),
}  # fmt: skip
N_BATCH = 100  # batches of one timed call of the data pipeline, many more than it reads ahead


def numbers(text: str, name: str) -> list[int]:
    """`1024,2048`, in ascending order. InputError: it is something else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"config.bench.{name} must be whole numbers separated by commas, not {text!r}")
    return sorted({int(part) for part in parts})


def formulated(model: Model, name: str) -> Model:
    """The model in a formulation. InputError: there is none of that name."""
    kind, _, remat = name.partition(":")
    if kind not in FORMULATIONS:
        known = ", ".join(FORMULATIONS)
        raise InputError(
            f"config.bench.formulations must be among {known}, or like auto:nothing, not {kind!r}"
        )
    attend, n_parallel = FORMULATIONS[kind]
    return dataclasses.replace(model, attention=attend, n_parallel=n_parallel, remat=remat or model.remat)


def sweep(config: Config) -> Iterator[tuple[int, str, Config]]:
    """Every length and formulation, with its config: the whole sequence in one update, n_token tokens."""
    lengths = numbers(config.bench.lengths, "lengths")
    n_token = config.bench.n_token or lengths[-1]
    for T, name in itertools.product(lengths, config.bench.formulations.split(",")):
        if n_token % T:
            raise InputError(
                f"config.bench.n_token {n_token} is not a multiple of the {T} of config.bench.lengths;"
                f" use {-(-n_token // T) * T}"
            )
        trained = dataclasses.replace(
            config.train, sequence_len=T, update_len=T, segment_len=0, global_batch_size=n_token // T
        )
        trial = dataclasses.replace(config, train=trained, model=formulated(config.model, name.strip()))
        if not trial.model.carries_state and not (config.model.agg_cache and config.model.grad_thru_cache):
            raise InputError(
                "config.model.agg_cache and config.model.grad_thru_cache must be true if full attention is"
                " the baseline: without them vq attention is another function; or omit full"
            )
        validate(trial)
        yield T, name.strip(), trial


class Carried:
    """The training state, which each timed step takes from the one before: a step donates its input."""

    def __init__(self, config: Config, mesh: Mesh):
        self.tx = optimizer.make(config.optimizer, config.model)
        self.abstract = state.place(config, self.tx, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.init = jax.jit(
            lambda: state.init(config.model, self.tx, config.train.seed), out_shardings=shardings
        )
        self.now: Any = None

    def first(self, update: Callable, batch: dict) -> dict:
        """The metrics of the first update of a run."""
        self.now = None  # freed before the next is made
        self.now = self.init()
        return self.step(update, batch)

    def step(self, update: Callable, batch: dict) -> dict:
        self.now, measured = update(self.now, batch)
        return measured


def train_case(s: Session, trial: Config, carried: Carried, labels: Row) -> dict[str, float]:
    """Adds the train step of a config; returns loss and gradient norm of its first update."""
    B, T = trial.train.global_batch_size, trial.train.sequence_len
    sharding.check(s.mesh, trial)
    sharding.check_batch(s.mesh, "train.global_batch_size", B, trial.train.accumulate)
    tokens_BT = np.random.default_rng(0).integers(0, trial.model.n_vocab, (B, T), np.int32)
    ones_BT = np.ones_like(tokens_BT)
    rows = {"inputs": tokens_BT, "targets": tokens_BT[:, ::-1], "loss_mask": ones_BT}
    batch = sharding.global_batch(s.mesh, rows, B)
    update, facts = compiled(train_step.make(trial, s.mesh, carried.tx), carried.abstract, batch)
    first = carried.first(update, batch)
    numbers = {name: float(first[name]) for name in ("loss_lm_per_token_unscaled", "grad_norm")}
    call = lambda: carried.step(update, batch)
    products = lm.train_flops(trial.model, trial.train.update_len)
    s.cases.append(Case(labels, call, B * T, facts, products, s.mesh.size))
    return numbers


def prepare_train(s: Session) -> None:
    """The whole train step over lengths and formulations."""
    carried = Carried(s.config, s.mesh)
    trials = list(sweep(s.config))
    for name, trial in {name: trial for _, name, trial in trials if not trial.model.carries_state}.items():
        agree_with_full(s, name, trial.model)
    references: dict[int, tuple[str, dict]] = {}
    for T, name, trial in trials:
        with s.trying(formulation=name, T=T) as go:
            if not go:
                continue
            got = train_case(s, trial, carried, {"formulation": name, "T": T})
            if trial.model.carries_state and T in references:
                other, wanted = references[T]
                s.agree(got, wanted, f"loss and gradient norm of {name} and {other} at T={T}")
            elif trial.model.carries_state:
                references[T] = name, got


def agree_with_full(s: Session, name: str, model: Model) -> None:
    """Checks full attention on codewords as keys, where it is the same function as vq attention."""
    sharding.check_platform(s.mesh, model)
    T = model.block_len * (-(-2 * model.mem_len // model.block_len) + 2)
    inputs = lm.core.inputs(model, 1, T)
    models = (lm.for_platform(m, sharding.platform(s.mesh)) for m in (model, formulated(model, "all")))
    got, want = (jax.jit(lm.core.both_ways(m))(*inputs) for m in models)
    what = f"output and gradients (queries, values) of {name} and vq attention over codewords, T={T},"
    s.agree(but_keys(got), but_keys(want), what)


def but_keys(results: tuple) -> tuple:
    """What full attention gives too: the gradient of a vq key ends with the next block."""
    o_BHTV, dq_BHTK, _, dv_BHTV = results
    return o_BHTV, dq_BHTK, dv_BHTV


def prepare_attention(s: Session) -> None:
    """The attention core alone over lengths and formulations, on one device."""
    for T, group in itertools.groupby(sweep(s.config), key=lambda trial: trial[0]):
        reference, inputs = None, None
        for _, name, trial in group:
            with s.trying(formulation=name, T=T) as go:
                if not go:
                    continue
                sharding.check_platform(s.mesh, trial.model)
                model = lm.for_platform(trial.model, sharding.platform(s.mesh))
                inputs = inputs or lm.core.inputs(model, trial.train.global_batch_size, T)
                program, facts = compiled(jax.jit(lm.core.both_ways(model)), *inputs)
                got = program(*inputs)
                if reference is None:
                    reference = name, model.attention, got
                elif model.attention == reference[1]:
                    s.agree(got, reference[2], f"output and gradients of {name} and {reference[0]} at T={T}")
                else:
                    got, want = but_keys(got), but_keys(reference[2])
                    s.agree(
                        got, want, f"output and gradients except of keys, {name} and {reference[0]}, T={T}"
                    )
                parts = lm.unit_flops(model, T, backward=True)
                core_flops = sum(n for part, n in parts.items() if "scores" in part or "sum" in part)
                call = functools.partial(program, *inputs)
                n_token = trial.train.global_batch_size * T
                s.cases.append(Case({"formulation": name, "T": T}, call, n_token, facts, core_flops))


def prepare_decode(s: Session) -> None:
    """Reading in parallel and writing token by token, after several contexts, on one device."""
    config, L = s.config, s.config.model.block_len
    if not config.model.carries_state:
        raise InputError(f"config.model.attention={config.model.attention} cannot decode; use vq")
    model = lm.for_platform(config.model, sharding.platform(s.mesh))
    weights = jax.jit(lambda: lm.init(model, jax.random.key(config.train.seed)))()
    contexts = [-(-n // L) * L for n in numbers(config.bench.contexts, "contexts")]
    states, now = {}, lm.start(model, 1)
    for context in contexts:
        for start in range(int(now.position), context, draw.READ_BLOCKS * L):
            n_token = min(draw.READ_BLOCKS * L, context - start)
            now = draw.read(weights, random_tokens(model, 1, n_token, start), now, model)
        states[context] = now
    agree_decoding(s, weights, states[contexts[0]], random_tokens(model, 1, L, 1), model)
    jax.clear_caches()  # otherwise a program used above would seem to compile in no time
    for B in numbers(config.bench.batch_sizes, "batch_sizes"):
        add_decoding(s, weights, B, {n: draw.beside([now] * B, model) for n, now in states.items()}, model)


def random_tokens(model: Model, n_sequence: int, n_token: int, seed: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (n_sequence, n_token), 0, model.n_vocab)


def add_decoding(s: Session, weights: lm.Weights, B: int, states: dict[int, lm.State], model: Model) -> None:
    """A case of reading and one of writing after each state, compiled once for all states."""
    like, config = next(iter(states.values())), s.config
    piece = draw.READ_BLOCKS * model.block_len
    more_BT, first_B = random_tokens(model, B, piece, 1), random_tokens(model, B, 1, 2)[:, 0]
    decodings = {context: draw.begin(weights, now, model) for context, now in states.items()}
    rows = (jnp.full((B, config.bench.n_draw), draw.DRAWN), jnp.arange(B), jax.random.key(0))
    how = (model, config.sample.temperature, config.sample.nucleus)
    read, read_facts = compiled(draw.read, weights, more_BT, like, model)
    write, write_facts = compiled(draw.write, weights, next(iter(decodings.values())), first_B, *rows, *how)
    for context, now in states.items():
        labels = {"batch": B, "context": context}
        with s.trying(**labels) as go:
            if go:
                prefill = functools.partial(read, weights, more_BT, now)
                decode = functools.partial(_write_on, write, weights, decodings, context, first_B, *rows)
                jax.block_until_ready((prefill(), decode()))
                s.cases.append(Case({"work": "prefill", **labels}, prefill, B * piece, read_facts))
                s.cases.append(
                    Case({"work": "decode", **labels}, decode, B * config.bench.n_draw, write_facts)
                )


def _write_on(
    write: Callable, weights: lm.Weights, decodings: dict[int, lm.Decoding], context: int, *rest: Any
) -> jax.Array:
    """The tokens that follow those of the call before, whose state was donated."""
    decodings[context], tokens_BT, _ = write(weights, decodings[context], *rest)
    return tokens_BT


def agree_decoding(
    s: Session, weights: lm.Weights, now: lm.State, tokens_1T: jax.Array, model: Model
) -> None:
    """Checks that reading a block in parallel and token by token predict what follows alike."""
    targets_1T, mask_1T = tokens_1T[:, ::-1], jnp.ones_like(tokens_1T)

    @jax.jit
    def both() -> tuple[jax.Array, jax.Array]:
        x_1TD, *_ = lm.forward(weights, tokens_1T, mask_1T, now, model)
        step = lambda decoding, token_B: lm.step(weights, token_B, decoding, model)[::-1]
        decoding = lm.begin(weights, now, model)
        _, log_probs_T1C = jax.lax.scan(step, decoding, tokens_1T.T)
        chosen_T11 = jnp.take_along_axis(log_probs_T1C, targets_1T.T[..., None], -1)
        return loss.token_nll(weights, x_1TD, targets_1T, mask_1T, model).mean(), -chosen_T11.mean()

    parallel, recurrent = both()
    context = int(now.position)
    s.agree(recurrent, parallel, f"loss of a block decoded and read in parallel after {context} tokens")


def prepare_data(s: Session) -> None:
    """The data pipeline from the memory map, and the train step that it must feed."""
    config = s.config
    sequences = Sequences(open_corpus(config.data), "train", config.train.sequence_len)
    B, T = config.train.global_batch_size, config.train.sequence_len
    open_batches = lambda workers: training_batches(
        sequences, batch_size=B, seed=config.train.seed, workers=workers
    )
    with contextlib.closing(open_batches(0)) as once:
        want = next(once)
    batches = open_batches(config.data.workers)
    got = next(batches)
    if any((got[name] != want[name]).any() for name in want):
        raise DisagreementError("no speed is given: two readings of batch 0 differ")
    s.note("checked: two readings of batch 0 are equal")
    call = lambda: [next(batches) for _ in range(N_BATCH)]
    s.cases.append(Case({"work": f"{N_BATCH} batches"}, call, N_BATCH * B * T))
    with s.trying(work=STEP) as go:
        if go:
            train_case(s, config, Carried(config, s.mesh), {"work": STEP})


PREPARE = {
    "train": prepare_train, "attention": prepare_attention, "decode": prepare_decode, "data": prepare_data,
}  # fmt: skip
