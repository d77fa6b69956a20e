"""The cases of a command: compiled, compared, then timed in turn."""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tvq.errors import DisagreementError
from tvq.schema import Config

Row = dict[str, Any]
# Largest relative difference of two programs. A GPU rounds the factors of float32 products to 11 bits.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 3e-2}
STEP = "train step"  # what the data pipeline is compared with
# Shorter calls are repeated until they last this long, so that clock and launch do not matter.
LEAST_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` does the work on `n_token` tokens and returns arrays to wait for; `labels` identify the case."""

    labels: Row
    call: Callable[[], Any]
    n_token: int
    facts: Row = dataclasses.field(default_factory=dict)
    flops: float = 0.0  # a token
    n_device: int = 1


@dataclasses.dataclass
class Session:
    """The cases and notes of one command."""

    config: Config
    mesh: Mesh
    say: Callable[[str], None]
    began: float
    cases: list[Case] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def is_late(self, share: float) -> bool:
        """Whether this share of bench.seconds has passed."""
        limit = self.config.bench.seconds
        return bool(limit) and time.monotonic() - self.began > share * limit

    @contextlib.contextmanager
    def trying(self, **labels: Any) -> Iterator[bool]:
        """If true, a case is prepared inside; one that does not fit in memory is noted and left out."""
        name = " ".join(str(value) for value in labels.values())
        if self.is_late(0.6):
            self.note(f"left out: {name} (60 % of bench.seconds {self.config.bench.seconds:g} had passed)")
        try:
            yield not self.is_late(0.6)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.note(f"left out: {name} (out of memory)")

    def agree(self, got: Any, want: Any, what: str) -> None:
        """Notes the largest relative difference of two trees. DisagreementError: it is too large."""
        dtype = self.config.model.dtype
        size = lambda x: jnp.max(jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
        difference = lambda a, b: size(a - b) / jnp.maximum(size(b), 1e-30)
        errors = jax.tree.map(lambda a, b: float(difference(jnp.asarray(a), jnp.asarray(b))), got, want)
        error = max(jax.tree.leaves(errors))
        if not error <= TOLERANCE[dtype]:
            raise DisagreementError(
                f"no speed is given: {what} differ by {error:.1e}, {TOLERANCE[dtype]:.0e} allowed for {dtype}"
            )
        self.note(f"checked: {what} agree to {error:.0e}, {TOLERANCE[dtype]:.0e} allowed")


def compiled(program: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, Row]:
    """The program for such arguments, the seconds to compile it and the memory it needs on each device."""
    began = time.monotonic()
    made = program.lower(*arguments).compile()
    facts: Row = {"compile s": time.monotonic() - began}
    memory = made.memory_analysis()
    if memory is not None:  # not every backend tells
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        facts["MiB"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs) / 2**20
    return made, facts


def measure(s: Session) -> list[list[float]]:
    """Seconds a call of each case, one number per round; each round times every case, in its own order.

    At least one round, then as many of bench.rounds as begin within bench.seconds.
    """
    repeats = [1] * len(s.cases)
    for i, case in enumerate(s.cases):  # a second warm-up, after that of preparing
        repeats[i] = max(1, round(LEAST_SECONDS / timed(case, 1)))
    order, draws = list(range(len(s.cases))), random.Random(0)
    seconds: list[list[float]] = [[] for _ in s.cases]
    for n in range(s.config.bench.rounds):
        if n and s.is_late(1.0):
            s.note(f"{n} of {s.config.bench.rounds} rounds within bench.seconds {s.config.bench.seconds:g}")
            break
        draws.shuffle(order)
        for i in order:
            seconds[i].append(timed(s.cases[i], repeats[i]))
    return seconds


def timed(case: Case, n: int) -> float:
    """Seconds a call, over n calls."""
    began = time.perf_counter()
    for _ in range(n):
        results = case.call()
    jax.block_until_ready(results)
    return (time.perf_counter() - began) / n
