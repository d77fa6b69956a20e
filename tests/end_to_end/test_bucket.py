"""A workdir on gs://, on a pretended bucket: what tvq itself writes there. Orbax brings its own driver."""

from pathlib import Path

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tvq import cluster, config, metrics, sample, train


class Bucket(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012  # the declaration of the parent, which this must not share
    pseudo_dirs = [""]  # noqa: RUF012

    def __init__(self, finalize_on_close: bool = True):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))


@pytest.fixture
def workdir() -> epath.Path:
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    return epath.Path("gs://bucket/run")


def test_a_run_is_recorded_in_a_bucket(workdir: epath.Path) -> None:
    c = config.Config()
    train.check_workdir(workdir, c)
    train.record(workdir, c)
    train.check_workdir(workdir, c)
    other = config.Config(train=config.Train(seed=1))
    with pytest.raises(ValueError, match=r"another config.*\n.*train.seed"):
        train.check_workdir(workdir, other)
    assert config.build(config.recorded(workdir / config.FILE)) == c


def test_rows_and_samples_go_to_a_bucket(workdir: epath.Path) -> None:
    for resume_step in (0, 2, 2):  # the last is killed and resumed: its row is written anew
        rows = metrics.JsonlWriter(workdir / "metrics.jsonl", resume_step)
        rows.write({"step": resume_step + 2, "split": "train"})
        rows.close()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 2, "split": "train"}', '{"step": 4, "split": "train"}']
    assert sample.save(["text"], workdir, 4).read_text() == "text\n"


def test_logs_stay_on_the_machine() -> None:
    assert cluster.log_folder("gs://bucket/run").name == "gs-bucket-run"
    assert cluster.log_folder("runs/a") == Path("runs/a/logs")
