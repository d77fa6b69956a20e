"""A workdir on gs://, on a simulated bucket: what tvq itself writes there. Orbax brings its own driver."""

import contextlib
import gzip
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tvq import cluster, config, schema
from tvq.data import prepared
from tvq.data.corpus import open_corpus
from tvq.data.packing import Sequences
from tvq.data.pipeline import training_batches
from tvq.data.splits import SPLITS, Piece
from tvq.data.vocabulary import ByteVocabulary
from tvq.errors import InputError
from tvq.programs import prepare
from tvq.run import records
from tvq.run.workdir import SAVED, check_workdir, record


class Bucket(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012  # the declaration of the parent, which this must not share
    pseudo_dirs = [""]  # noqa: RUF012
    fetched: list[tuple[int, int]] = []  # noqa: RUF012  # ranges and bytes of each request

    def __init__(self, finalize_on_close: bool = True):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))

    def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int], **options: Any) -> list[bytes]:
        self.fetched.append((len(paths), sum(ends) - sum(starts)))
        return super().cat_ranges(paths, starts, ends, **options)


@pytest.fixture
def workdir() -> epath.Path:
    for protocol in Bucket.protocol:
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    return epath.Path("gs://bucket/run")


def test_a_run_is_recorded_in_a_bucket(workdir: epath.Path, tmp_path: Path) -> None:
    c = schema.Config()
    check_workdir(workdir, c)
    with contextlib.closing(cluster.Log(tmp_path, cluster.Place(how="alone"))) as log:
        record(workdir, c, log)
    check_workdir(workdir, c)
    other = schema.Config(train=schema.Train(seed=1))
    with pytest.raises(ValueError, match=r"another config.*\n.*train.seed"):
        check_workdir(workdir, other)
    (workdir / records.FILE).write_text('{"step": 2, "split": "train"}\n')  # and there is no checkpoint yet
    check_workdir(workdir, c)
    (workdir / SAVED).write_text("{}")
    with pytest.raises(InputError, match=r"holds the record of a run \(to step 2\), but no checkpoint"):
        check_workdir(workdir, c)
    assert config.build(config.recorded(workdir / config.FILE)) == c


def test_rows_and_samples_go_to_a_bucket(workdir: epath.Path) -> None:
    for resume_step in (0, 2, 2):  # the last is killed and resumed: its row is written again
        rows = records.JsonlWriter(workdir / "metrics.jsonl", resume_step)
        rows.write({"step": resume_step + 2, "split": "train"})
        rows.close()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 2, "split": "train"}', '{"step": 4, "split": "train"}']
    drawn = workdir / records.SAMPLES
    for resume_step in (0, 2):
        writer = records.SampleWriter(drawn, resume_step)
        assert list(records.samples(drawn)) == [2][:resume_step], "those after the checkpoint are gone"
        for step in (2, 4):
            writer.show(step, "text\n")
    assert {step: path.read_text() for step, path in records.samples(drawn).items()} == {
        2: "text\n", 4: "text\n",
    }  # fmt: skip


def test_hosts_read_only_their_part_of_prepared_tokens(workdir: epath.Path, tmp_path: Path) -> None:
    pieces = [Piece(split, "a", bytes(range(100)), last=True) for split in SPLITS]
    corpora = []
    for folder in (epath.Path(tmp_path / "local"), workdir / "tokens"):
        folder.mkdir(parents=True)
        prepared.write(folder, pieces, prepared.text_form(ByteVocabulary()), {})
        corpora.append(open_corpus(schema.Data(source="tokens", path=str(folder))))
    local, remote = (Sequences(corpus, "train", 10) for corpus in corpora)
    assert corpora[0].fingerprint == corpora[1].fingerprint
    Bucket.fetched.clear()
    options = {"batch_size": 8, "seed": 0, "rows": slice(2, 5)}
    with (
        contextlib.closing(training_batches(local, **options)) as ours,
        contextlib.closing(training_batches(remote, **options)) as theirs,
    ):
        for _ in range(3):
            wanted, found = next(ours), next(theirs)
            for name, array in wanted.items():
                np.testing.assert_array_equal(found[name], array)
    assert len(Bucket.fetched) >= 3
    # Twenty bytes a row; the last sequence is short.
    assert all((n, size) <= (3, 3 * 20) for n, size in Bucket.fetched), "more than the rows of this process"
    assert {n for n, _ in Bucket.fetched} == {3}, "each batch is one request"


def test_prepared_from_a_bucket_into_a_bucket(workdir: epath.Path, tmp_path: Path) -> None:
    root, output = workdir / "raw", workdir / "made"
    fingerprints = []
    for i in range(3):
        folder = root / ("train", "validation", "test")[i]
        folder.mkdir(parents=True)
        (folder / "a.txt.gz").write_bytes(gzip.compress(b"book %d" % i))
    for raw, made in ((root, output), (root, epath.Path(tmp_path / "made"))):
        prepare.prepare(prepare.Options(kind="text", input=str(raw), output=str(made)))
        fingerprints.append(open_corpus(schema.Data(source="tokens", path=str(made))).fingerprint)
    assert fingerprints[0] == fingerprints[1]
    with pytest.raises(ValueError, match=r"--output=gs://bucket/run/made already exists"):
        prepare.prepare(prepare.Options(kind="text", input=str(root), output=str(output)))


def test_logs_stay_on_the_machine() -> None:
    assert cluster.log_folder("gs://bucket/run").name == "gs-bucket-run"
    assert cluster.log_folder("runs/a") == Path("runs/a/logs")
    assert cluster.local_folder("gs://bucket/run") == cluster.log_folder("gs://bucket/run")
    assert cluster.local_folder("runs/a") == Path("runs/a")
