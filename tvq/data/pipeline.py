"""Batches of sequences, read ahead by Grain.

Batch t is a function of (seed, t, batch_size): never of the processes that read it, of the rows that a
process asks for, or of where a run was resumed.
"""

import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Generator, Sequence

import grain
import numpy as np
from absl import flags

from tvq.data.packing import Example, Sequences, Streams
from tvq.errors import InputError

Batches = Generator[Example, None, None]
Rows = slice | Sequence[int]
ALL_ROWS = slice(None)
# Batches are large and cheap to read: a few in advance hide the reading.
READ_AHEAD = 4
SHARED_MEMORY = "/dev/shm"


class _Batches:
    """Random access to batches from `start` on: row j of batch t is sequence `order[t * batch_size + j]`."""

    def __init__(
        self, sequences: Sequences, order: Sequence[int], *, batch_size: int, rows: Rows, start: int = 0
    ) -> None:
        if batch_size < 1:
            raise InputError(f"a batch needs at least 1 sequence, not {batch_size}")
        if start < 0:
            raise InputError(f"the first batch is number 0, not {start}")
        self._sequences, self._order = sequences, order
        self._batch_size, self._start = batch_size, start
        self._rows = range(batch_size)[rows] if isinstance(rows, slice) else rows
        if not self._rows:
            raise InputError(f"{rows} takes none of the {batch_size} rows of a batch")

    def __len__(self) -> int:
        # An endless order has sys.maxsize elements.
        return max(0, len(self._order) // self._batch_size - self._start)

    def __getitem__(self, index: int) -> Example:
        """int32 [rows, T] each."""
        first = (self._start + index) * self._batch_size
        return self._sequences.batch([self._order[first + row] for row in self._rows])


def training_batches(
    sequences: Sequences,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Rows = ALL_ROWS,
    workers: int = 0,
) -> Batches:
    """Endless shuffled batches, from batch `start` on; each epoch has its own order.

    `batch_size` is global; this process gets its `rows`: `inputs, targets, loss_mask`, int32
    [rows, T] each. `workers` processes read ahead; 0 reads in threads. `close()` ends them.
    """
    batches = _Batches(sequences, _order(sequences, seed), batch_size=batch_size, rows=rows, start=start)
    return _read(batches, workers)


def _order(sequences: Sequences, seed: int) -> grain.MapDataset:
    """Endless sequence numbers: epoch after epoch of each folder, mixed by the folders' weights."""
    spans = list(zip(sequences.starts[:-1], sequences.starts[1:], strict=True))
    # Grain's epochs use seed, seed + 1, ...: hashed first, so that neighbouring seeds share no epoch.
    seeds = np.random.SeedSequence(seed).generate_state(len(spans)).tolist()
    orders = [
        grain.MapDataset.range(first, end).shuffle(seed=hashed).repeat(None)
        for (first, end), hashed in zip(spans, seeds, strict=True)
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, sequences.corpus.weights)


def evaluation_pieces(streams: Streams, rows: Sequence[int]) -> Batches:
    """All pieces of the streams, in order, of some rows: int32 [rows, length] each, read ahead in threads."""
    return _read(_Pieces(streams, rows), workers=0)


class _Pieces:
    """Random access to the pieces of some rows."""

    def __init__(self, streams: Streams, rows: Sequence[int]) -> None:
        self._streams, self._rows = streams, rows

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, number: int) -> Example:
        return self._streams.piece(number, self._rows)


def _read(batches: _Batches | _Pieces, workers: int) -> Batches:
    threads = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=READ_AHEAD)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(threads)
    if workers:
        # Grain's workers read absl flags, which are not parsed unless absl.app runs the program.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _start_worker)
    iterator = iter(dataset)
    try:
        for batch in iterator:
            # Copied out of the memory shared with a worker, so that it is free at once.
            yield {name: np.array(values) for name, values in batch.items()} if workers else batch
            del batch
    except RuntimeError as error:
        hint = why_ended(str(error), workers)
        if not hint:
            raise
        raise InputError(hint) from error
    finally:
        iterator.close()


def why_ended(error: str, workers: int) -> str:
    """What to do about a worker that a signal killed; nothing if none did."""
    code = re.search(r"exit code -(\d+)", error)
    if not code:
        return ""
    number, ended = int(code[1]), f"config.data.workers={workers}: one was killed by signal {code[1]}"
    if number == signal.SIGBUS:
        free = ""
        if os.path.isdir(SHARED_MEMORY):
            space = shutil.disk_usage(SHARED_MEMORY)
            free = f" ({space.free / 2**20:,.0f} of {space.total / 2**20:,.0f} MiB free)"
        return (
            f"{ended} (SIGBUS): {SHARED_MEMORY}, through which they pass batches, is too small{free};"
            " enlarge it (docker run --shm-size=2g), use fewer workers, or 0, which reads in threads"
        )
    if number == signal.SIGKILL:
        return (
            f"{ended} (SIGKILL), most likely for lack of memory; use fewer workers, or 0, or smaller batches"
        )
    return f"{ended}; config.data.workers=0 reads in threads and shows the error"


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker process. Without it Grain's workers would outlive a killed run forever."""
    # A signal to the whole group is for the run, which still needs batches until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
