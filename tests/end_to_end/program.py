"""The tvq command on a tiny model, in this process or in processes of its own, and what it leaves behind."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from tests.fakes.cached import share_programs
from tests.fakes.forks import Fork, environment
from tests.fakes.pod import QUICK_TO_COMPILE
from tvq import __main__, config, schema, sharding
from tvq.programs import evaluate
from tvq.run import health
from tvq.run.checkpoint import Checkpoints, Restored
from tvq.training import optimizer, state, train_step

REPOSITORY = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.py")
TIMED = ("tokens_per_second", "data_wait", "goodput", "seconds_")


def write_corpus(path: Path) -> None:
    """Lines of random words: 3,600 bytes to train on, fewer than 20 updates read."""
    words = random.Random(0).choices(["import ", "def ", "return ", "x = 1\n", "for i in y:\n"], k=1000)
    path.write_text("".join(words)[:4000])


# What a command may set, for the process that it thinks is its own.
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_enable_x64",
    "jax_persistent_cache_min_compile_time_secs",
)


def decided_by(*names: str) -> Callable[[Callable], Callable]:
    """Keeps what a function of (config, ...) makes, for equal sections `names` and equal other arguments."""

    def keeping(make: Callable) -> Callable:
        made: dict[Any, Any] = {}

        def make_once(c: schema.Config, *others: Any) -> Any:
            key = (*(getattr(c, name) for name in names), *others)
            if key not in made:
                made[key] = make(c, *others)
            return made[key]

        return make_once

    return keeping


# Runs of one model in this process trace its functions once: jax knows a function by its identity.
MAKE_STEP = decided_by("model", "optimizer", "train", "mesh")(train_step.make)
MAKE_READER = functools.cache(evaluate.reader)
MAKE_OPTIMIZER = functools.cache(optimizer.make)


@contextlib.contextmanager
def as_if_started(n_device: int, programs: Path) -> Iterator[None]:
    """This process as a new command sees it: `n_device` devices, compiled `programs`, nothing else."""
    share_programs()
    devices, settings = jax.devices()[:n_device], {name: getattr(jax.config, name) for name in SETTINGS}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    variables = environment(
        JAX_COMPILATION_CACHE_DIR=os.fspath(programs), XLA_FLAGS=os.environ.get("XLA_FLAGS", "")
    )
    with (
        mock.patch.dict(os.environ, variables, clear=True),
        mock.patch.object(jax, "devices", return_value=devices),
        mock.patch.object(jax, "local_devices", return_value=devices),
        mock.patch.object(train_step, "make", MAKE_STEP),
        mock.patch.object(evaluate, "reader", MAKE_READER),
        mock.patch.object(optimizer, "make", MAKE_OPTIMIZER),
    ):
        jax.config.update("jax_compilation_cache_dir", os.fspath(programs))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            for number, handler in handlers.items():
                signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Program:
    """Runs commands; `folder` holds the corpus, the prepared tokens and the compiled programs."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.txt"

    def options(self, workdir: Path, *more: str) -> list[str]:
        """What `tvq train` needs. Later options win."""
        data = (f"--config.data.path={self.corpus}", f"--config.data.cache={self.folder / 'cache'}")
        return [f"--config={TINY}", f"--workdir={workdir}", *data, *more]

    @contextlib.contextmanager
    def start(
        self,
        *arguments: str,
        module: str = "tests.fakes.cached",
        stdout: int = subprocess.PIPE,
        is_fork: bool = True,
        **variables: str,
    ) -> Iterator[subprocess.Popen[str] | Fork]:
        """A process in a group of its own, as a terminal makes one; killed at the end of the block.

        If not `is_fork`, a Python of its own: one that starts workers, or that a user starts.
        """
        variables = environment(
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            XLA_FLAGS=QUICK_TO_COMPILE,
            PYTHONWARNINGS="error",
            **{"JAX_NUM_CPU_DEVICES": "1"} | variables,
        )
        process: subprocess.Popen[str] | Fork
        if is_fork:
            process = Fork(module, arguments, variables, stdout, subprocess.PIPE, start_new_session=True)
        else:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=variables,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def run(self, *arguments: str, exit_code: int = 0) -> tuple[str, str]:
        """`(stdout, stderr)` of a command that ends with `exit_code`, in this process: no start, no imports.

        It has one device, or as many as `--cpu_devices` says, which would come too late for jax.
        """
        n_device = [int(text.partition("=")[2]) for text in arguments if text.startswith("--cpu_devices=")]
        arguments = tuple(text for text in arguments if not text.startswith("--cpu_devices="))
        stdout, stderr = io.StringIO(), io.StringIO()
        with (
            as_if_started((n_device or [1])[-1], self.folder / "cache" / "compiled"),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            try:
                code = __main__.main(arguments)
            except SystemExit as leaving:
                code = leaving.code
        assert code == exit_code, f"exit {code}\n{stdout.getvalue()}\n{stderr.getvalue()}"
        return stdout.getvalue(), stderr.getvalue()

    def train(self, workdir: Path, *more: str, exit_code: int = 0) -> tuple[str, str]:
        return self.run("train", *self.options(workdir, *more), exit_code=exit_code)

    def run_apart(self, *arguments: str, exit_code: int = 0) -> tuple[str, str]:
        """As `run`, in a process of its own: the very command of a user.

        jax writes a program in place, which others must not see: its programs are kept apart too.
        """
        programs = {"JAX_COMPILATION_CACHE_DIR": os.fspath(self.folder / "cache" / "apart")}
        with self.start(*arguments, module="tvq", is_fork=False, **programs) as process:
            return end(process, exit_code)


def end(process: subprocess.Popen[str] | Fork, exit_code: int) -> tuple[str, str]:
    """`(stdout, stderr)` of a process that must end with `exit_code`."""
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == exit_code, f"exit {process.returncode}\n{stdout}\n{stderr}"
    return stdout, stderr


def has_rows(workdir: Path) -> bool:
    """Whether a run has written one; it may be writing the next."""
    path = workdir / "metrics.jsonl"
    return path.exists() and "\n" in path.read_text()


def rows(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in found]


def newest(workdir: Path) -> Restored:
    """The newest checkpoint of a run."""
    c = config.build(config.recorded(epath.Path(workdir) / config.FILE))
    placed = state.place(
        c, optimizer.make(c.optimizer, c.model), sharding.make(schema.Mesh(), jax.devices()[:1])
    )
    with Checkpoints(workdir / "checkpoints", keep=1, keep_every=0, read_only=True) as checkpoints:
        restored = checkpoints.restore(placed, print)
    assert restored is not None
    return restored


def arrays(restored: Restored) -> dict[str, np.ndarray]:
    """Every array of a checkpoint's state, by name."""

    def to_host(x: jax.Array) -> np.ndarray:
        return np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    leaves = jax.tree.leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): to_host(leaf) for path, leaf in leaves}


def assert_same_run(a: Path, b: Path) -> None:
    """Bitwise equal final checkpoints, the same rows, the same samples and codebook snapshots."""
    assert rows(a) == rows(b)
    folders = [epath.Path(folder) / health.FOLDER for folder in (a, b)]
    assert (
        health.steps(folders[0])
        == health.steps(folders[1])
        == [row["step"] for row in rows(a) if "c_dead" in row]
    )
    for step in health.steps(folders[0]):
        for name, array in health.load(folders[0], step).items():
            np.testing.assert_array_equal(
                array, health.load(folders[1], step)[name], err_msg=f"{name} at {step}"
            )
    ours, theirs = newest(a), newest(b)
    assert ours.step == theirs.step
    assert ours.data | {"seconds": None} == theirs.data | {"seconds": None}
    found, wanted = arrays(ours), arrays(theirs)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.tobytes() == wanted[name].tobytes(), name
    assert tree(a / "samples") == tree(b / "samples")
    assert set(tree(a / "samples")) == {"step_12.txt", "step_20.txt"}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its contents; empty where there is no folder."""
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }
