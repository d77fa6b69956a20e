"""One runtime for all tests: eight CPU devices, and an implicit rank promotion is an error."""

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA adds in an order that depends on its number of threads: that of the cores, or of the devices if there
# are more. The processes that tests start inherit this, and have as many as this one: runs are compared bit
# by bit.
os.environ["PJRT_NPROC"] = "8"

import jax
import pytest

from tests.fakes.pod import QUICK_TO_COMPILE

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A background job is deaf to Ctrl-C, one under nohup to a hang-up, and bash cannot mend that in its scripts.
# What is ignored is inherited, a handler is not.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


def pytest_configure() -> None:
    os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For -n auto: one more than there are cores, as some tests wait for processes. Each takes up to 2 GB."""
    return min((os.cpu_count() or 1) + 1, 8)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """A module keeps no compiled programs for the next, which has others: or a worker grows to gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library that has no such function
        ctypes.CDLL(None).malloc_trim(0)
