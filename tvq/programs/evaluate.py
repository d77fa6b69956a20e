"""Evaluation: every token of a split exactly once.

Each sequence of T tokens starts from the empty state; or, with carry, each document is read whole, however
long, in pieces between which the state stays on the devices. Sums are added on the host in float64 and in
order, so that the result does not depend on batch size or devices.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import lax
from jax.sharding import Mesh

from tvq import cluster, config, sharding
from tvq import model as lm
from tvq.config import Config, Model
from tvq.data import prepared, vocabulary
from tvq.data.corpus import AnyCorpus, open_corpus
from tvq.data.packing import Sequences, Streams
from tvq.data.pipeline import evaluation_batches
from tvq.errors import InputError
from tvq.run import metrics, records, restore, results
from tvq.run.checkpoint import Restored
from tvq.training import loss

# Beyond this many nats a word perplexity overflows, and means nothing: the text has no spaces between words.
MAX_NATS = 700.0


def make(config: Model, mesh: Mesh, piece_len: int, shard_params: bool = False) -> Callable:
    """The jitted `(weights, batch [B_global,T]) -> (nats [B_global], unmasked tokens [B_global])`.

    It reads `piece_len` tokens at a time, so that memory does not grow with T; the result does not depend on
    piece_len, a multiple of block_len that divides T.
    """
    config = lm.for_platform(config, sharding.platform(mesh))
    axes = sharding.axes(mesh, config, shard_params)
    n_token = piece_len // mesh.shape["sequence"]

    def score(weights: lm.Weights, batch: dict, empty: lm.State) -> tuple[jax.Array, jax.Array]:
        B = batch["inputs"].shape[0]
        pieces = jax.tree.map(lambda x: x.reshape(B, -1, n_token).swapaxes(0, 1), batch)
        weights = lm.gather(weights, config, axes)

        def read(state: lm.State, piece: dict) -> tuple:
            x_BTD, state, *_ = lm.forward(
                weights, piece["inputs"], piece["loss_mask"], state, config, None, axes
            )
            nll_BT = loss.token_nll(weights, x_BTD, piece["targets"], piece["loss_mask"], config)
            return state, (nll_BT.sum(1), piece["loss_mask"].sum(1))

        _, sums = lax.scan(read, empty, pieces)
        sums = jax.tree.map(lambda x: x.sum(0), sums)
        return lax.psum(sums, axes.T) if axes.T else sums

    sharded = jax.shard_map(
        score,
        mesh=mesh,
        in_specs=(
            lm.specs(config, axes),
            sharding.spec("BT", axes),
            lm.state_specs(config, axes),
        ),
        out_specs=(sharding.BATCH, sharding.BATCH),
    )

    def score_whole(weights: lm.Weights, batch: dict) -> tuple[jax.Array, jax.Array]:
        empty = lm.start(config, batch["inputs"].shape[0])
        return sharded(weights, sharding.split_over_sequence(mesh, batch, piece_len), empty)

    return jax.jit(score_whole, out_shardings=sharding.sharding(mesh, sharding.WHOLE))


def total(
    score: Callable,
    weights: lm.Weights,
    batches: Iterable[dict[str, jax.Array]],
    progress: Callable[[int], Any] = lambda n_batch: None,
) -> tuple[float, int]:
    """Nats and tokens over all batches. `progress` is called with the number of batches done."""
    nats, n_token, waiting = 0.0, 0, None
    for n_batch, batch in enumerate(batches):
        # Read the sums of a batch only once the next is under way.
        ready, waiting = waiting, score(weights, batch)
        if ready is not None:
            nats, n_token = _add(nats, n_token, ready)
        progress(n_batch + 1)
    return _add(nats, n_token, waiting) if waiting is not None else (nats, n_token)


def _add(nats: float, n_token: int, sums: tuple[jax.Array, jax.Array]) -> tuple[float, int]:
    nats_B, count_B = (np.asarray(x) for x in sums)
    for value in nats_B.tolist():
        nats += value
    return nats, n_token + int(count_B.sum())


def make_carried(config: Model, mesh: Mesh, shard_params: bool = False) -> tuple[Callable, Callable]:
    """Two jitted functions: `empty(n_row)`, the state before the first token of every row, and `read`:

    `(weights, piece [B_global,U], state) -> (nats [B_global,U], state)`. Documents are kept apart:
    each is read as if it were alone, whatever else is in its row. The old state is donated.
    """
    config = dataclasses.replace(
        lm.for_platform(config, sharding.platform(mesh)), attend_across_documents=False
    )
    axes = sharding.axes(mesh, config, shard_params)
    state_specs = lm.state_specs(config, axes)
    places = jax.tree.map(lambda spec: sharding.sharding(mesh, spec), state_specs)

    def read(weights: lm.Weights, piece: dict, state: lm.State) -> tuple:
        inputs_BT, targets_BT, mask_BT = piece["inputs"], piece["targets"], piece["loss_mask"]
        weights = lm.gather(weights, config, axes)
        x_BTD, state, *_ = lm.forward(weights, inputs_BT, mask_BT, state, config, None, axes)
        return loss.token_nll(weights, x_BTD, targets_BT, mask_BT, config), state

    sharded = jax.shard_map(
        read,
        mesh=mesh,
        in_specs=(lm.specs(config, axes), sharding.spec("BT", axes), state_specs),
        out_specs=(sharding.spec("BT", axes), state_specs),
    )
    whole = sharding.sharding(mesh, sharding.WHOLE)
    empty = jax.jit(lambda n_row: lm.start(config, n_row), static_argnums=0, out_shardings=places)
    return empty, jax.jit(sharded, donate_argnums=2, out_shardings=(whole, places))


class ByContext:
    """Nats and tokens by how many tokens of the document come before: 0, 1, 2-3, 4-7, ..."""

    def __init__(self) -> None:
        self.nats, self.n_token = np.zeros(64), np.zeros(64, np.int64)

    def add(self, nats: np.ndarray, contexts: np.ndarray) -> None:
        """Of tokens whose context is known; -1 marks padding."""
        seen = contexts >= 0
        bucket = np.frexp(contexts[seen])[1]
        self.nats += np.bincount(bucket, nats[seen].astype(np.float64), 64)
        self.n_token += np.bincount(bucket, minlength=64)

    def table(self) -> list[dict[str, float]]:
        return [
            {
                "context_from": 1 << i >> 1,
                "context_to": max((1 << i) - 1, 0),
                "loss": float(self.nats[i] / n),
                "bits_per_token": float(self.nats[i] / n / math.log(2)),
                "n_token": n,
            }
            for i, n in enumerate(self.n_token.tolist())
            if n
        ]


def carried(
    empty: Callable,
    read: Callable,
    weights: lm.Weights,
    streams: Streams,
    mesh: Mesh,
    progress: Callable[[int], Any] = lambda n_piece: None,
) -> ByContext:
    """All tokens of the streams by their context. `progress` is called with the number of pieces done."""
    by_context, n_row, waiting = ByContext(), len(streams.rows), None
    local, state = sharding.local_rows(mesh, n_row), empty(n_row)
    for number in range(len(streams)):
        piece = sharding.global_batch(mesh, streams.piece(number, local), n_row)
        nats_BT, state = read(weights, piece, state)
        # Read the numbers of a piece only once the next is under way.
        ready, waiting = waiting, (nats_BT, number)
        if ready is not None:
            by_context.add(np.asarray(ready[0]), streams.contexts(ready[1]))
        progress(number + 1)
    if waiting is not None:
        by_context.add(np.asarray(waiting[0]), streams.contexts(waiting[1]))
    return by_context


def result(nats: float, n_token: int, info: prepared.Split) -> dict[str, float]:
    """The metrics of a split: nats and bits a token, bits a byte of the text or a value of the images.

    Where the text has words, perplexity is that of a word: `exp(nats / words)`, whatever the tokens are.
    """
    if n_token == 0 or info.n_byte == 0:
        raise InputError("the split has no tokens to evaluate, or only end ids")
    scores = {
        "loss": nats / n_token,
        "bits_per_token": nats / n_token / math.log(2),
        "bits_per_byte": nats / info.n_byte / math.log(2),
        "n_token": n_token,
        "n_byte": info.n_byte,
    }
    if info.n_unknown:
        scores["n_unknown"] = info.n_unknown
    if info.n_word and nats / info.n_word < MAX_NATS:
        scores |= {"word_perplexity": math.exp(nats / info.n_word), "n_word": info.n_word}
    return scores


def batch_size(c: Config) -> int:
    """Sequences of an evaluation batch."""
    return c.evaluate.batch_size or c.train.global_batch_size


def piece_len(c: Config) -> int:
    """Tokens read at a time: as many as training holds in memory."""
    return c.train.segment_len or c.train.update_len


def line(name: str, result: dict[str, float], corpus: AnyCorpus) -> str:
    """The result of a split in one readable line, with gzip's for comparison."""
    info, unit = corpus.info(name), "dimension" if corpus.image_size else "byte"
    text = f"{name} loss {result['loss']:.4f}, {result['bits_per_byte']:.3f} bits per {unit}"
    if info.gzip_bytes is not None:
        text += f" (gzip -9: {8 * info.gzip_bytes / info.n_byte:.3f})"
    if "word_perplexity" in result and corpus.vocabulary.name != "bytes":
        text += f", word perplexity {result['word_perplexity']:.4g}"
    if unknown := prepared.unknown(info):
        text += f"; {unknown}"
    return text


def show(table: list[dict[str, float]]) -> str:
    """The losses by context, as a readable table."""
    lines = [f"{'tokens before':>24}  {'loss':>7}  {'bits a token':>12}  {'tokens':>13}"]
    for row in table:
        span = f"{row['context_from']:,}"
        if row["context_to"] > row["context_from"]:
            span += f" to {row['context_to']:,}"
        lines.append(f"{span:>24}  {row['loss']:7.4f}  {row['bits_per_token']:12.4f}  {row['n_token']:13,}")
    return "\n".join(lines)


def check_vocabulary(corpus: AnyCorpus, config: Model) -> None:
    """InputError if the data's vocabulary size is not the model's."""
    if corpus.vocabulary.size != config.n_vocab:
        raise InputError(
            f"config.model.n_vocab is {config.n_vocab} but the data in {corpus.folder} has a vocabulary of"
            f" {corpus.vocabulary.size} ids ({corpus.vocabulary.name}); set it to {corpus.vocabulary.size}"
        )


def check_same_vocabulary(corpus: AnyCorpus, restored: Restored) -> None:
    """InputError if the model was trained on a different vocabulary of the same size."""
    ours = vocabulary.describe(corpus.vocabulary)
    theirs = {name: restored.data["vocabulary"][name] for name in ours}
    if ours != theirs:
        raise InputError(
            f"the data in {corpus.folder} has the vocabulary {ours}, checkpoint {restored.step} was trained"
            f" on {theirs}; prepare the data with the checkpoint's"
        )


def scorer(c: Config, corpus: AnyCorpus, mesh: Mesh) -> Callable:
    """`(weights, progress) -> (result, table by context)` of `evaluate.split`, as configured.

    The table is empty if context is not carried. `progress` is called with steps done and steps in all.
    """
    name, n_row = c.evaluate.split, batch_size(c)
    info, rows = corpus.info(name), sharding.local_rows(mesh, n_row)
    Progress = Callable[[int, int], Any]

    def of_sequences(weights: lm.Weights, progress: Progress) -> tuple[dict, list]:
        n_batch = -(-len(sequences) // n_row)
        with contextlib.closing(evaluation_batches(sequences, batch_size=n_row, rows=rows)) as batches:
            placed = (sharding.global_batch(mesh, batch, n_row) for batch in batches)
            nats, n_token = total(score, weights, placed, lambda done: progress(done, n_batch))
        assert n_token == sequences.n_token, f"{n_token} of {sequences.n_token} tokens evaluated"
        return result(nats, n_token, info), []

    def of_documents(weights: lm.Weights, progress: Progress) -> tuple[dict, list]:
        n_piece = len(streams)
        by_context = carried(empty, read, weights, streams, mesh, lambda done: progress(done, n_piece))
        n_token = int(by_context.n_token.sum())
        assert n_token == streams.n_token, f"{n_token} of {streams.n_token} tokens evaluated"
        return result(by_context.nats.sum(), n_token, info), by_context.table()

    if c.evaluate.carry:
        streams = Streams(corpus, name, n_row, piece_len(c))
        empty, read = make_carried(c.model, mesh, c.mesh.shard_params)
        return of_documents
    sequences = Sequences(corpus, name, c.train.sequence_len)
    score = make(c.model, mesh, piece_len(c), c.mesh.shard_params)
    return of_sequences


def evaluate(c: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log) -> int:
    """Scores `evaluate.split` with the newest checkpoint; prints a line and, for programs, a row of JSON.

    The row is also written to `workdir/evaluations/`, with all that is needed to repeat it.
    """
    corpus = open_corpus(c.data)
    check_vocabulary(corpus, c.model)
    corpus.info(c.evaluate.split)
    processes = cluster.start(place, c.cluster, config.common(c), log.say, stoppable=False)
    mesh = sharding.make(c.mesh, jax.devices(), c)
    sharding.check(mesh, c)
    sharding.check_batch(mesh, "evaluate.batch_size", batch_size(c))
    with metrics.Console(silent=not processes.is_main) as console:
        restored = restore.weights(c, workdir, mesh, console.say)
        check_same_vocabulary(corpus, restored)
        weights = restored.state.weights
        so_far = metrics.Progress("evaluating", "batches")
        scores, table = scorer(c, corpus, mesh)(
            weights,
            lambda done, of: console.progress(so_far.line(done, of), brief=True),
        )
        row = {"step": restored.step, "split": c.evaluate.split, **scores}
        if table:
            console.say(show(table))
        console.say(line(c.evaluate.split, scores, corpus))
        console.say(records.to_json(row))
        if processes.is_main:
            data = {
                "folder": str(corpus.folder),
                "fingerprint": corpus.fingerprint,
                "vocabulary": vocabulary.describe(corpus.vocabulary),
            }
            name = f"step_{row['step']}_{row['split']}{'_carried' if c.evaluate.carry else ''}"
            chosen = {
                "data": corpus.fingerprint,
                "sequence_len": 0 if c.evaluate.carry else c.train.sequence_len,
            }
            results.record(workdir, c, name, chosen, row | {"by_context": table, "data": data}, mesh, log.say)
    processes.finish()
    return 0
