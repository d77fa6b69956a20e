"""The tvq command for tests: its processes share compiled programs, and may tell what they do.

    python -m tests.fakes.cached ARGUMENTS

On CPU jax names a program after the process that compiled it, and process 0 alone writes programs down: all
others would compile again at each start, which takes most of a short run's time. And it writes in place, so
that another may read the half of a program, and warns.

TVQ_TEST_PHASES names a folder where each process keeps "PHASE STEP PID" in a file of its number, and stays a
moment in each phase. TVQ_TEST_HOLD names a file without which no batch from step 10 on is read.
"""

import os
import sys
import time
from pathlib import Path

from jax._src import cache_key, lru_cache  # key and files have no public names

from tvq import __main__, cluster


def put_whole(cache: lru_cache.LRUCache, key: str, value: bytes) -> None:
    part = cache.path / f"{key}.part"
    part.write_bytes(value)
    part.replace(cache.path / f"{key}-cache")


def share_programs() -> None:
    """All that compile for the same devices share what they compiled, whichever process they are."""
    cache_key._hash_accelerator_config = lambda hashed, devices: cache_key._hash_devices(hashed, devices)
    lru_cache.LRUCache.put = put_whole


def hold(file: Path) -> None:
    beat = cluster.Watchdog.beat

    def beat_and_hold(self: cluster.Watchdog, phase: str, step: int, allow: float | None = None) -> None:
        beat(self, phase, step, allow)
        while phase == "data" and step >= 10 and not file.exists():
            time.sleep(0.01)

    cluster.Watchdog.beat = beat_and_hold  # type: ignore[method-assign]


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
    share_programs()
    if "TVQ_TEST_HOLD" in os.environ:
        hold(Path(os.environ["TVQ_TEST_HOLD"]))
    if "TVQ_TEST_PHASES" in os.environ:
        tell_phases(Path(os.environ["TVQ_TEST_PHASES"], os.environ["TVQ_PROCESS_ID"]))
    sys.exit(__main__.main())
