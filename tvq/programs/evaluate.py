"""Evaluation: every token of a split exactly once.

Each sequence of T tokens starts from the empty state; or, with carry, each document is read whole, however
long. Either is read in pieces, between which the state stays on the devices: memory does not grow with T.
Sums over rows are added exactly, on the host, so that the order of rows does not matter.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tvq import cluster, sharding
from tvq import model as lm
from tvq.config import common
from tvq.data import prepared, vocabulary
from tvq.data.corpus import Corpus, open_corpus
from tvq.data.packing import Streams
from tvq.data.pipeline import evaluation_pieces
from tvq.errors import InputError
from tvq.run import metrics, records, restore, results
from tvq.schema import Config, Model
from tvq.training import loss

# Beyond this many nats a word perplexity overflows, and means nothing: the text has no spaces between words.
MAX_NATS = 700.0


def reader(model: Model, mesh: Mesh, shard_params: bool = False) -> tuple[Callable, Callable]:
    """Two jitted functions: `empty(n_row)`, the state before the first token of every row, and `read`:

    `(weights, piece [B_global,U], state) -> (nats [B_global,U], state)`. The old state is donated.
    """
    model = lm.for_platform(model, sharding.platform(mesh))
    axes = sharding.axes(mesh, model, shard_params)
    state_specs = lm.state_specs(model, axes)
    places = jax.tree.map(lambda spec: sharding.sharding(mesh, spec), state_specs)

    def read(weights: lm.Weights, piece: dict, state: lm.State) -> tuple:
        inputs_BT, targets_BT, mask_BT = piece["inputs"], piece["targets"], piece["loss_mask"]
        weights = lm.gather(weights, model, axes)
        x_BTD, state, *_ = lm.forward(weights, inputs_BT, mask_BT, state, model, None, axes)
        return loss.token_nll(weights, x_BTD, targets_BT, mask_BT, model), state

    sharded = jax.shard_map(
        read,
        mesh=mesh,
        in_specs=(lm.specs(model, axes), sharding.spec("BT", axes), state_specs),
        out_specs=(sharding.spec("BT", axes), state_specs),
    )
    whole = sharding.sharding(mesh, sharding.WHOLE)
    empty = jax.jit(lambda n_row: lm.start(model, n_row), static_argnums=0, out_shardings=places)
    return empty, jax.jit(sharded, donate_argnums=2, out_shardings=(whole, places))


def apart(model: Model) -> Model:
    """The model, reading each document as if it were alone, whatever else is in its row."""
    return dataclasses.replace(model, attend_across_documents=False)


class ByContext:
    """Nats and tokens by how many tokens of the document come before: 0, 1, 2-3, 4-7, ..."""

    def __init__(self) -> None:
        self.nats, self.n_token = np.zeros(64), np.zeros(64, np.int64)
        self._rows: list[float] = []

    @property
    def total(self) -> float:
        """All nats."""
        return math.fsum(self._rows)

    def add(self, nats: np.ndarray, contexts: np.ndarray) -> None:
        """Of tokens `[B,T]` whose context is known; -1 marks padding."""
        seen = contexts >= 0
        self._rows += np.where(seen, nats, 0).sum(1, dtype=np.float64).tolist()
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


def read_all(
    empty: Callable,
    read: Callable,
    weights: lm.Weights,
    streams: Streams,
    mesh: Mesh,
    progress: Callable[[int], Any] = lambda n_piece: None,
) -> ByContext:
    """All tokens of the streams by their context. `progress` is called with the number of pieces done."""
    by_context, n_row, waiting = ByContext(), len(streams.rows), None
    pieces = evaluation_pieces(streams, sharding.local_rows(mesh, n_row))
    with contextlib.closing(pieces):
        for number, piece in enumerate(pieces):
            if streams.begins(number):
                state = empty(n_row)
            nats_BT, state = read(weights, sharding.global_batch(mesh, piece, n_row), state)
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


def batch_size(config: Config) -> int:
    """Sequences of an evaluation batch."""
    return config.evaluate.batch_size or config.train.global_batch_size


def piece_len(config: Config) -> int:
    """Tokens read at a time: as many as training holds in memory."""
    return config.train.segment_len or config.train.update_len


def line(name: str, result: dict[str, float], corpus: Corpus) -> str:
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


def check_vocabulary(corpus: Corpus, model: Model) -> None:
    """InputError if the data's vocabulary size is not the model's."""
    if corpus.vocabulary.size != model.n_vocab:
        raise InputError(
            f"config.model.n_vocab is {model.n_vocab} but the data in {corpus.where} has a vocabulary of"
            f" {corpus.vocabulary.size} ids ({corpus.vocabulary.name}); set it to {corpus.vocabulary.size}"
        )


def check_same_vocabulary(corpus: Corpus, step: int, data: dict) -> None:
    """InputError if the model was trained on a different vocabulary of the same size."""
    ours = vocabulary.describe(corpus.vocabulary)
    theirs = {name: data["vocabulary"][name] for name in ours}
    if ours != theirs:
        raise InputError(
            f"the data in {corpus.where} has the vocabulary {ours}, checkpoint {step} was trained on"
            f" {theirs}; prepare the data with the checkpoint's"
        )


def scorer(config: Config, corpus: Corpus, mesh: Mesh) -> Callable:
    """`(weights, progress) -> (result, table by context)` of `evaluate.split`, as configured.

    The table is empty if context is not carried. `progress` is called with pieces done and pieces in all.
    """
    name, carry = config.evaluate.split, config.evaluate.carry
    sequence_len = 0 if carry else config.train.sequence_len
    streams = Streams(corpus, name, batch_size(config), piece_len(config), sequence_len)
    empty, read = reader(apart(config.model) if carry else config.model, mesh, config.mesh.shard_params)

    def score(weights: lm.Weights, progress: Callable[[int, int], Any]) -> tuple[dict, list]:
        n_piece = len(streams)
        by_context = read_all(empty, read, weights, streams, mesh, lambda done: progress(done, n_piece))
        n_token = int(by_context.n_token.sum())
        assert n_token == streams.n_token, f"{n_token} of {streams.n_token} tokens evaluated"
        table = by_context.table() if carry else []
        return result(by_context.total, n_token, corpus.info(name)), table

    return score


def evaluate(
    config: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log, *, at: int | None = None
) -> int:
    """Scores `evaluate.split` with the newest checkpoint, or with that of a step.

    Prints a line and, for programs, a row of JSON, which is also written to `workdir/evaluations/`, with all
    that is needed to repeat it.
    """
    corpus = open_corpus(config.data)
    check_vocabulary(corpus, config.model)
    corpus.info(config.evaluate.split)
    processes = cluster.start(place, config.cluster, common(config), log.say, stoppable=False)
    mesh = sharding.make(config.mesh, jax.devices(), config)
    sharding.check(mesh, config)
    sharding.check_batch(mesh, "evaluate.batch_size", batch_size(config))
    with metrics.Console(silent=not processes.is_main) as console:
        restored = restore.weights(config, workdir, mesh, console.say, at)
        check_same_vocabulary(corpus, restored.step, restored.data)
        weights = restored.state.weights
        so_far = metrics.Progress("evaluating", "pieces")
        scores, table = scorer(config, corpus, mesh)(
            weights,
            lambda done, of: console.progress(so_far.line(done, of), brief=True),
        )
        row = {"step": restored.step, "split": config.evaluate.split, **scores}
        if table:
            console.say(show(table))
        console.say(line(config.evaluate.split, scores, corpus))
        console.say(records.to_json(row))
        if processes.is_main:
            data = {
                "folder": corpus.where,
                "fingerprint": corpus.fingerprint,
                "vocabulary": vocabulary.describe(corpus.vocabulary),
            }
            name = f"step_{row['step']}_{row['split']}{'_carried' if config.evaluate.carry else ''}"
            chosen = {
                "data": corpus.fingerprint,
                "sequence_len": 0 if config.evaluate.carry else config.train.sequence_len,
            }
            results.record(
                workdir, config, name, chosen, row | {"by_context": table, "data": data}, mesh, log.say
            )
    processes.finish()
    return 0
