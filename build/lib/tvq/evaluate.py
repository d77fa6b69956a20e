"""Evaluation: every token of a split exactly once, each sequence from the empty state.

Sums of each sequence are added on the host in float64 and in order, so that the result does not depend on
batch size or devices.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import lax
from jax.sharding import Mesh

from tvq import cluster, config, loss, mesh, metrics, optimizer, state
from tvq.checkpoint import Checkpoints, Restored
from tvq.config import Config, Model
from tvq.data import vocabulary
from tvq.data.corpus import AnyCorpus, open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import evaluation_batches
from tvq.model import transformer


def make(config: Model, devices: Mesh, piece_len: int) -> Callable:
    """The jitted `(params, codebooks, batch [B_global,T]) -> (nats [B_global], unmasked tokens [B_global])`.

    It reads `piece_len` tokens at a time, so that memory does not grow with T; the result does not depend on
    piece_len, a multiple of block_len that divides T.
    """
    config = transformer.suited(config, mesh.platform(devices))

    def score(params: dict, codebooks: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        B = batch["inputs"].shape[0]
        pieces = jax.tree.map(lambda x: x.reshape(B, -1, piece_len).swapaxes(0, 1), batch)
        position, *of_sequences = transformer.initial_state(config, B)
        empty = transformer.State(position, *lax.pcast(of_sequences, mesh.DATA_AXES, to="varying"))

        def read(state: transformer.State, piece: dict) -> tuple:
            x_BTD, state, _ = transformer.forward(
                params, codebooks, piece["inputs"], piece["loss_mask"], state, config
            )
            nll_BT = loss.token_nll(params, x_BTD, piece["targets"], piece["loss_mask"], config)
            return state, (nll_BT.sum(1), piece["loss_mask"].sum(1))

        _, sums = lax.scan(read, empty, pieces)
        return jax.tree.map(lambda x: x.sum(0), sums)

    sharded = jax.shard_map(
        score,
        mesh=devices,
        in_specs=(mesh.WHOLE, mesh.WHOLE, mesh.BATCH),
        out_specs=(mesh.BATCH, mesh.BATCH),
    )
    return jax.jit(sharded, out_shardings=mesh.sharding(devices, mesh.WHOLE))


def total(
    score: Callable,
    params: dict,
    codebooks: dict,
    batches: Iterable[dict[str, jax.Array]],
    progress: Callable[[int], Any] = lambda n_batch: None,
) -> tuple[float, int]:
    """Nats and tokens over all batches. `progress` hears how many batches are done."""
    nats, n_token, waiting = 0.0, 0, None
    for n_batch, batch in enumerate(batches):
        # Read the sums of a batch only once the next is under way.
        ready, waiting = waiting, score(params, codebooks, batch)
        if ready is not None:
            nats, n_token = _add(nats, n_token, ready)
        progress(n_batch + 1)
    return _add(nats, n_token, waiting) if waiting is not None else (nats, n_token)


def _add(nats: float, n_token: int, sums: tuple[jax.Array, jax.Array]) -> tuple[float, int]:
    nats_B, count_B = (np.asarray(x) for x in sums)
    for value in nats_B.tolist():
        nats += value
    return nats, n_token + int(count_B.sum())


def result(nats: float, n_token: int, n_byte: int) -> dict[str, float]:
    """The metrics of a split: nats and bits a token, bits a byte of the original text."""
    if n_token == 0:
        raise ValueError("there is no token to evaluate")
    return {
        "loss": nats / n_token,
        "bits_per_token": nats / n_token / math.log(2),
        "bits_per_byte": nats / n_byte / math.log(2),
        "n_token": n_token,
        "n_byte": n_byte,
    }


def batch_size(c: Config) -> int:
    """Sequences of an evaluation batch."""
    return c.evaluate.batch_size or c.train.global_batch_size


def piece_len(c: Config) -> int:
    """Tokens read at a time: as many as training holds in memory."""
    return c.train.segment_len or c.train.update_len


def line(name: str, result: dict[str, float], corpus: AnyCorpus) -> str:
    """The result of a split for the eye, beside what gzip makes of it."""
    info = corpus.info(name)
    text = f"{name} loss {result['loss']:.4f}, {result['bits_per_byte']:.3f} bits a byte"
    if info.gzip_bytes is not None:
        text += f" (gzip -9: {8 * info.gzip_bytes / info.n_byte:.3f})"
    return text


def check_vocabulary(corpus: AnyCorpus, config: Model) -> None:
    """ValueError if the data's ids are not those of the model."""
    if corpus.vocabulary.size != config.n_vocab:
        raise ValueError(
            f"config.model.n_vocab is {config.n_vocab} but the data in {corpus.folder} has a vocabulary of"
            f" {corpus.vocabulary.size} ids ({corpus.vocabulary.name}); set it to {corpus.vocabulary.size}"
        )


def check_same_vocabulary(corpus: AnyCorpus, restored: Restored) -> None:
    """ValueError if a model of as many ids was trained on others."""
    ours = vocabulary.describe(corpus.vocabulary)
    theirs = {name: restored.data["vocabulary"][name] for name in ours}
    if ours != theirs:
        raise ValueError(
            f"the data in {corpus.folder} has the vocabulary {ours}, checkpoint {restored.step} was trained"
            f" on {theirs}; prepare the data with the checkpoint's"
        )


def split(
    score: Callable,
    params: dict,
    codebooks: dict,
    corpus: AnyCorpus,
    name: str,
    devices: Mesh,
    *,
    sequence_len: int,
    batch_size: int,
    progress: Callable[[int, int], Any],
) -> dict[str, float]:
    """`result` of a whole split. `progress` hears batches done and batches in all."""
    sequences = Sequences(corpus, name, sequence_len)
    n_batch = -(-len(sequences) // batch_size)
    rows = mesh.local_rows(devices, batch_size)
    with contextlib.closing(evaluation_batches(sequences, batch_size=batch_size, rows=rows)) as batches:
        placed = (mesh.global_batch(devices, batch, batch_size) for batch in batches)
        nats, n_token = total(score, params, codebooks, placed, lambda done: progress(done, n_batch))
    assert n_token == sequences.n_token, f"{n_token} of {sequences.n_token} tokens evaluated"
    return result(nats, n_token, corpus.info(name).n_byte)


def restore(c: Config, workdir: epath.Path, devices: Mesh, say: Callable[[str], None]) -> Restored:
    """The newest whole checkpoint of a run, on any mesh. ValueError: there is none."""
    abstract = mesh.with_sharding(devices, state.abstract(c.model, optimizer.make(c.optimizer)))
    if not (workdir / "checkpoints").exists():
        raise ValueError(f"--workdir={workdir} holds no checkpoint; train first")
    with Checkpoints(
        workdir / "checkpoints", keep=c.checkpoint.keep, keep_every=c.checkpoint.keep_every, read_only=True
    ) as checkpoints:
        restored = checkpoints.restore(abstract, say)
    if restored is None:
        raise ValueError(f"--workdir={workdir} holds no checkpoint yet")
    return restored


def evaluate(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Scores `evaluate.split` with the newest checkpoint; prints a line and, for programs, a row of JSON."""
    corpus = open_corpus(c.data)
    check_vocabulary(corpus, c.model)
    corpus.info(c.evaluate.split)
    processes = cluster.start(place, c.cluster, config.common(c), log.say, stoppable=False)
    devices = mesh.make(c.mesh, jax.devices())
    mesh.check_batch(devices, "evaluate.batch_size", batch_size(c))
    with metrics.Console(quiet=not processes.is_main) as console:
        restored = restore(c, workdir, devices, console.say)
        check_same_vocabulary(corpus, restored)
        now = restored.state
        found = split(
            make(c.model, devices, piece_len(c)),
            now.params,
            now.codebooks,
            corpus,
            c.evaluate.split,
            devices,
            sequence_len=c.train.sequence_len,
            batch_size=batch_size(c),
            progress=lambda done, of: console.progress(f"evaluating: batch {done} of {of}", brief=True),
        )
        console.progress("", brief=True)
        console.say(line(c.evaluate.split, found, corpus))
        console.say(json.dumps({"step": int(now.step), "split": c.evaluate.split, **found}))
    processes.finish()
    return 0
