"""tvq: training of Transformer-VQ, a transformer whose dense attention costs linear time."""

import multiprocessing
import os
import signal
import sys
from types import FrameType

EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C


def end_at_interrupt(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, b"tvq: interrupted\n")
    finally:  # whether anybody hears it or not
        os._exit(EXIT_INTERRUPTED)


# The imports of a program take seconds. Until it can say that it was interrupted (`raise_at_interrupt`),
# Ctrl-C must not end in a traceback of some library. Not for who imports tvq, nor in processes of a run.
if (
    os.path.basename(sys.argv[0]) in ("tvq", "-m")  # so it is called while `python -m tvq` imports this
    and multiprocessing.parent_process() is None
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, end_at_interrupt)
