import contextlib
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tvq.data import pipeline
from tvq.data.packing import Example, Sequences, Streams
from tvq.data.pipeline import evaluation_pieces, training_batches
from tvq.errors import InputError

NAMES = ["inputs", "targets", "loss_mask"]
N = 43


@pytest.fixture
def sequences(random_corpus) -> Sequences:
    """43 sequences of 4 tokens, the last padded. Fewer are slow: Grain's shuffle walks 2^16 / n steps."""
    made = Sequences(random_corpus, "train", 4)
    assert len(made) == N
    return made


def take(n: int, sequences: Sequences, **arguments) -> list[Example]:
    with contextlib.closing(training_batches(sequences, **arguments)) as batches:
        return [next(batches) for _ in range(n)]


def assert_same(left: list[Example], right: list[Example]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b) == set(NAMES)
        for name in NAMES:
            assert type(a[name]) is type(b[name]) is np.ndarray  # not a view of shared memory
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def which(sequences: Sequences, batches: list[Example]) -> list[int]:
    """The number of the sequence in each row of each batch."""
    known = {sequences[i]["targets"].tobytes(): i for i in range(len(sequences))}
    return [known[row.tobytes()] for batch in batches for row in batch["targets"]]


@pytest.mark.parametrize("batch_size", [1, 4, N, 60])
def test_each_epoch_is_another_permutation(sequences, batch_size):
    n_batch = -(-3 * N // batch_size)
    order = which(sequences, take(n_batch, sequences, batch_size=batch_size, seed=0))
    epochs = [order[i : i + N] for i in (0, N, 2 * N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(N)]}) == 4


def test_batches_are_int32(sequences):
    (batch,) = take(1, sequences, batch_size=3, seed=0)
    assert list(batch) == NAMES
    assert all(array.dtype == np.int32 and array.shape == (3, 4) for array in batch.values())
    assert all(type(array) is np.ndarray for array in batch.values())


RECORDED = [18, 35, 16, 7, 20, 13, 24, 0, 19, 17, 10, 28, 39, 15, 40, 34]


def test_the_order_never_changes(sequences):
    # Recorded: with another order old runs could not be continued.
    assert which(sequences, take(4, sequences, batch_size=4, seed=0)) == RECORDED


def test_seeds_differ_and_share_no_epoch(sequences):
    epochs = set()
    for seed in range(5):
        order = which(sequences, take(3, sequences, batch_size=N, seed=seed))
        epochs |= {tuple(order[i : i + N]) for i in (0, N, 2 * N)}
    assert len(epochs) == 15


def test_a_seed_of_any_size(sequences):
    assert len(take(1, sequences, batch_size=4, seed=2**40)) == 1


@pytest.mark.parametrize("batch_size", [10, N, 50])
@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_resumed_anywhere(sequences, batch_size, start):
    whole = take(start + 4, sequences, batch_size=batch_size, seed=1)
    assert_same(take(4, sequences, batch_size=batch_size, seed=1, start=start), whole[start:])


def test_resumed_far_away(sequences):
    far = 10**6
    batches = take(3, sequences, batch_size=N, seed=1, start=far)
    assert sorted(which(sequences, batches[:1])) == list(range(N))
    assert_same(take(1, sequences, batch_size=N, seed=1, start=far + 2), batches[2:])


def side_by_side(hosts: list[list[Example]]) -> list[Example]:
    """The global batches, from the batches of each host."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in NAMES}
        for parts in zip(*hosts, strict=True)
    ]


@pytest.mark.parametrize("n_host", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_hosts_together_read_the_whole_batch(sequences, n_host, batch_size):
    whole = take(5, sequences, batch_size=batch_size, seed=3)
    n_row = batch_size // n_host
    hosts = [
        take(5, sequences, batch_size=batch_size, seed=3, rows=slice(h * n_row, (h + 1) * n_row))
        for h in range(n_host)
    ]
    assert_same(side_by_side(hosts), whole)


def test_one_sequence_fills_any_batch(corpus_of):
    sequences = Sequences(corpus_of(train=[b"abc"]), "train", 16)
    for batch in take(3, sequences, batch_size=4, seed=0, start=5):
        assert batch["targets"].shape == (4, 16)
        assert (batch["targets"] == sequences[0]["targets"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(sequences, workers):
    arguments = {"batch_size": 5, "seed": 2, "start": 3, "rows": slice(1, 4)}
    assert_same(take(20, sequences, workers=workers, **arguments), take(20, sequences, **arguments))
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_error_in_a_worker(sequences):
    damage(sequences)
    with pytest.raises(ValueError, match=r"token 37 of .* is id 300"):
        take(3, sequences, batch_size=N, seed=0, workers=2)
    assert multiprocessing.active_children() == []


PROGRAM = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from tvq import config, schema
from tvq.data.corpus import open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches

if __name__ == "__main__":
    folder, ending = sys.argv[1:]
    sequences = Sequences(open_corpus(schema.Data(source="tokens", path=folder)), "train", 4)
    batches = training_batches(sequences, batch_size=40, seed=0, workers=2)
    next(batches), next(batches)
    workers = multiprocessing.active_children()
    print(*[worker.pid for worker in workers], flush=True)
    if ending == "signal":
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        for _ in range(9):
            next(batches)
        batches.close()
        while "/psm_" in Path("/proc/self/maps").read_text():  # Grain frees shared memory in a thread
            time.sleep(0.01)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def runs(pid: str) -> bool:
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["signal", "forget", "kill"])
def test_a_program_with_workers_leaves_nothing(random_corpus, tmp_path, ending):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(random_corpus.folders[0].path), ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == (-signal.SIGKILL if ending == "kill" else 0), done.stderr
    workers = done.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 250
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker outlives the program"
        time.sleep(0.05)
    if ending == "signal":
        # Python's resource tracker complains about shared memory that outlives a program.
        assert done.stderr == ""


def damage(sequences: Sequences) -> None:
    path: Path = sequences.corpus.folders[0].tokens_path("train")
    tokens = np.fromfile(path, "<u2")
    tokens[37] = 300
    tokens.tofile(path)


def test_error_in_a_thread(sequences):
    damage(sequences)
    with pytest.raises(ValueError, match=r"token 37 of .* is id 300"):
        take(1, sequences, batch_size=N, seed=0)


@pytest.mark.parametrize("n_host", [1, 2, 4])
def test_evaluation_hosts_get_the_rows_of_each_piece(random_corpus, n_host):
    streams = Streams(random_corpus, "train", 8, 2, 4)
    whole = [streams.piece(number, range(8)) for number in range(len(streams))]
    n_row = 8 // n_host
    hosts = [list(evaluation_pieces(streams, range(h * n_row, (h + 1) * n_row))) for h in range(n_host)]
    assert_same(side_by_side(hosts), whole)


def test_arguments_out_of_range(sequences):
    with pytest.raises(ValueError, match=r"at least 1 sequence, not 0"):
        training_batches(sequences, batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"number 0, not -1"):
        training_batches(sequences, batch_size=4, seed=0, start=-1)
    with pytest.raises(ValueError, match=r"slice\(4, 8, None\) takes none of the 4 rows"):
        training_batches(sequences, batch_size=4, seed=0, rows=slice(4, 8))


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (7, r"workers=2: one was killed by signal 7 \(SIGBUS\): /dev/shm, .* is too small.*--shm-size"),
        (9, r"workers=2: one was killed by signal 9 \(SIGKILL\), most likely for lack of memory"),
        (11, "killed by signal 11; config.data.workers=0 reads in threads"),
    ],
)
def test_a_worker_that_a_signal_ends(random_corpus, monkeypatch, code, wanted):
    def ended(*_: object) -> None:
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code -{code}.")

    monkeypatch.setattr(pipeline.grain.IterDataset, "mp_prefetch", lambda self, *_: self)
    monkeypatch.setattr(Sequences, "batch", ended)
    sequences = Sequences(random_corpus, "train", 8)
    with pytest.raises(InputError, match=wanted):
        next(training_batches(sequences, batch_size=2, seed=0, workers=2))
    monkeypatch.setattr(Sequences, "batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(training_batches(sequences, batch_size=2, seed=0, workers=2))
