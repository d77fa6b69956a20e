"""The tvq command for tests: its processes share compiled programs, and may tell what they do.

    python -m tests.fakes.cached ARGUMENTS

On CPU jax names a program after the process that compiled it, and process 0 alone writes programs down: all
others would compile again at each start, which takes most of a short run's time. TVQ_TEST_PHASES names a
folder where each process keeps "PHASE STEP PID" in a file of its number, and stays a moment in each phase.
"""

import os
import sys
import time
from pathlib import Path

from jax._src import cache_key  # the key has no public name

from tvq import __main__, cluster


def tell_phases(file: Path) -> None:
    beat = cluster.Watchdog.beat

    def tell(phase: str, step: int) -> None:
        part = file.with_suffix(".part")
        part.write_text(f"{phase} {step} {os.getpid()}")
        part.replace(file)

    def beat_and_tell(self: cluster.Watchdog, phase: str, step: int, allow: float | None = None) -> None:
        beat(self, phase, step, allow)
        tell(phase, step)
        time.sleep(0.01)

    tell("start", 0)
    cluster.Watchdog.beat = beat_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    cache_key._hash_accelerator_config = lambda hashed, devices: cache_key._hash_devices(hashed, devices)
    if "TVQ_TEST_PHASES" in os.environ:
        tell_phases(Path(os.environ["TVQ_TEST_PHASES"], os.environ["TVQ_PROCESS_ID"]))
    sys.exit(__main__.main())
