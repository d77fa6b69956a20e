"""A trace of a few updates, for TensorBoard, XProf and Perfetto. Its names are those of `jax.named_scope`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# The parts of a step, as the scopes name them.
PARTS = (
    "attention", "dropout", "embed", "loss", "metrics", "optimizer", "output", "position", "project",
    "reduce", "vq",
)  # fmt: skip


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """Traces what runs inside, to `folder/plugins/profile/TIME/`: HOST.xplane.pb and HOST.trace.json.gz."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down and fill the trace
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


class Traced:
    """A train step, of which `step` is the next, that writes the trace of `updates` as it comes to them."""

    def __init__(
        self,
        update: Callable,
        step: int,
        n_update: int,
        updates: range,
        folder: Path,
        say: Callable[[str], None],
    ):
        self._update, self._step, self._n_update = update, step, n_update
        self._updates, self._folder, self._say = updates, folder, say
        self._tracing: contextlib.ExitStack | None = None
        self._first = 0

    def __call__(self, *arguments: Any) -> Any:
        after = self._step + self._n_update
        if self._tracing is None and self._step < self._updates.stop and after > self._updates.start:
            self._tracing, self._first = contextlib.ExitStack(), self._step
            self._tracing.enter_context(written(self._folder))
        with jax.profiler.StepTraceAnnotation("update", step_num=self._step):  # or XProf knows no steps
            result = self._update(*arguments)
        self._step = after
        if self._tracing is not None and after >= self._updates.stop:
            jax.block_until_ready(result)
            self._tracing.close()
            self._tracing = None
            self._say(f"trace of updates {self._first} to {after}: tensorboard --logdir {self._folder}")
        return result
