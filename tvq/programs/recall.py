"""The recall probe: multi-query associative recall (Arora et al. 2023, "Zoology"), generated from a seed.

Random tokens in slots: a key and its value; now and then the key of an earlier slot occurs again, and the
model must give the value that came with it. Keys differ, and none is asked for twice, so the answer stands in
exactly one place, as far back as the table says: in the window of the query's block, or only in the cache.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from tvq import cluster, sharding
from tvq.config import common
from tvq.errors import InputError
from tvq.programs import evaluate
from tvq.run import metrics, records, restore, results
from tvq.schema import END, UNKNOWN, Config

FIRST = UNKNOWN + 1  # the ids from here on are text
DISTANCES = 64


class Probe(NamedTuple):
    """`distance` is that from a question to the answer's earlier place, 0 where nothing is asked."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    distance_BT: np.ndarray


def probe(n_sequence: int, length: int, n_vocab: int, seed: int) -> Probe:
    """Sequences of at least three slots; half of the later ones are questions, with log-uniform distances.

    InputError: the length is too short for a question, or the vocabulary too small.
    """
    n_text = n_vocab - FIRST
    if n_text < 2:
        raise InputError(
            f"config.model.n_vocab {n_vocab} leaves {n_text} ids for keys and values; it takes two"
        )
    # Keys so long that at most one in sixteen possible keys is used.
    n_key = next(n for n in range(1, 64) if n_text**n >= 16 * length)
    slot = n_key + 1
    n_slot = length // slot
    if n_slot < 3:
        raise InputError(
            f"config.recall.length {length} holds {n_slot} slots of {slot} tokens; use {8 * slot} or more"
        )
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(FIRST, n_vocab, (n_sequence, length + 1), dtype=np.int32)
    tokens_BT[:, 0] = END
    distance_BT = np.zeros((n_sequence, length), np.int64)
    for tokens, distance in zip(tokens_BT, distance_BT, strict=True):
        keys = iter(_unlike(rng, n_slot, n_text, n_key))
        unasked = np.zeros(n_slot, bool)
        for j in range(n_slot):
            start, back = 1 + j * slot, round(math.exp(rng.uniform(0, math.log(max(j, 1)))))
            if rng.random() < 0.5 and unasked[j - back]:
                shown = 1 + (j - back) * slot
                tokens[start : start + slot] = tokens[shown : shown + slot]
                unasked[j - back] = False
                # The value is predicted at the last token of the key, one before it.
                distance[start + n_key - 1] = back * slot - 1
            else:
                tokens[start : start + n_key] = FIRST + next(keys)
                unasked[j] = True
    return Probe(tokens_BT[:, :-1], tokens_BT[:, 1:], distance_BT)


def _unlike(rng: np.random.Generator, n: int, n_text: int, n_key: int) -> np.ndarray:
    """n different keys `[n, n_key]` of numbers below n_text."""
    numbers = np.unique(rng.integers(0, n_text**n_key, 2 * n))
    digits = rng.permutation(numbers)[:n, None] // n_text ** np.arange(n_key)[None]
    return digits % n_text


def in_window(distance_BT: np.ndarray, block_len: int, mem_len: int) -> np.ndarray:
    """Whether the earlier place is in the window of the question's block: its keys are seen exactly."""
    position_T = np.arange(distance_BT.shape[1])
    return distance_BT <= position_T % block_len + mem_len


def answers(nats_BT: np.ndarray, distance_BT: np.ndarray, window_BT: np.ndarray) -> list[dict[str, Any]]:
    """Questions and answers by where the answer stands: in the window, in the cache, and by distance.

    An answer counts as recalled if it gets more than half of the probability.
    """
    asked = distance_BT > 0
    power = np.frexp(distance_BT)[1]
    groups: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"where": "window"}, asked & window_BT), ({"where": "cache"}, asked & ~window_BT),
    ]  # fmt: skip
    groups += [({"from": 1 << i >> 1, "to": (1 << i) - 1}, asked & (power == i)) for i in range(1, DISTANCES)]
    table = []
    for name, chosen in groups:
        if chosen.any():
            nats = nats_BT[chosen].astype(np.float64)
            numbers = {"recalled": float(np.mean(nats < math.log(2))), "loss": float(nats.mean())}
            table.append(name | numbers | {"n_question": int(chosen.sum())})
    return table


def show(table: list[dict[str, Any]], chance: float) -> str:
    """The table, readable; `chance` is the loss of a model that recalls nothing."""
    lines = [f"{'tokens back':>20}  {'recalled':>8}  {'loss':>7}  {'questions':>9}"]
    for row in table:
        where = row.get("where") or f"{row['from']:,} to {row['to']:,}"
        lines.append(f"{where:>20}  {row['recalled']:7.1%}  {row['loss']:7.4f}  {row['n_question']:9,}")
    lines = [line.replace("%", " %") for line in lines]
    return "\n".join([*lines, f"{'chance':>20}  {'':8}  {chance:7.4f}"])


def recall(
    config: Config, workdir: epath.Path, place: cluster.Place, log: cluster.Log, *, at: int | None = None
) -> int:
    """Probes the newest checkpoint; prints a table and, for programs, a row of JSON, kept in the workdir."""
    if not config.model.carries_state:
        raise InputError(
            f"config.model.attention={config.model.attention} carries no state for the probe to be read in"
            " pieces"
        )
    piece = evaluate.piece_len(config)
    length, n_row = -(-config.recall.length // piece) * piece, config.recall.n_sequence
    made = probe(n_row, length, config.model.n_vocab, config.recall.seed)
    processes = cluster.start(place, config.cluster, common(config), log.say, stoppable=False)
    mesh = sharding.make(config.mesh, jax.devices(), config)
    sharding.check_batch(mesh, "recall.n_sequence", n_row)
    rows = sharding.local_rows(mesh, n_row)
    with metrics.Console(silent=not processes.is_main) as console:
        restored = restore.weights(config, workdir, mesh, console.say, at)
        now = restored.state
        empty, read = evaluate.reader(evaluate.apart(config.model), mesh, config.mesh.shard_params)
        state, nats, so_far = empty(n_row), [], metrics.Progress("probing", "tokens")
        for start in range(0, length, piece):
            cut = lambda x, start=start: np.ascontiguousarray(x[rows, start : start + piece])
            inputs_BT, targets_BT = cut(made.inputs_BT), cut(made.targets_BT)
            batch = {"inputs": inputs_BT, "targets": targets_BT, "loss_mask": np.ones_like(inputs_BT)}
            nats_BT, state = read(now.weights, sharding.global_batch(mesh, batch, n_row), state)
            nats.append(np.asarray(nats_BT))
            console.progress(so_far.line(start + piece, length), brief=True)
        window_BT = in_window(made.distance_BT, config.model.block_len, config.model.mem_len)
        table = answers(np.concatenate(nats, 1), made.distance_BT, window_BT)
        row = {"step": restored.step, "split": "recall", "length": length, "answers": table}
        console.say(show(table, math.log(config.model.n_vocab - FIRST)))
        console.say(records.to_json(row))
        if processes.is_main:
            chosen = {"length": length, "n_sequence": n_row, "seed": config.recall.seed}
            results.record(workdir, config, f"step_{row['step']}_recall", chosen, row, mesh, log.say)
    processes.finish()
    return 0
